"""A model of 3.2 GB in a process that may use less: it generates through load, and cannot be loaded without."""

import shutil
from contextlib import contextmanager

import pytest
import torch

from cachemoe.benchmarks.memory_limit import run_limited
from cachemoe.benchmarks.synthetic import write_synthetic
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.pack import open_packed

pytest.importorskip("transformers")


@contextmanager
def quiet(description, total):
    yield lambda: None


def test_libraries_larger_than_the_limit_are_said_to_be(tmp_path):
    write_synthetic(tmp_path / "model", 0.05, quiet)
    report = run_limited(tmp_path / "model", "50%")
    for process in ("loaded", "unmodified"):
        assert "the libraries alone take" in report[process]["error"]


def test_a_model_larger_than_memory_generates(tmp_path, monkeypatch):
    if torch.version.cuda:
        pytest.skip("the libraries of a CUDA build of PyTorch take more address space than the limit")
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of disk for a while")
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    try:
        write_synthetic(tmp_path / "model", 3.2, quiet)
        checkpoint = Checkpoint(tmp_path / "model")
        open_packed(checkpoint, checkpoint.layout(), quiet).close()
        report = run_limited(tmp_path / "model", "25%")
    finally:  # pytest keeps what its last runs left
        shutil.rmtree(tmp_path)
    loaded = report["loaded"]
    assert report["budget_bytes"] < report["limit_bytes"] < report["weights_bytes"]
    assert report["weights_bytes"] > 3e9
    assert loaded["error"] is None, loaded["error"]
    assert len(loaded["tokens"]) == 32 + 16 and loaded["misses"] > 0
    assert loaded["peak_bytes"] <= 1.15 * report["budget_bytes"]
    assert report["unmodified"]["error"] is not None
