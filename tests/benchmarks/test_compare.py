"""What ``cachemoe compare`` makes of a checkpoint for llama.cpp, and of what its ways report."""

import dataclasses

import numpy as np
import pytest
import torch
from rich.console import Console

from cachemoe.benchmarks import compare
from cachemoe.benchmarks.compare_tables import compare_tables
from cachemoe.benchmarks.gguf_model import gguf_of, write_gguf
from cachemoe.moe.checkpoint import STEEPMOE, Checkpoint
from cachemoe.offload.errors import InputError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def steep(tmp_path_factory, module_quiet):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "steep.gguf"
    write_gguf(Checkpoint(STEEPMOE), path, module_quiet)
    return path


@pytest.fixture(scope="module")
def module_quiet():
    from contextlib import nullcontext

    return lambda description, total: nullcontext(lambda: None)


def test_every_tensor_is_in_the_file_and_rounded_to_no_more_than_q4_0_does(steep):
    import gguf

    read = {each.name: each for each in gguf.GGUFReader(steep).tensors}
    checkpoint = Checkpoint(STEEPMOE)
    shape, names = checkpoint.shape, [name for name in checkpoint.tensors.entries if not checkpoint.is_expert(name)]
    assert len(read) == len(names) + 3 * len(shape.layers)
    for layer in (0, len(shape.layers) - 1):
        gate = torch.stack([checkpoint.expert(layer, e)["gate_up"].chunk(2)[0] for e in range(shape.experts)]).float()
        stored = read[f"blk.{shape.layers[layer]}.ffn_gate_exps.weight"]
        numbers = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(gate.shape)
        step = np.abs(gate.numpy()).reshape(*gate.shape[:2], -1, 32).max(-1) / 8
        off = np.abs(numbers - gate.numpy()).reshape(*gate.shape[:2], -1, 32).max(-1)
        assert (off <= 1.01 * step + 1e-6).all()
    router = checkpoint.tensors.read("model.layers.0.mlp.gate.weight").float().numpy()
    assert (read["blk.0.ffn_gate_inp.weight"].data.reshape(router.shape) == router).all()


def test_llama_cpp_predicts_as_the_model_does(steep, module_quiet):
    pytest.importorskip("xllamacpp")
    from cachemoe.benchmarks.llama_cpp import LlamaCpp
    from cachemoe.moe.models import load_model
    from cachemoe.moe.text import load_tokens

    text = load_tokens(None, 256, 80)
    with torch.inference_mode():
        expected = load_model(STEEPMOE, torch.float32)(text[None]).logits[0].argmax(-1).tolist()
    for repack in (True, False):
        with LlamaCpp(steep, repack) as llama:
            told = [llama.next_token(text[:end].tolist()) for end in range(1, 81)]
        assert all(seconds > 0 for _, seconds in told)
        assert sum(a == b for (a, _), b in zip(told, expected, strict=True)) > 40  # Q4_0 decides some otherwise


def test_llama_cpp_takes_a_prompt_that_fills_the_models_context(steep):
    pytest.importorskip("xllamacpp")
    from cachemoe.benchmarks.llama_cpp import LlamaCpp
    from cachemoe.moe.text import load_tokens

    longest = Checkpoint(STEEPMOE).shape.context
    with LlamaCpp(steep, True, context=longest + 1) as llama:
        _, seconds = llama.next_token(load_tokens(None, 256, longest).tolist())
    assert seconds > 0


def test_a_file_is_made_once_for_a_checkpoint(tmp_path, monkeypatch, module_quiet):
    pytest.importorskip("gguf")
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path))
    path = gguf_of(Checkpoint(STEEPMOE), module_quiet)
    made = path.stat().st_mtime_ns
    assert gguf_of(Checkpoint(STEEPMOE), module_quiet) == path and path.stat().st_mtime_ns == made
    assert [each.suffix for each in tmp_path.iterdir()] == [".gguf"]


def test_another_architecture_is_refused_in_a_sentence(tmp_path, module_quiet, tiny_checkpoint):
    pytest.importorskip("gguf")
    checkpoint = Checkpoint(tiny_checkpoint)
    checkpoint.config = checkpoint.config | {"model_type": "mixtral"}
    with pytest.raises(InputError, match="no GGUF is made of mixtral here"):
        write_gguf(checkpoint, tmp_path / "model.gguf", module_quiet)
    assert not list(tmp_path.iterdir())


def test_a_way_is_held_to_the_first_of_its_kind_and_one_that_was_killed_has_no_figures():
    ways = compare.ways_of("50%", "fp32", "int8", "cache-prior:0.5")
    assert [way.limited for way in ways] == [False, True, True]
    ways.append(dataclasses.replace(ways[1], name="other", program=compare.LLAMA))

    def run(seconds, answers=(1, 2)):
        return {"seconds": seconds, "prompt_seconds": 2.0, "answers": list(answers), "miss_rate": 0.5}

    runs = [[run(1.0)] * 3, [run(2.0), run(2.0), run(3.0)], [run(1.0, (1, None))] * 3, [{"failed": "killed"}]]
    limits = [None, 10, 10, 10]
    rows = [compare._row(ways, limits, runs, i) for i in range(4)]
    assert rows[2]["of_first"] == {"median": 0.5, "min": 1 / 3, "max": 0.5} and rows[2]["same_next_token"] == 1
    assert rows[1]["of_resident"]["median"] == 2.0 and rows[3]["failed"] == "killed"
    assert "ms_per_token" not in rows[3]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in compare_tables({"model": "m", "format": "fp32", "weights_bytes": 100, "rows": rows}):
        console.print(table)
    said = console.export_text()
    assert "everything in memory" in said and "killed" in said and "256" in said


def test_of_whole_weights_the_other_ways_are_mmap_and_accelerate():
    names = [way.program for way in compare.ways_of("50%", None, None, "cache-prior:0.5")]
    assert names[:4] == ["cachemoe", "cachemoe", "cachemoe", "mmap"]
    assert "llama.cpp" not in names
