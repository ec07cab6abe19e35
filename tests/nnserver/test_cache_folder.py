"""refuse_shared_cache: a folder of compiled code that others can write to is not used."""

import os
import re

import pytest

from nnserver.app import refuse_shared_cache
from nnserver.errors import ConfigError


@pytest.fixture
def home(tmp_path):
    """A folder that only this user can write to."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    return folder


def make(path, mode):
    path.mkdir()
    path.chmod(mode)  # mkdir's own mode is cut by the umask
    return path


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        refuse_shared_cache(folder)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500])
def test_a_folder_of_ones_own_is_used(home, mode):
    """Others may read it; nobody but its owner may write."""
    refuse_shared_cache(make(home / "nncore", mode))


def test_a_folder_that_is_yet_to_be_made_is_used(home):
    """It will be made for this user alone, with the folders above it."""
    refuse_shared_cache(home / "not" / "yet" / "nncore")


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(home, mode):
    """The error names the folder, the reason and what to do."""
    folder = make(home / "nncore", mode)
    assert refusal(folder) == (
        f"the folder of compiled kernels {folder} is not safe: others can write to {folder}; "
        f"run `chmod go-w {folder}`, or set NNCORE_CACHE_DIR to a folder of your own"
    )


def test_a_folder_below_one_that_others_can_write_to_is_refused(home):
    """Who can rename the folder can put another in its place."""
    shared = make(home / "shared", 0o777)
    assert f"others can write to {shared};" in refusal(make(shared / "nncore", 0o700))
    assert f"others can write to {shared};" in refusal(shared / "not" / "yet")


def test_a_sticky_folder_above_is_as_good_as_none(home):
    """In a folder like /tmp nobody can rename what is ours."""
    refuse_shared_cache(make(make(home / "tmp", 0o1777) / "nncore", 0o700))


def test_a_sticky_folder_is_not_the_cache_itself(home):
    """In a folder like /tmp anybody can add a file: as the cache it is refused."""
    folder = make(home / "tmp", 0o1777)
    assert f"others can write to {folder};" in refusal(folder)


def test_a_link_is_as_safe_as_what_it_leads_to(home):
    """Both the folders above a link and those above its target are looked at."""
    shared = make(home / "shared", 0o777)
    make(shared / "nncore", 0o700)
    (home / "link").symlink_to(shared / "nncore")
    assert f"others can write to {shared};" in refusal(home / "link")
    own = make(home / "own", 0o700)
    (shared / "link").symlink_to(own)
    assert f"others can write to {shared};" in refusal(shared / "link")
    (home / "good").symlink_to(own)
    refuse_shared_cache(home / "good")


def test_a_folder_that_cannot_be_reached_is_no_danger(home):
    """Nothing can be loaded by way of a file: the server starts, and nncore compiles without a cache."""
    file = home / "file"
    file.write_text("")
    refuse_shared_cache(file / "nncore")


def test_a_folder_of_another_user_is_refused(home, monkeypatch):
    """Whoever owns the folder can write to it, whatever its mode."""
    folder = make(home / "nncore", 0o700)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        home.chmod(0o755)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert re.fullmatch(
        rf"the folder of compiled kernels {folder} is not safe: \S+ belongs to another user; "
        "set NNCORE_CACHE_DIR to a folder of your own",
        refusal(folder),
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of root's")
def test_roots_folder_is_trusted(home, monkeypatch):
    """Root can write everywhere anyway: what root has made is used by other users."""
    folder = make(home / "nncore", 0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    refuse_shared_cache(folder)
