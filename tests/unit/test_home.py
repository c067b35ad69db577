"""The runtime folder: what is left of it when the daemon ends, and what the next one gets."""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gangway import runtime
from gangway.daemon import supervisor
from gangway.daemon.home import Home
from gangway.errors import Conflict, HostRefused


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
        "runtime.BASE = sys.argv[1]; Home(sys.argv[2], (-1, -1)).__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", program, str(base), str(path)], check=True)
    assert path.is_socket()


def test_a_killed_daemons_socket_is_replaced_wherever_it_is(base: Path) -> None:
    path = base / "own.sock"
    _start_and_kill(base, path)
    _start_and_kill(base, path)
    with Home(None, (-1, -1)) as home:
        assert not path.exists()
        assert (home.folder / runtime.API_SOCKET).is_socket()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_clients_find_the_socket_for_reading(base: Path, elsewhere: bool) -> None:
    with Home(str(base / "own.sock") if elsewhere else None, (-1, -1)) as home:
        for path in (str(home.api_path), runtime.default_socket()):
            assert Path(runtime.read_socket(path)).samefile(home.read_path)


def test_another_programs_stale_socket_stays(base: Path) -> None:
    path = base / "other.sock"
    inode = _leave_socket(path)
    for _ in range(2):
        with pytest.raises(HostRefused, match="was left by another program: remove it"), Home(str(path), (-1, -1)):
            pass
        assert path.lstat().st_ino == inode


def test_a_socket_that_another_program_put_in_the_place_of_ours_stays(base: Path) -> None:
    path = base / "own.sock"
    with Home(str(path), (-1, -1)):
        path.rename(base / "moved")
        inode = _leave_socket(path)
    assert path.lstat().st_ino == inode


@pytest.mark.parametrize("record", ["", "7 /run/a.sock\n1 2\n"])
def test_daemon_that_has_yet_to_say_what_it_is_is_waited_for(
    base: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    """It may be one on demand, which gives way; `record` is what it has written."""
    folder = Path(runtime.folder())
    folder.mkdir(parents=True)
    with open(folder / runtime.LOCK, "w+") as lock:
        lock.write(record)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr("gangway.daemon.home.time.sleep", lambda _s: fcntl.flock(lock, fcntl.LOCK_UN))
        if record:
            with pytest.raises(Conflict, match=r"a daemon \(pid 7, socket /run/a.sock\) already manages"):
                Home(None, (-1, -1)).__enter__()
        else:
            with Home(None, (-1, -1)) as home:
                assert home.api_path.is_socket()


@pytest.mark.parametrize("is_abandoned", [False, True])
@pytest.mark.parametrize("has_options", [False, True])
def test_only_an_operators_options_outlive_an_abandoned_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abandoned: bool, has_options: bool
) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Home(None, (-1, -1)) as home:
        (home.folder / runtime.STATE).touch()
        if has_options:
            (home.folder / runtime.START).touch()
        home.is_abandoned = is_abandoned
    left = {path.name for path in home.folder.iterdir()} if home.folder.exists() else None
    if is_abandoned:
        assert left == ({runtime.START} if has_options else None)
    else:
        assert left == {runtime.LOCK, runtime.STATE} | ({runtime.START} if has_options else set())


class Manager:
    """A service manager that keeps the sockets that a daemon stores, and passes them to the next one."""

    def __init__(self, sock: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
        self._sock, self._monkeypatch = sock, monkeypatch
        self.kept: dict[str, socket.socket] = {}

    def read(self) -> list[str]:
        """Keep what the daemon has stored since the last call, and return the names."""
        names = []
        with suppress(BlockingIOError):
            while True:
                text, fds, _, _ = socket.recv_fds(self._sock, 4096, 1)
                name = text.decode().partition("FDNAME=")[2]
                if name in self.kept:
                    self.kept.pop(name).close()
                if fds:
                    names.append(name)
                    self.kept[name] = socket.socket(fileno=fds[0])
        return names

    def pass_on(self) -> None:
        """Pass all sockets to this process."""
        first = 500  # the kernel gives out the lowest numbers, and these are free
        for number, sock in enumerate(self.kept.values(), first):
            os.dup2(sock.fileno(), number)
        self._monkeypatch.setattr(supervisor, "_FIRST_FD", first)
        for name, value in (("PID", os.getpid()), ("FDS", len(self.kept)), ("FDNAMES", ":".join(self.kept))):
            self._monkeypatch.setenv(f"LISTEN_{name}", str(value))


@pytest.fixture
def manager(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(base / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(base / "notify"))
        made = Manager(sock, monkeypatch)
        yield made
        for kept in made.kept.values():
            kept.close()


def _client(path: Path, kind: int) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, kind)
    client.connect(str(path))
    return client


@pytest.mark.parametrize("elsewhere", [False, True])
def test_clients_wait_while_a_service_is_restarted(manager: Manager, base: Path, elsewhere: bool) -> None:
    path = str(base / "own.sock") if elsewhere else None
    with Home(path, (-1, -1)) as home:
        assert manager.read() == ["api", "reading", "leases"]
    with (
        _client(home.folder / runtime.API_SOCKET, socket.SOCK_STREAM) as client,
        _client(home.lease_path, socket.SOCK_SEQPACKET) as launcher,
    ):
        client.send(b"request")
        launcher.send(b"lease")
        manager.pass_on()
        with Home(path, (-1, -1)) as home, home.api.accept()[0] as api, home.leases.accept()[0] as lease:
            assert (api.recv(100), lease.recv(100)) == (b"request", b"lease")
            assert not os.get_inheritable(home.api.fileno())
        assert manager.read() == []


def test_a_socket_that_a_daemon_listens_at_no_more_is_removed(manager: Manager, base: Path) -> None:
    with Home(str(base / "own.sock"), (-1, -1)):
        manager.read()
    manager.pass_on()
    with Home(None, (-1, -1)) as home:
        assert manager.read() == ["api"]
        assert not (base / "own.sock").exists()
        _client(home.api_path, socket.SOCK_STREAM).close()


def test_a_socket_whose_file_was_deleted_is_made_again(manager: Manager) -> None:
    with Home(None, (-1, -1)) as home:
        manager.read()
    home.lease_path.unlink()
    manager.pass_on()
    with Home(None, (-1, -1)) as home:
        assert manager.read() == ["leases"]
        _client(home.lease_path, socket.SOCK_SEQPACKET).close()


def test_the_sockets_of_a_socket_unit_are_used(manager: Manager, base: Path) -> None:
    path = Path(runtime.create_folder(), runtime.API_SOCKET)
    with socket.socket(socket.AF_UNIX) as listener, socket.create_server(("127.0.0.1", 0)) as other:
        listener.bind(str(path))
        listener.listen()
        with _client(path, socket.SOCK_STREAM) as client:
            client.send(b"request")
            manager.kept = {"gangway.socket": listener, "other.socket": other}
            manager.pass_on()
            with Home(None, (-1, -1)) as home, home.api.accept()[0] as api:
                assert api.recv(100) == b"request"
    assert path.is_socket()


@pytest.mark.parametrize("is_passed", [False, True])
def test_nothing_is_kept_after_everything_was_removed(manager: Manager, is_passed: bool) -> None:
    if is_passed:
        with Home(None, (-1, -1)):
            manager.read()
        manager.pass_on()
    with Home(None, (-1, -1)) as home:
        manager.read()
        (home.folder / runtime.START).touch()
        home.is_abandoned = True
        home.leave_for_good()
    manager.read()
    assert manager.kept == {}
    assert not home.folder.exists()
