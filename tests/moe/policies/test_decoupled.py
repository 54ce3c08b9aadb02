"""A table by token id, as what is fetched ahead and as what decides."""

import pytest
import torch
from tiny_models import VOCABULARY, calibration_of_model, save_random

from cachemoe.moe.calibrate import means
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.layers import moe_layers
from cachemoe.moe.models import load_model
from cachemoe.moe.policies.rule import Rule
from cachemoe.moe.sources import TokenTable, gates_ahead
from cachemoe.offload import staging
from cachemoe.offload.errors import InputError

pytest.importorskip("transformers")
WINDOWS = torch.randint(3, VOCABULARY // 2, (2, 16), generator=torch.Generator().manual_seed(0))  # half of all tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    save_random("qwen3_moe", folder)
    return folder


@pytest.fixture
def calibration(folder, opened, tmp_path, quiet):
    source, plain = Checkpoint(folder), opened(folder)
    made = calibration_of_model(load_model(folder), source, WINDOWS, plain.cachemoe.fingerprint, "tiny")
    made.save(tmp_path / "calibration.safetensors")
    return made, tmp_path / "calibration.safetensors"


def decoded(model, tokens):
    past, rows = None, []
    with torch.inference_mode():
        for token in tokens:
            output = model(token[None, None], past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(output.logits[0, 0])
    return torch.stack(rows)


def test_means_by_place():
    logits, place = torch.tensor([[1.0, 2.0], [3.0, 4.0], [8.0, 0.0]]), torch.tensor([1, 1, 0])
    assert means(logits, place).tolist() == [[8.0, 0.0], [2.0, 3.0], [4.0, 2.0]]


def test_the_table_has_the_tokens_of_the_text_and_their_mean(folder, calibration):
    made, _ = calibration
    assert made.token_ids.tolist() == sorted(set(WINDOWS.flatten().tolist()))
    model = load_model(folder)
    table = TokenTable(model, made)
    known, unknown = int(made.token_ids[3]), VOCABULARY - 1
    with torch.inference_mode():
        model(torch.tensor([[known, unknown]]))
    for layer, gate in enumerate(table.gates):
        logits = gate(torch.zeros(2, 32))
        assert torch.equal(logits[0], made.by_token[layer, 3].float())
        assert torch.equal(logits[1], made.by_token[layer, -1].float())
    table.close()
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_hint_changes_no_bit_and_fetches_ahead(folder, opened, calibration, monkeypatch):
    monkeypatch.setattr(staging, "lands_in_time", lambda *_: True)
    tokens = WINDOWS[0]
    plain, model = opened(folder), opened(folder, routing="decoupled-hint", calibration=calibration[1])
    assert torch.equal(decoded(model, tokens), decoded(plain, tokens))
    ours, theirs = model.cachemoe.counters, plain.cachemoe.counters
    assert (ours.hits, ours.misses) == (theirs.hits, theirs.misses) and model.cachemoe.label == "exact"
    # Two layers of three are foretold, two experts each.
    assert 0.9 < ours.predicted / (2 * 2 * len(tokens)) <= 1 and 0 < ours.prefetch_hits + ours.late_prefetches


def test_exec_routes_by_the_table(folder, opened, calibration):
    made, path = calibration
    model, chosen = opened(folder, routing="decoupled-exec", calibration=path), []
    layer = moe_layers(model)[1]
    layer.experts.register_forward_pre_hook(lambda module, given: chosen.append(given[1].flatten().tolist()))
    token = made.token_ids[2].long()
    decoded(model, token[None])
    assert sorted(chosen[0]) == sorted(made.by_token[1, 2].float().topk(2).indices.tolist())
    assert model.cachemoe.label == "routing changed"


def test_embeddings_in_the_tokens_place_are_refused(folder, opened, calibration):
    model = opened(folder, routing="decoupled-exec", calibration=calibration[1])
    tokens = WINDOWS[:1, :5]
    with torch.inference_mode():
        model(tokens)
        with pytest.raises(InputError, match="call the model with input_ids"):
            model(inputs_embeds=model.get_input_embeddings().weight[tokens])


def test_without_a_calibration_it_is_refused(folder, opened):
    with pytest.raises(InputError, match="decoupled-hint needs a calibration of the model"):
        opened(folder, routing="decoupled-hint")


def test_a_rule_without_a_source_asks_nobody(folder):
    with gates_ahead(load_model(folder), Rule("plain"), None) as gates:
        assert gates == []
