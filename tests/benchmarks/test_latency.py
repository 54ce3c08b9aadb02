"""``cachemoe latency`` from the outside, on the CPU: what it writes, and how it refuses what cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.payload import PAYLOADS
from cachemoe.moe.strategies import RULES
from cachemoe.offload.profiles import PROFILES
from cachemoe.offload.residency import EVICTION_POLICIES
from cachemoe.offload.store import ExpertStore

CPU = ("--device", "cpu")  # also where there is a GPU, on which defaults and tables are others
QUICK = (*CPU, "--context", "32", "--quality-tokens", "64", "--tokens", "9", "--payload", "native", "--top-j", "1")


@pytest.fixture
def command(tiny_checkpoint, tmp_path, monkeypatch):
    """Runs ``cachemoe latency`` on the tiny model in an empty folder."""
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return CliRunner().invoke(app, ["latency", "--model", str(tiny_checkpoint), *QUICK, *arguments])

    return run


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    message = " ".join(result.stderr.split())
    assert all(word in message for word in words), message
    assert "cachemoe: " in message
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def report(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "CACHEMOE_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "cachemoe.benchmarks.cli", "latency", "--model", str(tiny_checkpoint), *QUICK]
    strategies = ["--strategy", "pruning:1", "--strategy", "max-rank:4", "--strategy", "cache-prior:0.5"]
    finished = subprocess.run(
        [*command, "--capacity", "50%", "--capacity", "7", *strategies],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads((folder / "results" / "latency.json").read_text()), folder


def test_the_report_has_every_row_at_every_capacity(report):
    _, figures, _ = report
    assert [c["capacity"] for c in figures["capacities"]] == [4, 7]
    for capacity in figures["capacities"]:
        names = [row["name"] for row in capacity["rows"]]
        assert names == ["resident", "free misses", "original", "pruning:1", "max-rank:4", "cache-prior:0.5"]
        assert 0 < capacity["belady_miss_rate"] < 1


def test_the_figures_agree_with_each_other(report):
    _, figures, _ = report
    for row in (row for capacity in figures["capacities"] for row in capacity["rows"]):
        counters = row["counters"]
        assert counters["selections"] == counters["hits"] + counters["misses"]
        assert row["tokens"] == 9 == sum(len(segment) for segment in row["seconds"])
        assert counters["calls"] == 9 * figures["model"]["layers"]
        moved = 0 if row["name"] in ("resident", "free misses") else counters["misses"]
        assert counters["bytes_read"] == moved * figures["store"]["page_bytes"]
    original = figures["capacities"][0]["rows"][2]
    assert original["speedup_over_original"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert original["label"] == "exact"
    assert original["top1_agreement"] == 1.0
    assert original["miss_rate"] >= figures["capacities"][0]["belady_miss_rate"]


def test_the_tables_show_the_rows_and_say_what_was_measured(report):
    output, _, _ = report
    for words in ("cache-prior:0.5", "Belady", "changed", "routing", "pydoc_data.topics", "GB/s"):
        assert words in output


def test_the_picture_is_written(report):
    assert (report[2] / "results" / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_no_partial_file_is_left(report):
    assert not list(report[2].rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--strategy", "fastest"), ("unknown strategy 'fastest'", "cache-prior")),
        (("--strategy", "cache-prior:1.5"), ("lambda", "between 0.0 and 1.0", "1.5")),
        (("--strategy", "cache-prior"), ("lambda", "cache-prior:0.5")),
        (("--capacity", "1"), ("--capacity 1", "between the 2")),
        (("--capacity", "9"), ("--capacity 9", "the 8 there are")),
        (("--capacity", "half"), ("'half'", "50%")),
        (("--capacity", "nan%"), ("'nan%'", "50%")),
        (("--top-j", "3"), ("J must", "2 experts")),
        (("--eviction", "fifo"), ("'fifo'", "lru")),
        (("--context", "4096"), ("--context 4096", "128")),
        (("--quality-tokens", "8"), ("--quality-tokens 8", "--context of 32")),
        (("--tokens", "600"), ("--tokens 600", "128")),
        (("--payload", "gpt-5"), ("'gpt-5'", "native")),
        (("--profile", "phone-x"), ("'phone-x'", "phone-ufs4.0")),
        (("--text", "absent.txt"), ("absent.txt", "cannot be read")),
        (("--model", "absent"), ("absent", "config.json")),
        (("--prefetch", "luck"), ("'luck'", "gate")),
        (("--prefetch", "gate:0"), ("'gate:0'", "gate:N")),
        (("--ahead", "2"), ("--ahead", "between 1 and 1")),
        (("--store", "tape"), ("'tape'", "pinned:100")),
        (("--store", "pinned:0"), ("between 1 page",)),
        (("--store", "pinned:17"), ("the store's 16",)),
        (("--device", "tpu"), ("'tpu'", "cuda")),
        (("--drive", "wheel"), ("'wheel'", "graph")),
        (("--drive", "graph"), ("--store pinned",)),
        (("--drive", "graph", "--store", "pinned", "--profile", "pcie4"), ("--profile",)),
    ],
)
def test_bad_options_are_refused_in_a_sentence(command, arguments, words):
    assert_refused(command(*arguments), *words)


def test_every_way_to_move_pages(command, tmp_path):
    """Prefetchers, both drives and the timeline in one run, and the counters that must agree among them."""
    options = ("--capacity", "50%", "--strategy", "cache-prior:0.5", "--store", "pinned", "--timeline", "t.json")
    prefetch = [word for name in ("none", "gate:1", "previous", "oracle") for word in ("--prefetch", name)]
    result = command(*options, *prefetch, "--drive", "host", "--drive", "graph")
    assert result.exit_code == 0, result.output
    (capacity,) = json.loads((tmp_path / "results" / "latency.json").read_text())["capacities"]
    rows = {row["name"]: row for row in capacity["rows"]}
    for strategy in ("original", "cache-prior:0.5"):
        others = [rows[f"{strategy} {how}"] for how in ("+ gate:1", "+ previous", "in a graph")]
        for row in others:  # however pages move, the same experts are chosen, and as many miss
            assert row["counters"]["misses"] == rows[strategy]["counters"]["misses"]
            assert row["miss_rate"] == rows[strategy]["miss_rate"]
    assert "cache-prior:0.5 + oracle" not in rows
    assert rows["original + oracle"]["prefetch"] == "oracle"
    assert rows["original in a graph"]["stall_ms_per_token"] is None
    for row in rows.values():
        assert row["times_bound"] > 0
        for share in ("precision", "recall", "prefetches_used", "misses_prefetched", "prefetches_timely"):
            assert row.get(share) is None or 0 <= row[share] <= 1
    tracks = {
        e["args"].get("name") for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "M"
    }
    assert {"route", "compute", "stall", "read 0"} <= {track for track in tracks if isinstance(track, str)}
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_admission_needs_somebody_to_admit(command):
    result = command("--strategy", "cache-prior:0.5", "--prefetch", "admission")
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2 and "original, cache-prior:0.5 wait for all that they ask for: add" in message


def test_idle_time_admits_who_gave_way(command, tmp_path):
    options = ("--capacity", "50%", "--tokens", "60", "--store", "pinned", "--strategy", "random-cheap:0.9")
    result = command(*options, "--prefetch", "admission")  # and none, which the others are held to
    assert result.exit_code == 0, result.output
    (capacity,) = json.loads((tmp_path / "results" / "latency.json").read_text())["capacities"]
    rows = {row["name"]: row for row in capacity["rows"]}
    assert "original + admission" not in rows  # nobody gives way there
    cheap, admitted = rows["random-cheap:0.9"], rows["random-cheap:0.9 + admission"]
    assert cheap["admissions_per_token"] == cheap["background_bytes_per_token"] == 0
    assert 0 < admitted["decode_cheap"] < cheap["decode_cheap"] <= 1
    assert admitted["admissions_per_token"] > 0 and admitted["background_bytes_per_token"] > 0
    assert "admitted" in result.output and "Admission: an expert" in " ".join(result.output.split())


@pytest.mark.gpu
@pytest.mark.gpu_only("interpreted, minutes: the engines' own tests stand for it there")
def test_on_a_gpu_both_drives_choose_and_miss_alike(command, tmp_path):
    options = ("--device", "cuda", "--tokens", "48", "--capacity", "50%", "--strategy", "original")
    result = command(*options, "--quality-tokens", "32", "--drive", "host", "--drive", "graph")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "results" / "latency.json").read_text())
    assert (figures["settings"]["device"], figures["store"]["level"]) == ("cuda", "pinned")
    rows = {row["name"]: row for row in figures["capacities"][0]["rows"]}
    host, graph = rows["original"], rows["original in a graph"]
    assert host["counters"]["misses"] == graph["counters"]["misses"] > 0
    assert len(host["seconds"]) == len(graph["seconds"]) == 3  # segments


def test_a_short_text_is_refused(command, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    assert_refused(command("--text", "short.txt"), "short.txt", "9 bytes", "longer")


def test_a_store_cut_short_is_refused(command, tmp_path):
    assert command("--strategy", "original").exit_code == 0
    (store,) = (tmp_path / "cache").glob("*.safetensors")
    os.truncate(store, store.stat().st_size // 2)
    assert_refused(command(), store.name, "cut short", "make it again")


def test_a_store_of_other_weights_is_made_again(command, tmp_path):
    assert command("--strategy", "original").exit_code == 0
    (store,) = (tmp_path / "cache").glob("*.safetensors")
    content = store.read_bytes()
    with ExpertStore(store) as opened:
        fingerprint = opened.layout.model.encode()
    store.write_bytes(content.replace(fingerprint, b"0" * len(fingerprint)))
    assert command("--strategy", "original").exit_code == 0
    assert store.read_bytes() == content


def test_a_cache_directory_that_cannot_be_made_is_refused(command, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "file" / "cache"))
    assert_refused(command(), "CACHEMOE_CACHE", "cannot be made")


def test_a_full_disk_is_refused_before_anything_is_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert_refused(command(), "GB free", "make room")
    assert not list((tmp_path / "cache").iterdir())


def test_ctrl_c_ends_with_130_and_leaves_nothing_partial(tiny_checkpoint, tmp_path):
    environment = {**os.environ, "CACHEMOE_CACHE": str(tmp_path / "cache")}
    long = (*CPU, "--context", "32", "--quality-tokens", "100000", "--payload", "native")
    command = [sys.executable, "-m", "cachemoe.benchmarks.cli", "latency", "--model", str(tiny_checkpoint), *long]
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while "quality" not in running.stderr.readline():
        assert running.poll() is None
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".json", ".png")]


def test_verify_finds_a_flipped_byte(command, tmp_path):
    assert command("--strategy", "original").exit_code == 0
    (store,) = (tmp_path / "cache").glob("*.safetensors")
    assert CliRunner().invoke(app, ["verify", str(store)]).exit_code == 0
    content = bytearray(store.read_bytes())
    content[-5000] ^= 1
    store.write_bytes(content)
    assert_refused(CliRunner().invoke(app, ["verify", str(store)]), "layer 1, expert 7", "checksum")


def test_a_result_that_cannot_be_written_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(command("--json", "file/latency.json"), "file/latency.json", "cannot be written")
    assert_refused(command("--plot", str(tmp_path)), "cannot be written", "folder")
    assert not (tmp_path / "cache").exists()


def test_one_window_writes_valid_json(command, tmp_path):
    assert command("--strategy", "original", "--quality-tokens", "32").exit_code == 0
    figures = json.loads((tmp_path / "results" / "latency.json").read_text(), parse_constant=pytest.fail)
    assert figures["capacities"][0]["rows"][2]["bits_per_byte_change_standard_error"] is None


def test_lfu_is_called_lfu(command):
    output = command("--strategy", "original", "--eviction", "lfu").output
    assert "LFU" in output
    assert "LRU" not in output


def test_the_help_names_every_policy_phone_and_payload():
    output = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["latency", "--help"]).output
    for name in (*EVICTION_POLICIES, *PROFILES, *PAYLOADS, *RULES):
        assert name in output, name
