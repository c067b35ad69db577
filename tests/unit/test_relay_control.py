"""The relay's control socket: who may connect, what ends a connection, and that nothing ends the process."""

import os
import re
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway import __version__
from gangway.errors import InvalidRequest
from gangway.limits import WATCHES
from gangway.relay import protocol
from gangway.relay.control import RETRY_S
from gangway.relay.protocol import (
    CountShared,
    Destination,
    Hello,
    Hold,
    HostPorts,
    Lease,
    List,
    Mode,
    Remove,
    Serve,
)
from tests.unit.relay_doubles import Relay, close_all, fd_count, new_fds, new_socket, no_descriptors_left, relay
from tests.unit.scarce_epoll import ScarceEpoll

__all__ = ["relay"]


WEB = Serve(HostPorts("tcp", "0.0.0.0", 80, 80), Destination("172.17.0.2", 8000), Mode.OWN)
REMOVE_WEB = Remove(WEB.ports)
NOBODY = 65534


def test_hello_is_answered_with_the_version(relay: Relay) -> None:
    daemon = relay.connect()
    assert not relay.control.is_connected()
    assert daemon.ask(Hello(protocol.VERSION)) == f"ok {protocol.VERSION} {__version__}"
    assert (relay.control.is_connected(), len(relay.control), relay.lines) == (True, 1, [])


def test_daemon_of_any_version_is_answered(relay: Relay) -> None:
    """A later one replaces this relay."""
    assert relay.connect().ask(Hello(99)) == f"ok {protocol.VERSION} {__version__}"


@pytest.mark.parametrize("request_", [List(0), CountShared(), REMOVE_WEB, WEB, Hold("redirect", 1)])
def test_first_message_must_be_hello(relay: Relay, request_: protocol.Request) -> None:
    daemon, fds = relay.connect(), new_fds(1)
    before = fd_count()
    assert daemon.ask(request_, *fds) == "error the first message must be hello"
    assert not daemon.is_connected()
    assert relay.lines == ["control connection closed: the first message must be hello"]
    assert (len(relay.control), len(relay.ports), fd_count()) == (0, 0, before - 1), "and its own end is closed"
    close_all(fds)


BAD_MESSAGES = [
    (b"nonsense", r"malformed message b'nonsense'"),
    (b" ", "malformed message b' '"),
    (b"\xff\xfe", "malformed message"),
    (b"serve tcp 0.0.0.0 80 80 172.17.0.2 8000", "malformed message"),
    (b"hello 2 and more", "malformed message"),
    (b"held " + b"x" * protocol.MAX_REQUEST_BYTES, f"message longer than {protocol.MAX_REQUEST_BYTES} bytes"),
]


@pytest.mark.parametrize(("message", "reason"), BAD_MESSAGES)
@pytest.mark.parametrize("greeted", [False, True])
def test_bad_message_ends_its_connection_only(relay: Relay, message: bytes, reason: str, greeted: bool) -> None:
    other, bad = relay.daemon(), relay.daemon() if greeted else relay.connect()
    other.ask(WEB, sock := new_socket().detach())
    os.close(sock)
    fds, before = new_fds(3), fd_count()
    answer = bad.send(message, *fds)
    assert answer.startswith("error ")
    assert reason in answer
    assert relay.lines == [f"control connection closed: {answer.removeprefix('error ')}"]
    assert (bad.is_connected(), len(relay.control), fd_count()) == (False, 1, before - 1)
    assert other.served() == [WEB]
    assert relay.daemon().served() == [WEB]
    close_all(fds)


@given(st.binary(min_size=1, max_size=600), st.booleans(), st.integers(0, 3))
@example(b"hello 1", False, 1)
@example(b"hold redirect 3", True, 3)
def test_any_message_leaves_the_relay_running(message: bytes, greeted: bool, count: int) -> None:
    before = fd_count()
    relay = Relay()
    other, one = relay.daemon(), relay.daemon() if greeted else relay.connect()
    fds = new_fds(count)
    assert one.send(message, *fds) != ""
    assert one.receive() == "", "one answer"
    assert other.ask(List(0)).startswith("ok")
    close_all(fds)
    relay.close()
    assert fd_count() == before


@pytest.mark.parametrize("count", [1, 3])
def test_empty_message_ends_the_connection(relay: Relay, count: int) -> None:
    daemon, fds = relay.daemon(), new_fds(count)
    before = fd_count()
    assert daemon.send(b"", *fds) == ""
    assert (daemon.is_connected(), fd_count()) == (False, before - 1)
    close_all(fds)


@pytest.mark.parametrize("failure", [InvalidRequest("no"), OSError(13, "denied"), ValueError("not a map")])
def test_refused_request_leaves_the_connection(relay: Relay, failure: Exception) -> None:
    daemon, sock = relay.daemon(), new_socket()
    before = fd_count()
    relay.server.failure = failure
    with sock:
        assert daemon.ask(WEB, sock.fileno()) == f"error {failure}"
        assert (daemon.served(), fd_count(), relay.lines) == ([], before, [])
        assert daemon.ask(WEB, sock.fileno()) == "ok"


def test_lease_is_not_for_the_relay(relay: Relay) -> None:
    daemon = relay.daemon()
    assert daemon.ask(Lease("tcp", WEB.to)) == "error the relay does not serve Lease"
    assert daemon.is_connected()


def test_too_many_descriptors_are_refused(relay: Relay) -> None:
    daemon, fds = relay.daemon(), new_fds(protocol.MAX_DESCRIPTORS + 1)
    before = fd_count()
    assert daemon.ask(Hold("redirect", protocol.MAX_DESCRIPTORS), *fds).startswith("error not all descriptors arrived")
    assert (daemon.held("redirect"), fd_count()) == ([], before)
    assert daemon.ask(Hold("redirect", protocol.MAX_DESCRIPTORS), *fds[1:]) == "ok"
    close_all(fds)


@pytest.mark.parametrize(("mode", "spare"), [(Mode.OWN, 0), (Mode.LEASED, 0), (Mode.LEASED, 1)])
def test_request_without_all_its_descriptors_is_refused(relay: Relay, mode: Mode, spare: int) -> None:
    """A leased port without the launcher's pidfd would never end."""
    daemon, sock, launcher = relay.daemon(), new_socket(), os.pidfd_open(os.getpid())
    before, fds = fd_count(), [sock.fileno(), launcher] if mode is Mode.LEASED else [sock.fileno()]
    with no_descriptors_left(spare):
        answer = daemon.ask(WEB._replace(mode=mode), *fds)
    assert answer.startswith("error not all descriptors arrived: the relay has none left")
    assert (daemon.served(), fd_count()) == ([], before)
    assert daemon.ask(WEB._replace(mode=mode), *fds) == "ok"
    sock.close()
    os.close(launcher)


def test_one_daemon_is_answered_without_descriptors_and_others_wait(relay: Relay) -> None:
    first, waiting = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with first, waiting:
        with no_descriptors_left():
            for daemon in (first, waiting):
                daemon.connect(relay.address)
                relay.turn()
            first.send(protocol.encode(Hello(protocol.VERSION)))
            relay.turn()
            relay.now_s += RETRY_S
            relay.turn()
        assert first.recv(100, socket.MSG_DONTWAIT).startswith(b"ok")
        assert len(relay.control) == 1
        assert len(relay.lines) == 1
        assert re.match("the daemon waits to connect: out of file descriptors: raise .*LimitNOFILE=", relay.lines[0])
        relay.turn()
        assert len(relay.control) == 1, "it is not polled meanwhile"
        relay.now_s += RETRY_S
        relay.turn()
        assert len(relay.control) == 2
    relay.turn()


def test_one_daemon_is_answered_without_watches_and_others_wait(relay: Relay) -> None:
    scarce = ScarceEpoll(relay.loop)
    daemon, waiting = relay.daemon(), relay.connect()
    waiting.sock.send(protocol.encode(Hello(protocol.VERSION)))
    relay.turn()
    assert daemon.ask(List(0)) == "ok"
    assert (waiting.receive(), waiting.is_connected()) == ("", True)
    assert relay.lines == [f"the daemon waits for an answer: out of epoll watches: raise {WATCHES}"]
    scarce.left = 1
    relay.now_s += RETRY_S
    relay.turn()
    assert waiting.receive() == f"ok {protocol.VERSION} {__version__}"


def test_spare_is_reserved_again(relay: Relay) -> None:
    scarce = ScarceEpoll(relay.loop)
    daemon = relay.daemon()
    scarce.left = 1
    daemon.close()
    assert scarce.left == 0
    assert relay.daemon().is_connected()


def test_refusal_names_the_limit_that_is_reached(relay: Relay) -> None:
    daemon, fds = relay.daemon(), [new_socket().detach(), os.pidfd_open(os.getpid())]
    before, _ = fd_count(), ScarceEpoll(relay.loop)
    assert daemon.ask(WEB._replace(mode=Mode.LEASED), *fds) == f"error out of epoll watches: raise {WATCHES}"
    assert (daemon.served(), fd_count()) == ([], before)
    close_all(fds)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_users_process_is_refused(relay: Relay) -> None:
    os.seteuid(NOBODY)
    try:
        stranger = relay.connect()
    finally:
        os.seteuid(0)
    assert not stranger.is_connected()
    assert len(relay.control) == 0
    assert relay.lines == ["control connection refused: it is from a process of another user"]
    assert relay.daemon().is_connected()


def test_disconnected_is_called_after_the_last_connection(relay: Relay) -> None:
    first, second, silent = relay.daemon(), relay.daemon(), relay.connect()
    first.close()
    assert (relay.disconnected, relay.control.is_connected()) == (0, True)
    second.close()
    assert (relay.disconnected, relay.control.is_connected(), len(relay.control)) == (0, False, 1)
    silent.close()
    assert (relay.disconnected, len(relay.control)) == (1, 0)


def test_daemon_may_leave_before_its_answer(relay: Relay) -> None:
    daemon, successor = relay.daemon(), relay.daemon()
    with new_socket() as sock:
        daemon.ask(WEB, sock.fileno())
    relay.server.has_connections = True
    assert daemon.ask(REMOVE_WEB) == "", "answered when the port is free"
    daemon.close()
    relay.server.end_connections()
    relay.turn()
    assert (successor.is_connected(), successor.receive(), relay.emptied) == (True, "", 1)


def test_requests_of_one_message_each_are_answered_in_order(relay: Relay) -> None:
    daemon = relay.daemon()
    for message in (b"countshared", b"list 0", b"countshared 1"):
        daemon.sock.send(message)
    relay.turn()
    relay.turn()
    answers = [daemon.receive() for _ in range(3)]
    assert answers == ["ok 0", "ok", "error malformed message b'countshared 1'"]
    assert not daemon.is_connected()
