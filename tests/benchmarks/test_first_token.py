"""``cachemoe first-token``: its counts against plain Python over recorded routing, and one small run of the whole."""

import json
from collections import Counter
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from typer.testing import CliRunner

from cachemoe.benchmarks import first_token, first_token_misses, first_token_start, first_token_times
from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.first_token_misses import COLD, LEAST, MOST_USED, SAVED_OTHER, SAVED_SAME, WARM
from cachemoe.moe.layers import recorded_routers
from cachemoe.moe.load import load
from cachemoe.offload.residency import least_recently_used

pytest.importorskip("transformers")

SIZES = {"PROMPT": 24, "TOKENS": 8, "STRETCH": 512}
SAVED, WINDOWS, EXPERTS = 40, 3, 8


def quiet(description, total):
    return nullcontext(lambda: None)


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory):
    """Short windows, and stores in a cache directory of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, value in SIZES.items():
            patch.setattr(first_token_misses, name, value)
        for module in (first_token_misses, first_token_start):
            patch.setattr(module, "SAVED", SAVED)
        yield


def recorded(folder, tokens, **options):
    """Each layer's experts of each token, the highest weight first, of a model that has all of them in memory."""
    model, _ = load(folder, pool="100%", device="cpu", progress=quiet, **options)
    with recorded_routers(model) as answers, torch.inference_mode():
        model(tokens[None])
    model.cachemoe.close()
    return [by_weight(answer.ids, answer.weights) for (answer,) in answers]


def by_weight(ids, weights):
    return ids.gather(1, weights.float().argsort(dim=1, descending=True, stable=True)).tolist()


def lru(tokens, slots, recent=()):
    """Misses of a cache that holds ``recent``, the last used last, and whom it holds then."""
    misses, recent = 0, list(recent)
    for chosen in tokens:
        misses += sum(e not in recent for e in chosen)
        recent = [e for e in recent if e not in chosen] + chosen[::-1]
        del recent[:-slots]
    return misses, recent


def most_used(tokens, slots):
    """The experts used most, of equals the last used, in the order of their last use."""
    uses = Counter(e for chosen in tokens for e in chosen)
    _, order = lru(tokens, EXPERTS)
    kept = sorted(order, key=lambda e: (uses[e], order.index(e)))[-slots:]
    return [e for e in order if e in kept]


def fewest(tokens, slots):
    """The fewest misses that the cache can have, whoever is there at first, last used in whatever order: all tried."""
    return min(lru(tokens, slots, recent)[0] for recent in permutations(range(EXPERTS), slots))


@pytest.fixture(scope="module")
def counted(tiny_checkpoint):
    return first_token_misses.first_misses([tiny_checkpoint], WINDOWS, quiet)["rows"]


@pytest.fixture(scope="module")
def texts(tiny_checkpoint):
    """Of each text the routing of what residency is saved after, and the windows."""
    model, _ = load(tiny_checkpoint, pool="100%", device="cpu", progress=quiet)
    read = {}
    for text in first_token_start.TEXTS:
        saved, rest = first_token_start.saved_and_rest(text, 256, SIZES["STRETCH"])
        windows = first_token_misses.read_windows(model, rest, WINDOWS, lambda: None)
        read[text] = recorded(tiny_checkpoint, saved), windows
    model.cachemoe.close()
    return read


def chosen_of(window):
    """Of each layer the prompt's experts, and the tokens'."""
    prompt = SIZES["PROMPT"]
    layers = [by_weight(*each) for each in zip(window.ids, window.weights, strict=True)]
    return [(tokens[:prompt], tokens[prompt:]) for tokens in layers]


@pytest.mark.parametrize(("pool", "slots"), [("50%", 4), ("25%", 2)])
def test_every_start_misses_what_a_hand_written_cache_does(counted, texts, pool, slots):
    for text, (own, windows) in texts.items():
        (other,) = (each for name, (each, _) in texts.items() if name != text)
        rows = {row["start"]: row for row in counted if (row["pool"], row["text"]) == (pool, text)}
        expected = {name: [0] * WINDOWS for name in (COLD, WARM, SAVED_SAME, SAVED_OTHER, MOST_USED, LEAST)}
        for number, window in enumerate(windows):
            for layer, (prompt, tokens) in enumerate(chosen_of(window)):
                begins = {
                    COLD: [],
                    WARM: lru(prompt, slots)[1],
                    SAVED_SAME: lru(own[layer], slots)[1],
                    SAVED_OTHER: lru(other[layer], slots)[1],
                    MOST_USED: most_used(prompt, slots),
                }
                for start, recent in begins.items():
                    expected[start][number] += lru(tokens, slots, recent)[0]
                expected[LEAST][number] += fewest(tokens, slots)
        assert {start: row["misses"] for start, row in rows.items()} == expected
        assert len({tuple(misses) for misses in expected.values()}) > 3  # or the starts would not be told apart
        for row in rows.values():
            each = [count / SIZES["TOKENS"] for count in row["misses"]]
            assert row["slots"] == [slots] * 2 and row["selections_per_token"] == 4
            assert row["misses_per_token"] == {"mean": sum(each) / WINDOWS, "min": min(each), "max": max(each)}
            assert row["miss_rate"]["mean"] == pytest.approx(sum(each) / WINDOWS / 4)


def test_a_prompt_leaves_in_the_engine_whom_recency_keeps_in_the_simulation(counted, texts):
    for text, (_, windows) in texts.items():
        for pool, slots in (("50%", 4), ("25%", 2)):
            (row,) = (r for r in counted if (r["pool"], r["text"], r["start"]) == (pool, text, WARM))
            kept = torch.tensor([slots] * 2), EXPERTS, least_recently_used
            assert row["misses"] == [first_token_misses.misses_where_kept(window, *kept) for window in windows]


def test_the_whole_command_without_llama_cpp(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_token, "TRAINED", [tiny_checkpoint])

    def in_this_process(name, told):
        return first_token_times._read_prompts(json.loads(json.dumps(told)))

    monkeypatch.setattr(first_token_times, "_child", in_this_process)
    options = ("--format", "int8", "--dense", "int8", "--windows", 3, "--json", "out.json")
    arguments = ("first-token", tiny_checkpoint, "--prompt", 5, "--prompt", 40, *options)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for said in ("a prompt of 40 tokens to the first token", "pool 50%, cold", "most-used, simulated", "source code"):
        assert said in " ".join(result.stdout.split())
    report = json.loads((tmp_path / "out.json").read_text())
    times = report["times"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert len(report["misses"]["rows"]) == 2 * 2 * 6 and len(times["rows"]) == 2 * 3
    _, text = first_token_start.saved_and_rest("prose", 256, 40)
    disk = times["disk_bytes_per_second"]["median"]
    for length in (5, 40):
        used = recorded(tiny_checkpoint, text[:length], format="int8", dense="int8")
        distinct = sum(len({e for chosen in tokens for e in chosen}) for tokens in used)
        resident, cold, saved = (row for row in times["rows"] if row["prompt_tokens"] == length)
        assert resident["bytes_read"] == resident["missed_bytes"] == 0
        assert cold["missed_bytes"] == distinct * times["page_bytes"] <= cold["bytes_read"]
        assert saved["missed_bytes"] < cold["missed_bytes"]
        assert cold["bound_ms"] == pytest.approx(cold["missed_bytes"] / disk * 1e3)
        for row in (resident, cold, saved):
            seconds = [run["seconds"] for run in row["runs"]]
            assert len(seconds) == 3 and row["same_token"]
            assert [row["ms"][name] for name in ("min", "median", "max")] == [1e3 * each for each in sorted(seconds)]


def test_a_way_runs_in_a_process_of_its_own_and_says_why_if_it_cannot(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(first_token_start, "SAVED", 256)  # as it is in another process
    told = {"program": "cachemoe", "options": {"pool": 4}, "folder": str(tiny_checkpoint), "prompts": [3, 9]}
    here, there = first_token_times._read_prompts(told), first_token_times._child("pool", told)
    for mine, its in zip(here, there, strict=True):
        assert all(mine[name] == its[name] for name in ("token", "misses", "bytes_read"))
        assert its["seconds"] > 0 < its["misses"]
    monkeypatch.setattr(first_token_times.sys, "executable", "false")  # a program that fails
    with pytest.raises(first_token_times.InputError, match="pool 50% ended with 1"):
        first_token_times._child("pool 50%", told)
