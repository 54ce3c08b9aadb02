"""Which waiting requests run together, so that a batch needs few experts (after Read-ME, arXiv 2410.19123, section 4).

Read-ME knows one expert for each request and repeatedly takes the requests of the expert with the longest queue, until
the batch has as many tokens as it may. Where a request needs a set of experts, of several layers, the request that
adds the fewest to the batch's comes next; for sets of one expert this is Read-ME's rule. That rule alone lets a request
whose experts nobody shares wait for ever; here those that have waited long enough go first.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One that waits.

    Args:
        experts: that its tokens are known, or expected, to need: numbers, or (layer, expert).
        tokens: that it brings to a batch.
        waited: batches that have run since it came.
    """

    experts: frozenset[Hashable]
    tokens: int = 1
    waited: int = 0


def first_come(queue: Sequence[Request], most_tokens: int) -> list[int]:
    """The batch of first-come order: requests from the front, until one does not fit.

    Args, returns and raises: as ``expert_aware``.
    """
    return _filled(queue, most_tokens, range(len(queue)))


def expert_aware(queue: Sequence[Request], most_tokens: int, patience: float) -> list[int]:
    """The next batch: requests that have waited long, then those that share experts, until one does not fit.

    Requests that have waited ``patience`` batches or more come first, in the order in which they came. Then always the
    one that adds the fewest experts to the batch's; of equals the one whose new experts the others that wait want most
    often; of equals the one that came first.

    If every batch of a queue is made by this function, a request is in one of the first ``patience`` + n batches after
    it has come, where n batches of ``first_come`` would be needed to reach it, whatever comes after it.

    Args:
        queue: all that wait, in the order in which they came.
        most_tokens: of a batch.
        patience: batches; 0 makes it ``first_come``, infinite Read-ME's rule alone.

    Returns:
        Places in the queue, in the order in which they were taken.

    Raises:
        ValueError: if a request brings no token, or more than a batch may have.
    """
    return _filled(queue, most_tokens, _by_experts(queue, patience))


def unique_experts(requests: Sequence[Request]) -> int:
    """How many different experts a batch needs."""
    return len(frozenset().union(*(request.experts for request in requests)))


def _filled(queue, most_tokens, order):
    for request in queue:
        if not 1 <= request.tokens <= most_tokens:
            raise ValueError(f"a request of {request.tokens} tokens cannot be in a batch of {most_tokens} at most")
    batch, tokens = [], 0
    for place in order:
        tokens += queue[place].tokens
        if tokens > most_tokens:
            break
        batch.append(place)
    return batch


def _by_experts(queue, patience):
    """Places in the queue, in the order of ``expert_aware``."""
    waiting = list(range(len(queue)))
    wanted = Counter(e for request in queue for e in request.experts)
    batch: set[Hashable] = set()

    def rank(place):
        if queue[place].waited >= patience:
            return -1, 0, place
        new = queue[place].experts - batch
        return len(new), -sum(wanted[e] for e in new), place

    while waiting:
        place = min(waiting, key=rank)
        waiting.remove(place)
        wanted.subtract(queue[place].experts)
        batch |= queue[place].experts
        yield place
