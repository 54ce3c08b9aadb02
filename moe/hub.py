"""Where a checkpoint is: a folder, or a Hugging Face hub id, of which everything that transformers takes is fetched."""

import os
import re
from pathlib import Path
from textwrap import shorten

from cachemoe.moe.shards import INDEX
from cachemoe.offload.errors import InputError
from cachemoe.offload.header import read_json

# Everything beside the weights, in any folder: configs, tokenizers, chat templates.
BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*"]
NEVER = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle"]  # code, and what can hold it


def checkpoint_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """The checkpoint's folder; of a hub id, what it has in the hub's cache, fetched if need be.

    Only a text with one slash, whose first part is no folder here, is taken for a hub id: a mistyped path is not.

    Args:
        revision: branch, tag or commit of the hub's repository; None: its main branch.

    Raises:
        InputError: if there is neither, or a revision of a folder is asked for.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"a checkpoint is a folder or a hub id, and not {shorten(repr(path), 80)}")
    text = os.path.expanduser(path)
    folder = Path(text)
    if os.path.exists(folder):
        if revision is not None:
            raise InputError(f"{path} is a folder, which has no revision {revision}: leave it out, or give a hub id")
        return folder
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text, re.ASCII) or os.path.exists(folder.parent):
        raise InputError(f"there is no checkpoint folder {shorten(str(path), 300)}, and a hub id is OWNER/NAME")
    import huggingface_hub

    def fetch(names: list[str], never: list[str]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(text, revision=revision, allow_patterns=names, ignore_patterns=never)
        )

    try:
        folder = fetch([*BESIDE_WEIGHTS, "*.safetensors"], [*NEVER, "*/*.safetensors", "consolidated*"])
        shards = _shards(folder)
        if any("/" in name for name in shards):  # of the folders below, what the index names and nothing else
            folder = fetch([*BESIDE_WEIGHTS, *shards], NEVER)
    except Exception as error:  # of many kinds: no network, no such model, no right to it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"there is no folder {shorten(str(path), 200)}, and the Hugging Face hub does not give a model of that "
            f"name: {shorten(reason, 200)}"
        ) from error
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of the hub's repository that a folder of the hub's cache is of; None of any other folder."""
    folder = folder.resolve()
    found = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
    return folder.name if found else None


def _shards(folder: Path) -> set[str]:
    """The files that an index names; of one that is damaged, which ``Shards`` refuses, none."""
    try:
        return {str(name) for name in read_json(folder / INDEX)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
