"""The relay at a limit of the kernel: it says so once, with the setting, goes on, and serves again afterwards."""

import errno
import socket
from collections.abc import Iterator

import pytest

from gangway.limits import LOCAL_PORTS, WATCHES
from gangway.relay.core import library
from gangway.relay.core.library import End, Note
from lab.waiting import wait_until
from tests.unit.shared_relay import TCP, UDP, SharedRelay, free_descriptors, running_relay


@pytest.fixture
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        yield made


def entrance(relay: SharedRelay, protocol: int) -> tuple[int, socket.socket]:
    """Publish a port; return its number, and the backend."""
    backend = relay.bound(protocol, "127.0.0.1")
    port = relay.use(relay.bound(protocol, "127.0.0.1"))
    relay.publish("127.0.0.1", (port, port), backend)
    return port, backend


def test_shortage_is_logged_again_a_minute_after_the_last_one(relay: SharedRelay) -> None:
    port, server = entrance(relay, TCP)
    with free_descriptors(1):
        sock = socket.socket()
        sock.connect(("127.0.0.1", port))

        def is_logged() -> bool:
            relay.turn()
            return bool(relay.log_lines)

        wait_until(is_logged, "a line in the log")
    assert len(relay.log_lines) == 1
    assert relay.log_lines[0].startswith("new clients wait to be accepted: out of file descriptors: raise ")
    relay.accepted(server)
    sock.close()
    for _ in range(2):
        relay.clock.now_s += 61
        relay.core.report(Note(kind=library.CLIENT_LOST, error=errno.ENOSPC))
    assert len(relay.log_lines) == 3


def test_missing_local_port_is_logged_once(relay: SharedRelay) -> None:
    for _ in range(3):
        note = Note(kind=library.CANNOT_CONNECT, error=errno.EADDRNOTAVAIL, protocol=TCP, end=End.at("172.17.0.2", 80))
        relay.core.report(note)
        relay.clock.now_s += 2
    assert relay.log_lines == [f"cannot connect to tcp 172.17.0.2:80: no local port is free: widen {LOCAL_PORTS}"]


@pytest.mark.parametrize(
    ("kind", "error", "line"),
    [
        (library.CANNOT_CONNECT, errno.ECONNREFUSED, "cannot connect to tcp [fd00::2]:80: Connection refused"),
        (library.CLIENT_LOST, errno.ENOSPC, f"connections are dropped: out of epoll watches: raise {WATCHES}"),
        (library.CLIENT_LOST, errno.EPERM, "cannot open a socket: a connection was dropped: Operation not permitted"),
        (library.NOT_SENT_UP, errno.EMSGSIZE,
         "cannot send a datagram to the container (udp [fd00::2]:80): dropped: Message too long"),
        (library.NOT_SENT_DOWN, errno.EPERM,
         "cannot send a datagram to a client (udp [fd00::2]:80): dropped: Operation not permitted"),
        (library.UDP_CLIENT_LOST, errno.ENOSPC,
         f"new clients of udp [fd00::2]:80 are not relayed: out of epoll watches: raise {WATCHES}"),
        (library.UDP_CLIENT_LOST, errno.EAGAIN,
         "new clients of udp [fd00::2]:80 are not relayed: no local port or IPv6 address is free: "
         f"widen {LOCAL_PORTS}"),
        (library.UDP_CLIENT_LOST, errno.EADDRINUSE,
         "cannot reach udp [fd00::2]:80: cannot answer from port 8080: another program uses it"),
        (library.UNREACHABLE, errno.EHOSTUNREACH, "cannot reach udp [fd00::2]:80: No route to host"),
        (library.UDP_CLIENT_LOST, errno.ENETUNREACH, "cannot reach udp [fd00::2]:80: Network is unreachable"),
    ],
)  # fmt: skip
def test_what_the_library_reports_is_logged(relay: SharedRelay, kind: int, error: int, line: str) -> None:
    protocol = UDP if "udp" in line else TCP
    relay.core.report(Note(kind=kind, error=error, protocol=protocol, end=End.at("fd00::2", 80), host_port=8080))
    assert relay.log_lines == [line]
