"""Clusters of a layer's experts: how alike two experts are, in three ways, and groups of like ones of one size.

The clusters are those of a mixture of expert clusters (MoEC, arXiv 2207.09094), which are trained; these are found.
"""

import torch
import torch.nn.functional as F

from cachemoe.offload.errors import InputError


def gate_similarity(router: torch.Tensor) -> torch.Tensor:
    """How alike the router's rows are: experts of like rows are chosen for like tokens.

    Args:
        router: ``[E, H]``, its weight.

    Returns:
        ``[E, E]`` float32 cosines; 0 with a row of zeros.
    """
    rows = F.normalize(router.float(), dim=1)
    return rows @ rows.T


def output_similarity(outputs: torch.Tensor) -> torch.Tensor:
    """How alike the experts' outputs are, over the same tokens.

    Args:
        outputs: ``[E, T, H]``, of every expert for each of T >= 1 tokens.

    Returns:
        ``[E, E]`` float32, the mean of the tokens' cosines, a token's being 0 with an output of zeros.
    """
    experts, tokens, _ = outputs.shape
    total = torch.zeros(experts, experts, device=outputs.device)
    for token in outputs.unbind(1):
        rows = F.normalize(token.float(), dim=1)
        total += rows @ rows.T
    return total / tokens


def co_routing(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """How often two experts are chosen for the same token, over the geometric mean of how often each of them is.

    This is the cosine of who chose them: 1 for two that are always chosen together, 0 for two that never are.

    Args:
        ids: ``[T, K]`` integers, distinct experts of each token.
        experts: E.

    Returns:
        ``[E, E]`` float32; 0 with an expert that is never chosen.
    """
    chosen = torch.zeros(len(ids), experts, device=ids.device).scatter_(1, ids.long(), 1.0)
    together = chosen.T @ chosen
    uses = together.diagonal()
    return together / (uses[:, None] * uses).sqrt().clamp(min=1.0)


def clusters(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Clusters of sizes that differ by at most one, whose members are alike.

    Balanced k-means for similarities. Clusters grow from members that are far apart: of all experts that are left and
    all clusters that may grow, the pair of the highest mean similarity is joined, one after another. Then (Kernighan
    and Lin, 1970) that exchange of two experts, or that move from a larger to a smaller cluster, is made which gains
    most, until none gains. Where no exchange gains, the pairs within two clusters of one size are on average at least
    as alike as the pairs between them: clusters of one size are no worse than random ones are on average.

    Args:
        similarity: ``[E, E]``, of which the mean with its transpose counts; not the diagonal.
        count: of clusters, between 1 and E.

    Returns:
        ``[E]`` int64, each expert's cluster; clusters are numbered by their first expert. The same input gives the same
        clusters.

    Raises:
        InputError: for a count that cannot be, or a similarity that is not finite.
    """
    experts = len(similarity)
    if not 1 <= count <= experts:
        raise InputError(f"{experts} experts make 1 to {experts} clusters, not {count}")
    alike = similarity.double().cpu()
    alike = (alike + alike.T) / 2
    if not alike.isfinite().all():
        raise InputError("experts' similarities are not finite: the model's weights or outputs are not")
    alike.fill_diagonal_(0.0)
    return _numbered(_improved(alike, _grown(alike, count), count))


def _grown(alike: torch.Tensor, count: int) -> torch.Tensor:
    """``[E]`` clusters that have grown from far apart members."""
    experts = len(alike)
    first = [int(alike.sum(1).argmin())]
    while len(first) < count:
        nearest = alike[:, first].amax(1)
        nearest[first] = torch.inf
        first.append(int(nearest.argmin()))
    of = torch.full((experts,), -1)
    of[first] = torch.arange(count)
    least, larger = divmod(experts, count)
    for _ in range(experts - count):
        member = F.one_hot(of.clamp(min=0), count).double() * (of >= 0)[:, None]
        sizes = member.sum(0)
        may_grow = sizes < least if (sizes > least).sum() == larger else sizes <= least
        mean = (alike @ member / sizes).masked_fill(~may_grow | (of >= 0)[:, None], -torch.inf)
        expert, cluster = divmod(int(mean.argmax()), count)
        of[expert] = cluster
    return of


def _improved(alike: torch.Tensor, of: torch.Tensor, count: int) -> torch.Tensor:
    """``[E]`` clusters that no change of places and no move betters."""
    of, experts = of.clone(), torch.arange(len(of))
    least = 1e-12 * float(alike.abs().max())  # of a gain: less is rounding, and might go round in circles
    while True:
        member = F.one_hot(of, count).double()
        near = alike @ member  # [E, count] the sum of similarities to each cluster's members
        sizes = member.sum(0)
        gain = near - near[experts, of][:, None]  # of a move
        swap = gain[:, of] + gain[:, of].T - 2 * alike
        swap[of[:, None] == of] = -torch.inf
        move = gain.masked_fill(sizes[of][:, None] <= sizes, -torch.inf)
        if max(swap.max(), move.max()) <= least:
            return of
        if swap.max() >= move.max():
            i, j = divmod(int(swap.argmax()), len(of))
            of[i], of[j] = of[j].clone(), of[i].clone()
        else:
            i, cluster = divmod(int(move.argmax()), count)
            of[i] = cluster


def _numbered(of: torch.Tensor) -> torch.Tensor:
    """The same clusters, numbered by their first expert."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(cluster, len(numbers)) for cluster in of.tolist()])
