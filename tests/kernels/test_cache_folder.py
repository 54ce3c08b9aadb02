"""The cache directory: this user's alone, or a folder of its own in one that is shared."""

import os

import pytest

from cachemoe.kernels.cache_folder import cache_directory, make_folder

OTHER = 65534


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHEMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_asking_makes_nothing(folder):
    assert cache_directory() == folder
    assert not folder.exists()


def test_a_folder_that_is_made_is_private_whatever_the_umask(folder):
    before = os.umask(0)
    try:
        make_folder(folder / "below")
    finally:
        os.umask(before)
    assert [part.stat().st_mode & 0o777 for part in (folder, folder / "below")] == [0o755, 0o755]
    assert cache_directory() == folder


@pytest.mark.parametrize("mode", [0o1777, 0o1775])
def test_in_a_shared_folder_it_is_one_of_this_users_own(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    own = folder / f"user-{os.geteuid()}"
    assert cache_directory() == own
    make_folder(own)
    assert cache_directory() == own
    own.chmod(0o777)
    with pytest.raises(OSError, match="not a folder of yours alone"):
        cache_directory()


def test_where_others_can_replace_it_it_is_refused(folder):
    folder.mkdir()
    folder.chmod(0o777)  # not sticky: who may write may rename what others own
    with pytest.raises(OSError, match="others can replace"):
        cache_directory()


def test_a_planted_link_is_not_followed(folder, tmp_path):
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / f"user-{os.geteuid()}").symlink_to(tmp_path)
    with pytest.raises(OSError, match="not a folder of yours alone"):
        cache_directory()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("planted", [False, True])
def test_a_folder_of_somebody_else_is_refused(folder, planted):
    folder.mkdir()
    if planted:
        folder.chmod(0o1777)
        (folder / f"user-{os.geteuid()}").mkdir()
        os.chown(folder / f"user-{os.geteuid()}", OTHER, OTHER)
    else:
        os.chown(folder, OTHER, OTHER)
    with pytest.raises(OSError, match="set CACHEMOE_CACHE to"):
        cache_directory()


def test_no_home(monkeypatch):
    for name in ("CACHEMOE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def missing():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("cachemoe.kernels.cache_folder.Path.home", missing)
    with pytest.raises(OSError, match="no home directory: set CACHEMOE_CACHE"):
        cache_directory()


def test_a_file_in_its_place(folder):
    folder.write_text("")
    with pytest.raises(OSError, match="is no folder"):
        cache_directory()
