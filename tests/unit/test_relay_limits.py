"""The relay at a limit of the kernel: it says so once, with the setting, goes on, and serves again afterwards."""

import errno
import socket
from collections.abc import Iterator

import pytest

from gangway.limits import LOCAL_PORTS, WATCHES
from gangway.relay.core.listener import accept
from gangway.relay.core.stream import RETRY_S, StreamPort
from gangway.relay.sockets import Backend
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


def test_without_watches_other_clients_wait(relay: SharedRelay) -> None:
    port, server = entrance(relay, TCP)
    scarce = ScarceEpoll(relay.loop)
    clients = [relay.client("127.0.0.1", port) for _ in range(4)]
    for _ in range(10):
        relay.turn()
    with pytest.raises(ConnectionResetError):
        clients[0].recv(1)
    assert not relay.streams.flows
    assert relay.log_lines == [f"connections are dropped: out of epoll watches: raise {WATCHES}"]
    scarce.left = 100
    relay.clock.now_s += RETRY_S
    backends = [relay.accepted(server) for _ in clients[1:]]
    for client, backend in zip(clients[1:], backends, strict=True):
        client.send(b"served")
        assert relay.wait_for(lambda at=backend: at.recv(10)) == b"served"  # type: ignore[misc]
    assert len(relay.log_lines) == 1


def test_shortage_is_logged_again_a_minute_after_the_last_one(relay: SharedRelay) -> None:
    port, server = entrance(relay, TCP)
    with free_descriptors(1):
        sock = socket.socket()
        sock.connect(("127.0.0.1", port))
        for _ in range(100):
            relay.clock.now_s += 1
            relay.turn()
    assert len(relay.log_lines) == 1
    assert relay.log_lines[0].startswith("new clients wait to be accepted: out of file descriptors: raise ")
    relay.clock.now_s += RETRY_S
    relay.accepted(server)
    sock.close()
    relay.clock.now_s += 61
    relay.streams.report_lost(OSError(errno.ENOSPC, ""))
    relay.clock.now_s += 61
    relay.streams.report_lost(OSError(errno.ENOSPC, ""))
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


class PortlessSocket(socket.SocketType):
    """A TCP socket for which the kernel finds no local port."""

    def connect_ex(self, _address: object) -> int:
        return errno.EADDRNOTAVAIL


def test_missing_local_port_is_logged_once(relay: SharedRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gangway.relay.core.stream.SocketType", PortlessSocket)
    port, server = entrance(relay, TCP)
    for _ in range(3):
        client = relay.client("127.0.0.1", port)
        with pytest.raises(ConnectionResetError):
            relay.wait_for(lambda at=client: at.recv(1))  # type: ignore[misc]
        relay.clock.now_s += 2
    at = f"tcp 127.0.0.1:{server.getsockname()[1]}"
    assert relay.log_lines == [f"cannot connect to {at}: no local port is free: widen {LOCAL_PORTS}"]


def test_connection_that_a_worker_cannot_watch_is_reset(relay: SharedRelay) -> None:
    listener = relay.bound(TCP, "127.0.0.1")
    ends = [relay.client(*listener.getsockname()) for _ in range(2)]
    port = StreamPort(relay.streams, Backend(TCP, socket.AF_INET, "127.0.0.1", 80))
    ScarceEpoll(relay.loop)
    port.adopt(*(accept(listener) for _ in ends))
    relay.turn()
    for end in ends:
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    assert not relay.streams.flows
    assert relay.log_lines == [f"connections are dropped: out of epoll watches: raise {WATCHES}"]
