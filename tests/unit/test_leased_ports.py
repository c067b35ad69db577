"""Ports that end with a launcher's process: the daemon removes them, or the relay itself if no daemon is connected."""

import socket
from collections.abc import Iterator

import pytest

from gangway.relay import protocol
from gangway.relay.protocol import Destination, Hold, HostPorts, Mode, Remove, Serve
from tests.unit.relay_doubles import Launcher, Relay, close_all, fd_count, inodes, new_fds, new_socket, relay

__all__ = ["relay"]

PORT = HostPorts("tcp", "0.0.0.0", 80, 80)
LEASED = Serve(PORT, Destination("172.17.0.2", 8000), Mode.LEASED)
REMOVED = "tcp 0.0.0.0 80 80: launcher exited while no daemon is running: loopback redirect ended"


@pytest.fixture
def sock(relay: Relay) -> Iterator[socket.socket]:
    with new_socket() as made:
        yield made


@pytest.fixture
def launcher(relay: Relay) -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


def test_daemon_removes_the_port_of_an_exited_launcher(relay: Relay, sock: socket.socket, launcher: Launcher) -> None:
    before = fd_count()
    daemon = relay.daemon()
    daemon.ask(LEASED, sock.fileno(), launcher.pidfd)
    launcher.exit()
    relay.turn()
    assert (daemon.served(), relay.lines) == ([LEASED._replace(mode=Mode.ENDED)], [])
    assert daemon.ask(Remove(PORT)) == "ok"
    daemon.close()
    assert (relay.lines, fd_count()) == ([], before)


@pytest.mark.parametrize("exits_first", ["launcher", "daemon"])
def test_port_of_an_exited_launcher_ends_without_a_daemon(
    relay: Relay, sock: socket.socket, launcher: Launcher, exits_first: str
) -> None:
    """The redirect ends, too: the relay cannot delete its entries."""
    fds, before = new_fds(3), fd_count()
    first, second = relay.daemon(), relay.daemon()
    first.ask(LEASED, sock.fileno(), launcher.pidfd)
    first.ask(Hold(protocol.REDIRECT, 2), *fds[:2])
    first.ask(Hold("steering", 1), fds[2])
    first.close()
    if exits_first == "launcher":
        launcher.exit()
        relay.turn()
    assert (len(relay.ports), relay.lines) == (1, [])
    second.close()
    assert (len(relay.ports), relay.lines) == ((0, [REMOVED]) if exits_first == "launcher" else (1, []))
    launcher.exit()
    relay.turn()
    assert (len(relay.ports), relay.lines, relay.emptied) == (0, [REMOVED], 1)
    assert fd_count() == before + 1
    successor = relay.daemon()
    assert (successor.held(protocol.REDIRECT), successor.held("steering")) == ([], inodes(fds[2:]))
    close_all(fds)


def test_connection_without_hello_is_no_daemon(relay: Relay, sock: socket.socket, launcher: Launcher) -> None:
    daemon, _silent = relay.daemon(), relay.connect()
    daemon.ask(LEASED, sock.fileno(), launcher.pidfd)
    daemon.close()
    launcher.exit()
    relay.turn()
    assert (len(relay.ports), relay.lines) == (0, [REMOVED])


def test_launcher_that_has_exited_already(relay: Relay, sock: socket.socket, launcher: Launcher) -> None:
    launcher.exit()
    daemon = relay.daemon()
    assert daemon.ask(LEASED, sock.fileno(), launcher.pidfd) == "ok"
    daemon.close()
    assert (len(relay.ports), relay.lines) == (0, [REMOVED])


def test_lease_without_a_pidfd_stays(relay: Relay, sock: socket.socket) -> None:
    daemon = relay.daemon()
    assert daemon.ask(LEASED, sock.fileno()) == "ok"
    daemon.close()
    assert (len(relay.ports), relay.lines) == (1, [])


@pytest.mark.parametrize("exits", ["before", "after", "never"])
def test_lease_that_is_granted_again_has_a_new_owner(
    relay: Relay, sock: socket.socket, launcher: Launcher, exits: str
) -> None:
    successor = Launcher()
    daemon, next_daemon = relay.daemon(), relay.daemon()
    daemon.ask(LEASED, sock.fileno(), launcher.pidfd)
    if exits == "before":
        launcher.exit()
        relay.turn()
    before = fd_count()
    with new_socket() as other:
        assert next_daemon.ask(LEASED, other.fileno(), successor.pidfd) == "ok"
    assert fd_count() == before
    if exits == "after":
        launcher.exit()
        relay.turn()
    daemon.close()
    next_daemon.close()
    assert [inodes([port.socks[0].fileno()]) for port in relay.server.ports] == [inodes([sock.fileno()])]
    assert (len(relay.ports), relay.lines) == (1, []), "and connections go on"
    successor.exit()
    relay.turn()
    assert (len(relay.ports), relay.lines) == (0, [REMOVED])
    successor.close()


def test_lease_that_is_granted_again_without_a_pidfd(relay: Relay, sock: socket.socket, launcher: Launcher) -> None:
    daemon = relay.daemon()
    daemon.ask(LEASED, sock.fileno(), launcher.pidfd)
    before = fd_count()
    assert daemon.ask(LEASED, sock.fileno()) == "ok"
    assert fd_count() == before - 1
    launcher.exit()
    daemon.close()
    assert (len(relay.ports), relay.lines) == (1, [])


def test_old_event_does_not_end_a_new_lease(relay: Relay, sock: socket.socket, launcher: Launcher) -> None:
    """The launcher of a removed port exits just as the next lease comes, whose pidfd could have the same number."""
    other, first, second = Launcher(), relay.daemon(), relay.daemon()
    first.ask(LEASED, sock.fileno(), launcher.pidfd)
    first.sock.send(protocol.encode(Remove(PORT)))
    successor = LEASED._replace(ports=PORT._replace(first=81, last=81))
    socket.send_fds(second.sock, [protocol.encode(successor)], [sock.fileno(), other.pidfd])
    launcher.exit()
    relay.turn()
    assert (first.receive(), second.receive()) == ("ok", "ok")
    first.close()
    assert second.served() == [successor]
    second.close()
    assert (len(relay.ports), relay.lines) == (1, [])
    other.close()
