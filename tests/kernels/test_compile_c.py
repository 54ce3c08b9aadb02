"""C compiled when first needed: once for each source, whole or not at all, and refused in words."""

import os
import shutil

import pytest

from cachemoe.kernels import compile_c as module
from cachemoe.kernels.compile_c import compile_c

pytestmark = pytest.mark.skipif(not any(map(shutil.which, module.COMPILERS)), reason="there is no C compiler")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def source(folder, text):
    path = folder / "answer.c"
    path.write_text(text)
    return path


def test_compiled_once_for_each_text(folder, monkeypatch):
    path = source(folder, "int answer(void) { return 42; }")
    assert compile_c(path).answer() == 42
    compile_c.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_run", lambda command: pytest.fail("compiled again"))
        assert compile_c(path).answer() == 42
    source(folder, "int answer(void) { return 43; }")
    compile_c.cache_clear()
    assert compile_c(path).answer() == 43
    assert len(list((folder / "cache").iterdir())) == 2


def test_what_the_compiler_refuses_is_told_and_leaves_nothing(folder):
    with pytest.raises(OSError, match="expected") as caught:
        compile_c(source(folder, "int answer(void) { return 42 }"))
    assert "answer.c" in str(caught.value)
    assert list((folder / "cache").iterdir()) == []


def test_no_compiler(folder, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(OSError, match="no C compiler"):
        compile_c(source(folder, "int answer(void) { return 44; }"))


def test_a_compiler_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(OSError, match="/nowhere/cc"):
        compile_c(source(folder, "int answer(void) { return 45; }"))


@pytest.mark.parametrize("left", [0, 10, 4096, -1, -40])
def test_a_damaged_library_is_made_again_before_it_is_loaded(folder, left):
    """A library that is cut short would end the process when it is loaded."""
    path = source(folder, "int answer(void) { return 46; }")
    assert compile_c(path).answer() == 46
    (library,) = (folder / "cache").iterdir()
    whole = library.read_bytes()
    library.unlink()  # what is loaded stays mapped
    library.write_bytes(whole[:left])
    compile_c.cache_clear()
    assert compile_c(path).answer() == 46
    assert library.read_bytes() == whole


def test_another_library_in_its_place_is_not_loaded(folder, monkeypatch):
    path = source(folder, "int answer(void) { return 47; }")
    compile_c(path)
    (mine,) = (folder / "cache").iterdir()
    source(folder, "int something_else;")
    compile_c.cache_clear()
    compile_c(path)
    (other,) = set((folder / "cache").iterdir()) - {mine}
    mine.unlink()
    mine.write_bytes(other.read_bytes()[: -module.DIGEST_BYTES])  # as any linker writes one
    source(folder, "int answer(void) { return 47; }")
    compile_c.cache_clear()
    assert compile_c(path).answer() == 47


def test_a_command_that_is_none(folder, monkeypatch):
    monkeypatch.setenv("CC", 'cc "unclosed')
    with pytest.raises(OSError, match="CC is no command"):
        compile_c(source(folder, "int answer(void) { return 48; }"))


def test_a_compiler_whose_words_are_not_utf_8(folder, monkeypatch):
    compiler = folder / "cc"
    compiler.write_bytes(b"#!/bin/sh\nprintf '\\377 no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.raises(OSError, match="no such thing"):
        compile_c(source(folder, "int answer(void) { return 49; }"))
