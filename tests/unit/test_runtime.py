"""The runtime folder: its path and modes."""

import os
import stat
from pathlib import Path

import pytest

from gangway import runtime


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where all runtime folders are; it does not exist yet."""
    monkeypatch.setattr(runtime, "BASE", str(tmp_path / "gangway"))
    return tmp_path / "gangway"


def test_the_folder_is_created_with_its_modes_whatever_the_umask(base: Path) -> None:
    before = os.umask(0o077)
    try:
        path = Path(runtime.create_folder())
    finally:
        os.umask(before)
    assert path.parent == base
    assert stat.S_IMODE(path.stat().st_mode) == runtime.FOLDER_MODE
    assert stat.S_IMODE(base.stat().st_mode) == runtime.BASE_MODE


def test_a_folder_that_exists_is_left_as_it_is(base: Path) -> None:
    path = Path(runtime.create_folder())
    path.chmod(0o700)
    assert runtime.create_folder() == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_the_socket_is_in_the_folder_of_the_namespace(base: Path) -> None:
    assert runtime.default_socket() == f"{runtime.folder()}/gangway.sock"
    assert Path(runtime.folder()).parent == base


def test_without_root_the_folder_is_the_users(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "user"))
    (tmp_path / "user").mkdir()
    own = Path(runtime.create_folder())
    assert own.parent == tmp_path / "user/gangway"
    assert runtime.default_socket() == f"{own}/gangway.sock"
    (base / own.name).mkdir(parents=True)  # root's: only root and a group see what is in it
    assert runtime.folder() == str(own)
    assert runtime.default_socket() == str(base / own.name / "gangway.sock")
    (own / "gangway.sock").touch()
    assert runtime.default_socket() == f"{own}/gangway.sock"


def test_the_socket_for_reading_is_in_the_folder_wherever_the_other_one_is(base: Path, tmp_path: Path) -> None:
    folder = Path(runtime.create_folder())
    assert runtime.read_socket(runtime.default_socket()) == f"{folder}/gangway-ro.sock"
    own, other = tmp_path / "own.sock", base / "netns-1/gangway.sock"
    (folder / "gangway.sock").symlink_to(own)
    assert runtime.read_socket(str(own)) == f"{folder}/gangway-ro.sock"
    assert runtime.read_socket(runtime.default_socket()) == f"{folder}/gangway-ro.sock"
    assert runtime.read_socket(str(other)) == f"{base}/netns-1/gangway-ro.sock"  # another namespace's


def test_a_namespace_without_a_cookie_is_identified_by_its_inode(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_sock: object) -> int:
        raise OSError("Protocol not available")

    monkeypatch.setattr(runtime, "netns_cookie", refuse)
    assert runtime.folder() == f"{base}/netns-inode-{os.stat('/proc/thread-self/ns/net').st_ino}"
