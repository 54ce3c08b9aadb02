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
