"""Clusters of experts: similarities in plain Python; clusters that are balanced, alike, and the same each time."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.moe.clusters import clusters, co_routing, gate_similarity, output_similarity
from cachemoe.offload.errors import InputError


def cosine(a, b):
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gates_are_alike_as_the_cosine_of_their_rows():
    router = random(0, 5, 7)
    router[3] = 0.0
    expected = [[cosine(a, b) for b in router.tolist()] for a in router.tolist()]
    torch.testing.assert_close(gate_similarity(router), torch.tensor(expected))
    torch.testing.assert_close(gate_similarity(router * torch.rand(5, 1)), torch.tensor(expected))
    assert gate_similarity(router.bfloat16()).dtype == torch.float32


def test_outputs_are_alike_as_the_mean_cosine_of_the_tokens():
    outputs = random(0, 4, 6, 5) * torch.tensor([1.0, 10.0, 100.0, 1.0, 1.0, 1.0])[:, None]  # each token counts alike
    outputs[2, 1] = 0.0
    rows = outputs.tolist()
    expected = [[sum(cosine(rows[i][t], rows[j][t]) for t in range(6)) / 6 for j in range(4)] for i in range(4)]
    torch.testing.assert_close(output_similarity(outputs), torch.tensor(expected))


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True), min_size=1, max_size=30))
def test_co_routing_is_counted(ids):
    found = co_routing(torch.tensor(ids), 7)
    for i in range(7):
        for j in range(7):
            together = sum(i in token and j in token for token in ids)
            uses = sum(i in token for token in ids) * sum(j in token for token in ids)
            assert found[i, j] == pytest.approx(together / math.sqrt(uses) if uses else 0.0)


def within(similarity, of):
    """The mean similarity of the pairs that share a cluster."""
    pairs = [(i, j) for i, j in combinations(range(len(of)), 2) if of[i] == of[j]]
    return sum(float(similarity[i, j] + similarity[j, i]) / 2 for i, j in pairs) / len(pairs)


@given(st.integers(1, 14), st.data())
def test_clusters_are_balanced_numbered_in_order_and_the_same_each_time(experts, data):
    count = data.draw(st.integers(1, experts))
    values = st.lists(st.integers(-3, 3), min_size=experts**2, max_size=experts**2)  # with many ties
    similarity = torch.tensor(data.draw(values)).float().view(experts, experts)
    of = clusters(similarity, count)
    sizes = of.bincount(minlength=count)
    assert of.dtype == torch.int64 and len(sizes) == count and sizes.max() - sizes.min() <= 1
    firsts = [of.tolist().index(cluster) for cluster in range(count)]
    assert firsts == sorted(firsts)
    assert torch.equal(of, clusters(similarity, count))
    assert torch.equal(of, clusters(similarity.T + 9 * torch.eye(experts), count))  # only mates' similarity counts


@pytest.mark.parametrize("sizes", [[4] * 15, [8] * 8, [2] * 20, [5, 5, 5, 4, 4], [1] * 6, [12]])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_planted_clusters_are_found(sizes, noise):
    planted = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    planted = planted[torch.randperm(len(planted), generator=torch.Generator().manual_seed(1))]
    rows = torch.eye(32)[planted] + noise / math.sqrt(32) * random(2, len(planted), 32)
    found = clusters(gate_similarity(rows), len(sizes))
    assert torch.equal(found[:, None] == found, planted[:, None] == planted)


@given(st.integers(2, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_clusters_of_one_size_are_at_least_as_alike_as_all_pairs_are(size, count, seed):
    """The mean over all pairs is what random clusters have on average."""
    similarity = random(seed, size * count, size * count)
    everyone = [0] * (size * count)
    assert within(similarity, clusters(similarity, count).tolist()) >= within(similarity, everyone) - 1e-6


@pytest.mark.parametrize(("experts", "count"), [(60, 15), (60, 4), (16, 4), (17, 4), (61, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_random_balanced_clusters_are_never_more_alike(experts, count, seed):
    similarity = random(seed, experts, experts)
    generator = torch.Generator().manual_seed(seed)
    found = within(similarity, clusters(similarity, count).tolist())
    for _ in range(20):
        order = torch.randperm(experts, generator=generator)
        assert found > within(similarity, (order % count).tolist())


@pytest.mark.parametrize("seed", range(10))
def test_no_exchange_of_two_experts_makes_them_more_alike(seed):
    similarity = random(seed, 11, 11)
    of = clusters(similarity, 3).tolist()
    best = within(similarity, of)
    for i, j in combinations(range(11), 2):
        other = list(of)
        other[i], other[j] = of[j], of[i]
        assert within(similarity, other) <= best + 1e-6


@pytest.mark.parametrize("count", [0, 5, -1])
def test_a_count_that_cannot_be_is_refused(count):
    with pytest.raises(InputError, match=f"4 experts make 1 to 4 clusters, not {count}"):
        clusters(torch.eye(4), count)


def test_similarities_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="similarities are not finite"):
        clusters(torch.full((4, 4), math.nan), 2)
