"""The runtime folder: what is left of it when the daemon ends."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gangway import runtime
from gangway.daemon.home import Home
from gangway.errors import HostRefused


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def _leave_socket(path: Path) -> int:
    """Leave a socket that no process listens on; return its inode number."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    return path.lstat().st_ino


def _start_and_kill(base: Path, path: Path) -> None:
    """Run a daemon with its socket at `path`, and kill it when it listens."""
    program = (
        "import os, sys; from gangway import runtime; from gangway.daemon.home import Home; "
        "runtime.BASE = sys.argv[1]; Home(sys.argv[2], -1).__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(base), str(path)], check=True)
    assert path.is_socket()


def test_a_killed_daemons_socket_is_replaced_wherever_it_is(base: Path) -> None:
    path = base / "own.sock"
    _start_and_kill(base, path)
    _start_and_kill(base, path)
    with Home(None, -1) as home:
        assert not path.exists()
        assert (home.folder / runtime.API_SOCKET).is_socket()


def test_another_programs_stale_socket_stays(base: Path) -> None:
    path = base / "other.sock"
    inode = _leave_socket(path)
    for _ in range(2):
        with pytest.raises(HostRefused, match="was left by another program: remove it"), Home(str(path), -1):
            pass
        assert path.lstat().st_ino == inode


def test_a_socket_that_another_program_put_in_the_place_of_ours_stays(base: Path) -> None:
    path = base / "own.sock"
    with Home(str(path), -1):
        path.rename(base / "moved")
        inode = _leave_socket(path)
    assert path.lstat().st_ino == inode


@pytest.mark.parametrize("is_abandoned", [False, True])
@pytest.mark.parametrize("has_options", [False, True])
def test_only_an_operators_options_outlive_an_abandoned_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abandoned: bool, has_options: bool
) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Home(None, -1) as home:
        (home.folder / runtime.STATE).touch()
        if has_options:
            (home.folder / runtime.START).touch()
        home.is_abandoned = is_abandoned
    left = {path.name for path in home.folder.iterdir()} if home.folder.exists() else None
    if is_abandoned:
        assert left == ({runtime.START} if has_options else None)
    else:
        assert left == {runtime.LOCK, runtime.STATE} | ({runtime.START} if has_options else set())
