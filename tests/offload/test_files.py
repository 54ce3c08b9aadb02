"""Files that are whole or not there, whoever else writes them, and whatever lies in their way."""

import os
import subprocess
import sys
import threading

import pytest

from cachemoe.offload.errors import InputError
from cachemoe.offload.files import remove_orphans, whole_file


def write(path, text):
    with whole_file(path) as partial:
        partial.write_text(text)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_file_appears_whole_and_replaces_another(tmp_path):
    path = tmp_path / "below" / "file"
    with whole_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    write(path, "second")
    assert path.read_text() == "second"
    assert names(path.parent) == ["file"]


def test_a_failure_leaves_what_was_there(tmp_path):
    write(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file") as partial:
        partial.write_text("half of the n")
        raise ZeroDivisionError
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_threads_write_one_after_the_other(tmp_path):
    texts = [str(i) * 100_000 for i in range(8)]
    inside, most = [], []

    def work(text):
        with whole_file(tmp_path / "file") as partial:
            inside.append(text)
            most.append(len(inside))
            partial.write_text(text)
            inside.pop()

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert max(most) == 1
    assert (tmp_path / "file").read_text() in texts
    assert names(tmp_path) == ["file"]


def test_a_process_that_was_killed_leaves_nothing_in_the_way(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from cachemoe.offload.files import remove_orphans, whole_file\n"
        "with whole_file(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('a longer text than the next'); print(flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    assert names(tmp_path) == ["file.partial"]
    write(tmp_path / "file", "short")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "short"


@pytest.mark.parametrize("plant", ["symlink", "hard link", "fifo", "folder"])
def test_what_somebody_put_in_the_way_is_not_written(tmp_path, plant):
    """A link would send the writing to a file of this user's own."""
    mine, partial = tmp_path / "mine", tmp_path / "file.partial"
    mine.write_text("mine")
    if plant == "symlink":
        partial.symlink_to(mine)
    elif plant == "hard link":
        os.link(mine, partial)
    elif plant == "fifo":
        os.mkfifo(partial)
    else:
        partial.mkdir()
    with pytest.raises((InputError, IsADirectoryError)):
        write(tmp_path / "file", "text")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "file").exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("cachemoe.offload.files.fcntl.flock", refuses)
    with pytest.raises(InputError, match=r"has no locks \(Function not implemented\)"):
        write(tmp_path / "file", "text")
    assert not (tmp_path / "file").exists()
    assert names(tmp_path) == []
    (tmp_path / "file.partial").write_text("another's")
    with pytest.raises(InputError, match="has no locks"):
        write(tmp_path / "file", "text")
    assert (tmp_path / "file.partial").read_text() == "another's"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cachemoe.offload.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", "text")
    assert names(tmp_path) == []


def test_orphans_are_removed_and_files_in_use_are_not(tmp_path):
    (tmp_path / "orphan.safetensors.partial").write_text("half")
    (tmp_path / "another.partial").write_text("of another kind")
    (tmp_path / "target").write_text("behind a link")
    (tmp_path / "link.safetensors.partial").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo.safetensors.partial")
    (tmp_path / "folder.safetensors.partial").mkdir()
    with whole_file(tmp_path / "used.safetensors") as partial:
        partial.write_text("whole")
        remove_orphans(tmp_path, "*.safetensors")
    assert (tmp_path / "used.safetensors").read_text() == "whole"
    assert (tmp_path / "target").exists()
    assert not (tmp_path / "orphan.safetensors.partial").exists()
    assert (tmp_path / "another.partial").exists()
    remove_orphans(tmp_path / "none", "*.safetensors")


def test_a_partial_file_that_somebody_replaced_is_not_published(tmp_path):
    with pytest.raises(InputError, match="was removed or replaced"), whole_file(tmp_path / "file") as partial:
        partial.unlink()
        partial.write_text("half of another's")
    assert not (tmp_path / "file").exists()


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no file, and is not replaced"):
        write(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()
