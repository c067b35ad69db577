"""The relay at a limit of the kernel: it says so once, with the setting, goes on, and serves again afterwards."""

import errno
import socket
from collections.abc import Iterator

import pytest

from gangway.limits import LOCAL_PORTS, WATCHES
from gangway.relay.core import library
from gangway.relay.core.library import End, Note
from lab.waiting import wait_until
from tests.unit.scarce_epoll import ScarceEpoll
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
        relay.streams.report(Note(kind=library.CLIENT_LOST, error=errno.ENOSPC))
    assert len(relay.log_lines) == 3


def test_udp_client_without_a_watch_is_served_later(relay: SharedRelay) -> None:
    port, server = entrance(relay, UDP)
    client = relay.bound(UDP, "127.0.0.1")
    scarce = ScarceEpoll(relay.loop)
    for _ in range(3):
        client.sendto(b"lost", ("127.0.0.1", port))
        relay.turn()
    assert not relay.datagrams.clients
    at = f"udp 127.0.0.1:{server.getsockname()[1]}"
    assert relay.log_lines == [f"new clients of {at} are not relayed: out of epoll watches: raise {WATCHES}"]
    scarce.left = 1
    client.sendto(b"served", ("127.0.0.1", port))
    data, address = relay.receive(server)
    assert data == b"served"
    server.sendto(b"answer", address)
    assert relay.receive(client) == (b"answer", ("127.0.0.1", port))


def test_missing_local_port_is_logged_once(relay: SharedRelay) -> None:
    for _ in range(3):
        note = Note(kind=library.CANNOT_CONNECT, error=errno.EADDRNOTAVAIL, protocol=TCP, end=End.at("172.17.0.2", 80))
        relay.streams.report(note)
        relay.clock.now_s += 2
    assert relay.log_lines == [f"cannot connect to tcp 172.17.0.2:80: no local port is free: widen {LOCAL_PORTS}"]


@pytest.mark.parametrize(
    ("kind", "error", "line"),
    [
        (library.CANNOT_CONNECT, errno.ECONNREFUSED, "cannot connect to tcp [fd00::2]:80: Connection refused"),
        (library.CLIENT_LOST, errno.ENOSPC, f"connections are dropped: out of epoll watches: raise {WATCHES}"),
        (library.CLIENT_LOST, errno.EPERM, "cannot open a socket: a connection was dropped: Operation not permitted"),
    ],
)
def test_what_the_library_reports_is_logged(relay: SharedRelay, kind: int, error: int, line: str) -> None:
    relay.streams.report(Note(kind=kind, error=error, protocol=TCP, end=End.at("fd00::2", 80)))
    assert relay.log_lines == [line]
