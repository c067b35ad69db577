"""What a service manager is told, with a socket of its own."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangway.daemon import supervisor


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def test_states_arrive(manager: socket.socket) -> None:
    supervisor.notify(supervisor.READY, "STATUS=serving")
    assert manager.recv(4096) == b"READY=1\nSTATUS=serving"
    assert supervisor.is_supervised()
    supervisor.notify(supervisor.reloading())
    kind, _, time = manager.recv(4096).decode().partition("\n")
    assert (kind, time.partition("=")[0]) == ("RELOADING=1", "MONOTONIC_USEC")
    assert int(time.partition("=")[2]) > 0


def test_the_name_of_an_abstract_socket_begins_with_an_at(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"gw-test-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        supervisor.notify(supervisor.READY)
        assert sock.recv(4096) == b"READY=1"


def test_nobody_has_to_listen(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    manager.close()
    supervisor.notify(supervisor.READY)
    monkeypatch.delenv("NOTIFY_SOCKET")
    supervisor.notify(supervisor.READY)
    assert not supervisor.is_supervised()


@pytest.mark.parametrize(
    ("interval", "pid", "seconds"),
    [("30000000", None, 15.0), ("30000000", "own", 15.0), ("30000000", "1", None), ("", None, None)],
)
def test_the_watchdog_is_told_twice_in_its_interval(
    interval: str, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", interval)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert supervisor.watchdog_s() == seconds


def test_a_stored_socket_replaces_the_one_of_its_name(manager: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        supervisor.store("api", listener)
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=api"
        text, fds, _, _ = socket.recv_fds(manager, 4096, 2)
        assert text == b"FDSTORE=1\nFDNAME=api"
        with socket.socket(fileno=fds[0]) as stored:
            assert stored.getsockname() == listener.getsockname()
