"""The commands that compare, as a user types them: that they are there, and how they refuse what cannot be."""

import pytest
from typer.testing import CliRunner

from cachemoe.benchmarks.cli import app
from cachemoe.benchmarks.cli_comparisons import COMMANDS
from cachemoe.moe.checkpoint import TINYMOE

pytest.importorskip("transformers")


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_has_its_help(command):
    result = run(command.__name__.replace("_", "-"), "--help")
    assert result.exit_code == 0
    assert command.__doc__.split(",")[0] in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("swap-overhead", "absent"), "absent is no checkpoint folder"),
        (("swap-overhead", "--json", "."), "it is a folder"),
        (("compare", "absent"), "absent is no checkpoint folder"),
        (("compare", TINYMOE, "--json", "."), "it is a folder"),
        (("first-token", "absent"), "absent is no checkpoint folder"),
        (("first-token", "--json", "."), "it is a folder"),
        (("first-token", TINYMOE, "--pool", "half"), "a pool is a share such as 50%"),
        (("first-token", TINYMOE, "--pool", "100%"), "has room for every expert, and is never cold"),
        (("first-token", TINYMOE, "--prompt", "2049"), "reads 2049 tokens in a row, more than the 2048"),
        (("first-token", TINYMOE, "--format", "int3"), "int3"),
        (("first-token", TINYMOE, "--dense", "int3"), "dense is int8 or int4, or left out, not 'int3'"),
        (("memory-limit", "absent"), "absent is no checkpoint folder"),
        (("memory-limit", TINYMOE, "--pool", "half"), "a pool is a share such as 50%"),
        (("memory-limit", TINYMOE, "--json", "."), "it is a folder"),
        (("verify-cost", "absent"), "no checkpoint folder absent"),
        (("verify-cost", "--pool", "1%"), "must lie between the 4"),
        (("verify-cost", "--json", "."), "it is a folder"),
        (("synthetic", "file"), "file"),
        (("synthetic", "model", "--gigabytes", "nan"), "a checkpoint of nan GB cannot be made"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not to be replaced")
    result = run(*arguments)
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.startswith("cachemoe: ") and words in message
    assert (tmp_path / "file").read_text() == "not to be replaced" and not (tmp_path / "model").exists()
