"""What ``OffloadEngine.acquire`` gives: a layer's experts, asked for."""

from dataclasses import dataclass, field

from cachemoe.kernels.state import Routing
from cachemoe.offload.link import Transfer


@dataclass(eq=False)
class Ticket:
    """A routing whose missing experts are on their way.

    Args:
        layer: that was routed.
        routing: as given.
        loads: of each transfer the place of its expert; of many tokens nothing is asked for ahead.
    """

    layer: int
    routing: Routing
    loads: dict[Transfer, int] = field(default_factory=dict)
