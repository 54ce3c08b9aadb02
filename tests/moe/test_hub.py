"""Checkpoints by folder and by hub id: what is fetched, of which revision, and what a mistyped path is told."""

import json
import shutil
from fnmatch import fnmatch

import pytest

from cachemoe.moe.hub import checkpoint_folder, commit_of
from cachemoe.offload.errors import InputError

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAKEN = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "tokenizer.json",
    "tokenizer.model.v3",
    "spiece.model",
    "vocab.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tool.jinja",
]
LEFT = [
    "pytorch_model.bin",
    "tokenizer.py",
    "modeling_some.py",
    "consolidated.safetensors",
    "original/model.safetensors",
    "README.md",
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository on the hub, whose client copies what the patterns name; and the calls that it has had."""
    monkeypatch.chdir(tmp_path)
    repository, calls = tmp_path / "hub", []
    for name in TAKEN + LEFT:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("")

    def snapshot_download(repo, revision=None, allow_patterns=None, ignore_patterns=()):
        calls.append((repo, revision))
        folder = tmp_path / "cache" / "snapshots" / COMMIT
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            allowed = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if file.is_file() and allowed and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository, calls


def fetched(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_what_transformers_takes_is_fetched_and_no_code(hub):
    folder = checkpoint_folder("somebody/model", "v1.0")
    assert fetched(folder) == sorted(TAKEN)
    assert hub[1] == [("somebody/model", "v1.0")]
    assert commit_of(folder) == COMMIT


def test_of_folders_below_only_what_the_index_names(hub):
    repository, _ = hub
    index = {"weight_map": {"a": "parts/one.safetensors", "b": "parts/run.py", "c": "parts/two.bin"}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    (repository / "parts").mkdir()
    for name in ("one.safetensors", "other.safetensors", "run.py", "two.bin"):
        (repository / "parts" / name).write_text("")
    names = fetched(checkpoint_folder("somebody/model"))
    assert [name for name in names if "/" in name] == ["additional_chat_templates/tool.jinja", "parts/one.safetensors"]


@pytest.mark.parametrize("path", ["absent", "./a/b", "../a", "/a/b", "~/a/b", "a/b/c", "present/absent", "a/b c"])
def test_a_path_that_is_mistyped_does_not_go_to_the_hub(hub, path, tmp_path):
    (tmp_path / "present").mkdir()
    with pytest.raises(InputError, match="there is no checkpoint folder"):
        checkpoint_folder(path)
    assert not hub[1]


def test_an_id_that_the_hub_does_not_give_says_both(monkeypatch):
    def gives_nothing(*_, **__):
        raise OSError("no such repository\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gives_nothing)
    with pytest.raises(InputError, match=r"no folder a/b, and the Hugging Face hub .*: no such repository$"):
        checkpoint_folder("a/b")


def test_a_folder_has_no_revision(hub, tmp_path):
    assert checkpoint_folder(tmp_path) == tmp_path
    assert commit_of(tmp_path) is None
    with pytest.raises(InputError, match="is a folder, which has no revision main"):
        checkpoint_folder(tmp_path, "main")
