"""The daemon's end of its relay: what is handed over is told again, and comes back; and a relay that ends."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from gangway.relay.kept import PAGE

from gangway.errors import HostRefused
from gangway.reconcile.diff import HostPorts, Target
from gangway.relay.client import Relay
from gangway.relay.settings import Settings
from tests.unit.descriptors import identity
from tests.unit.pretend_relay import Process

RANGE, PORT = HostPorts("tcp", "0.0.0.0", 8000, 8010), HostPorts("udp", "::", 53, 53)
SHARED, OWN = Target("172.30.0.2", 80, True), Target("fd30::2", 5300, False)


@pytest.fixture(autouse=True)
def processes_are_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gangway.relay.client.subprocess.Popen", Process)
    monkeypatch.setattr(Process, "begun", [], raising=False)
    yield
    for process in Process.begun:
        process.end()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay"


@pytest.fixture
def relay(path: Path, processes_are_threads: None) -> Iterator[Relay]:
    made = Relay(path, Settings())
    yield made
    made.close()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made:
        yield made


def some(count: int) -> list[int]:
    return [os.memfd_create(f"number {number}") for number in range(count)]


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def held(relay: Relay, name: str) -> list[int]:
    """What things it holds."""
    fds = relay.held(name)
    found = [identity(fd) for fd in fds]
    close(fds)
    return found


def test_what_is_kept_is_told_as_it_was_handed_over(relay: Relay, sock: socket.socket) -> None:
    relay.keep(RANGE, SHARED, None)
    relay.keep(PORT, OWN, sock)
    assert dict(relay.kept()) == {RANGE: SHARED, PORT: OWN}
    (served,), (port,) = Process.begun[0].pool.served, Process.begun[0].ports
    assert (served.ports.first, served.ports.last, served.backend.port) == (8000, 8010, 80)
    assert (identity(port.sock.fileno()), port.backend.port) == (identity(sock.fileno()), 5300)
    relay.drop(RANGE)
    assert (dict(relay.kept()), served.is_closed) == ({PORT: OWN}, True)


def test_another_daemon_finds_what_is_kept(relay: Relay, path: Path) -> None:
    relay.keep(RANGE, SHARED, None)
    relay.close()
    successor = Relay(path, Settings())
    assert successor.find()
    assert dict(successor.kept()) == {RANGE: SHARED}
    successor.drop(RANGE)
    assert list(successor.kept()) == []
    successor.close()
    assert len(Process.begun) == 1


@pytest.mark.parametrize("count", [0, 1, PAGE, PAGE + 1])
def test_all_that_is_kept_is_told(relay: Relay, count: int) -> None:
    wanted = {HostPorts("tcp", "192.0.2.5", port, port): SHARED for port in range(1, count + 1)}
    for ports, target in wanted.items():
        relay.keep(ports, target, None)
    assert dict(relay.kept()) == wanted


def test_what_is_not_kept_is_dropped_already(relay: Relay) -> None:
    relay.drop(RANGE)
    assert Process.begun == []
    relay.keep(RANGE, SHARED, None)
    relay.drop(RANGE)
    relay.drop(RANGE)


@pytest.mark.parametrize(
    ("ports", "target", "why"),
    [
        (RANGE, SHARED, "is kept already"),
        (HostPorts("tcp", "::", 80, 80), SHARED._replace(is_steered=False), "no socket came with the port"),
        (HostPorts("tcp", "::", 80, 81), SHARED._replace(first=65535), "not understood"),
    ],
)
def test_what_the_relay_refuses_is_told(relay: Relay, ports: HostPorts, target: Target, why: str) -> None:
    relay.keep(RANGE, SHARED, None)
    with pytest.raises(HostRefused, match=why):
        relay.keep(ports, target, None)
    assert dict(relay.kept()) == {RANGE: SHARED}


def test_what_is_held_is_held_by_the_next_one_too(relay: Relay) -> None:
    one, other = some(2), some(1)
    relay.hold("one", one)
    relay.hold("other", other)
    assert held(relay, "one") == [], "nobody has needed a relay yet"
    for number in range(2):
        relay.keep(HostPorts("tcp", "::", 80, 80), SHARED, None)
        assert (held(relay, "one"), held(relay, "other")) == (list(map(identity, one)), [identity(other[0])])
        assert held(relay, "another") == []
        Process.begun[number].end()
    with pytest.raises(HostRefused, match="does not answer"):
        relay.hold("one", ())
    relay.hold("other", ())
    close(one)
    close(other)
    relay.keep(RANGE, SHARED, None)
    assert (held(relay, "one"), held(relay, "other")) == ([], []), "the next one has what was to be held last"


def test_what_is_shared_is_shared_with_this_one_only(relay: Relay, sock: socket.socket) -> None:
    assert relay.shared_count() == 0
    relay.keep(RANGE, SHARED, None)
    assert relay.shared_count() == 0
    binding = some(1)
    relay.share("udp", 6, [sock.fileno(), *binding])
    assert relay.shared_count() == 1
    relay.share("tcp", 4, [sock.fileno()])
    relay.share("tcp", 4, [sock.fileno()])
    assert relay.shared_count() == 2
    pool = Process.begun[0].pool
    assert {identity(one.fileno()) for one in pool.socks.values()} == {identity(sock.fileno())}
    assert list(pool.bindings.values()) == [identity(binding[0])]
    Process.begun[0].end()
    assert not relay.is_running()
    assert relay.shared_count() == 0
    relay.keep(RANGE, SHARED, None)
    assert relay.shared_count() == 0
    close(binding)


def test_another_daemon_learns_how_many_sockets_are_shared(relay: Relay, path: Path, sock: socket.socket) -> None:
    relay.keep(RANGE, SHARED, None)
    for family in (4, 6):
        relay.share("tcp", family, [sock.fileno()])
    relay.close()
    successor = Relay(path, Settings())
    assert successor.shared_count() == 0, "it knows of no relay yet"
    assert successor.find()
    assert successor.shared_count() == 2
    successor.close()


def test_without_a_relay_nothing_is_shared_or_held(relay: Relay, sock: socket.socket) -> None:
    with pytest.raises(HostRefused, match="the relay is gone"):
        relay.share("tcp", 4, [sock.fileno()])
    assert (held(relay, "some"), list(relay.kept())) == ([], [])


def test_a_relay_that_has_ended_is_noticed_and_begun_anew(relay: Relay) -> None:
    assert relay.is_running(), "nobody has needed one yet"
    relay.keep(RANGE, SHARED, None)
    assert (relay.is_running(), relay.fileno() is not None) == (True, True)
    Process.begun[0].end()
    assert (relay.is_running(), relay.fileno()) == (False, None)
    relay.drop(RANGE)
    relay.keep(PORT, SHARED, None)
    assert (relay.is_running(), dict(relay.kept()), len(Process.begun)) == (True, {PORT: SHARED}, 2)


def test_one_that_nobody_needs_any_more_is_not_missed(relay: Relay, path: Path) -> None:
    relay.keep(RANGE, SHARED, None)
    relay.end()
    assert (relay.is_running(), relay.fileno(), path.exists()) == (True, None, False)
    assert relay.shared_count() == 0
    relay.keep(RANGE, SHARED, None)
    assert len(Process.begun) == 2
