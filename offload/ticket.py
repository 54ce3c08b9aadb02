"""What ``OffloadEngine.acquire`` gives: a layer's experts, asked for."""

from dataclasses import dataclass

from cachemoe.kernels.state import Routing
from cachemoe.offload.link import Transfer


@dataclass(eq=False, slots=True)  # made for every token and layer
class Ticket:
    """A routing whose missing experts are on their way.

    Args:
        routing: as given.
        pages, slots: ``[K]`` of one token on the host, the pages as their cache numbers them; None of others, for which
            nothing is asked ahead.
        kept: places whose expert is not dropped.
        loads: of each transfer the place of its expert.
    """

    routing: Routing
    pages: list[int] | None = None
    slots: list[int] | None = None
    kept: list[int] | None = None
    loads: dict[Transfer, int] | None = None
