"""The payload's pages: random, but such that computing with them is like computing with real ones."""

import torch

from cachemoe.benchmarks.payload import PAYLOAD_FORMATS, random_pages
from cachemoe.kernels.experts_cpu import side_by_side
from cachemoe.kernels.formats import PageFormat
from cachemoe.offload.store import StoreLayout


def test_the_geometry_is_qwens():
    page_format = PAYLOAD_FORMATS["qwen1.5-moe"]
    assert (page_format.hidden, page_format.intermediate, page_format.kind) == (2048, 1408, "int4")
    assert 4.4e6 < page_format.page_bytes < 5e6


def test_random_pages_compute_finite_numbers_and_differ():
    layout = StoreLayout("random", 1, 3, PageFormat("int4", 64, 32, 32))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = layout.page_format.views(torch.stack(list(random_pages(layout))))
    outputs = side_by_side(x, weights, torch.arange(3), layout.page_format)
    assert all(y.isfinite().all() and y.abs().max() > 1e-3 for y in outputs)
    assert not torch.equal(outputs[0], outputs[1])


def test_random_pages_are_the_same_at_every_call():
    layout = StoreLayout("random", 1, 2, PageFormat("int4", 64, 32, 32))
    for a, b in zip(random_pages(layout), random_pages(layout), strict=True):
        assert torch.equal(a, b)
