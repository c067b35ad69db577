"""TCP ports that share a socket: which port a client asked for, and what unpublishing removes."""

import socket
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from gangway.relay.core.serving import Port
from lab.waiting import wait_until
from tests.unit.descriptors import socket_count
from tests.unit.shared_relay import TCP, SharedRelay, port_of, running_relay

_BULK_BYTES = 8 << 20


@pytest.fixture
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        yield made


def test_client_is_connected_to_the_backend_port_at_the_same_offset(relay: SharedRelay) -> None:
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port - 3, host_port + 2), server, shift=3)
    client = relay.client("127.0.0.1", host_port)
    backend = relay.accepted(server)
    client.send(b"request")
    assert relay.wait_for(lambda: backend.recv(100)) == b"request"
    backend.send(b"answer")
    assert relay.wait_for(lambda: client.recv(100)) == b"answer"


def test_exact_address_is_preferred_to_unspecified(relay: SharedRelay) -> None:
    exact, unspecified, other = (relay.bound(TCP, "127.0.0.1") for _ in range(3))
    host_port = relay.use(relay.bound(TCP, "0.0.0.0"))
    relay.publish("0.0.0.0", (host_port, host_port), unspecified)
    relay.publish("127.0.0.1", (host_port - 1, host_port + 1), exact, shift=1)
    relay.publish("127.0.0.2", (host_port + 1, host_port + 1), other)
    for address, server in (("127.0.0.1", exact), ("127.0.0.2", unspecified), ("127.0.0.3", unspecified)):
        client = relay.client(address, host_port)
        assert relay.accepted(server).getpeername()[0] == "127.0.0.1"
        assert client.getpeername() == (address, host_port)
    for server in (exact, unspecified, other):
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("touching", [-1, 1])
def test_adjacent_ranges_do_not_overlap(relay: SharedRelay, touching: int) -> None:
    server, other = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port, host_port), server)
    relay.publish("127.0.0.1", (host_port + touching, host_port + touching), other)
    relay.client("127.0.0.1", host_port)
    relay.accepted(server)
    with pytest.raises(BlockingIOError):
        other.accept()


@pytest.mark.parametrize("at", ["::1", "0:0::0001", "::", "0:0:0:0::"])
def test_ipv6_address_matches_in_any_notation(relay: SharedRelay, at: str) -> None:
    """And its container may have IPv4 only."""
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "::1"))
    relay.publish(at, (host_port, host_port), server)
    relay.client("::1", host_port)
    relay.accepted(server)


def test_client_that_waited_while_its_port_was_unpublished_is_refused(relay: SharedRelay) -> None:
    """As if nobody had listened; clients of other ports of the same socket are not."""
    server, sock = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "0.0.0.0")
    host_port = port_of(sock)
    unpublished = relay.publish("127.0.0.1", (host_port - 1, host_port), server, shift=1)
    relay.publish("127.0.0.2", (host_port, host_port), server)
    waiting = relay.client("127.0.0.1", host_port)
    unpublished.close()
    relay.use(sock)
    stays = relay.client("127.0.0.2", host_port)
    with pytest.raises(ConnectionResetError):
        relay.wait_for(lambda: waiting.recv(1))
    backend = relay.accepted(server)
    stays.send(b"here")
    assert relay.wait_for(lambda: backend.recv(100)) == b"here"
    with pytest.raises(BlockingIOError):
        server.accept()
    assert relay.log_lines == []


def _ask(port: int) -> bytes:
    with socket.socket() as client:
        client.connect(("127.0.0.1", port))
        return client.recv(1)


def test_refused_client_leaves_no_socket(relay: SharedRelay) -> None:
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    before = socket_count()
    with pytest.raises(ConnectionError):  # a connect() that is reset may also be aborted
        _ask(host_port)
    wait_until(lambda: socket_count() == before, "the relay's socket to be closed")


def test_unpublishing_ends_only_the_connections_of_its_range(relay: SharedRelay) -> None:
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "0.0.0.0"))
    unpublished, _ = (relay.publish(f"127.0.0.{number}", (host_port, host_port), server) for number in (1, 2))
    ends, stays = relay.client("127.0.0.1", host_port), relay.client("127.0.0.2", host_port)
    backends = [relay.accepted(server) for _ in range(2)]
    unpublished.close()
    for sock in (ends, backends[0]):
        with pytest.raises(ConnectionResetError):
            relay.wait_for(partial(sock.recv, 1))
    stays.send(b"here")
    assert relay.wait_for(lambda: backends[1].recv(100)) == b"here"


def test_ports_of_an_unpublished_range_can_be_published_again(relay: SharedRelay) -> None:
    before, after = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port - 5, host_port + 5), before).close()
    relay.publish("127.0.0.1", (host_port, host_port), after)
    relay.client("127.0.0.1", host_port)
    relay.accepted(after)


def test_clients_that_waited_for_the_shared_socket_are_served(relay: SharedRelay) -> None:
    """Ranges come first: with a relay that comes after another, clients are waiting already."""
    server, sock = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    client = relay.client("127.0.0.1", port_of(sock))
    relay.publish("127.0.0.1", (port_of(sock), port_of(sock)), server)
    assert relay.core.shared_count == 0
    relay.use(sock)
    assert relay.core.shared_count == 1
    backend = relay.accepted(server)
    client.send(b"still here")
    assert relay.wait_for(lambda: backend.recv(100)) == b"still here"


def test_socket_passed_again_replaces_the_former(relay: SharedRelay) -> None:
    server, sock = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    again = relay.duplicate(sock)
    host_port = relay.use(sock)
    relay.publish("127.0.0.1", (host_port, host_port), server)
    before = relay.client("127.0.0.1", host_port)
    backends = [relay.accepted(server)]
    relay.use(again)
    relay.turn()
    assert (relay.core.shared_count, sock.fileno()) == (1, -1)
    after = relay.client("127.0.0.1", host_port)
    backends.append(relay.accepted(server))
    for client, backend in zip((before, after), backends, strict=True):
        client.send(b"here")
        assert relay.wait_for(partial(backend.recv, 100)) == b"here"


def test_closed_shared_socket_leaves_clients_to_the_next_relay(relay: SharedRelay) -> None:
    sock, server = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.duplicate(sock))
    relay.core.unshare()
    relay.turn()
    relay.publish("127.0.0.1", (host_port, host_port), server)
    client = relay.client("127.0.0.1", host_port)
    relay.turn()
    assert relay.core.shared_count == 0
    with sock.accept()[0] as accepted:
        accepted.sendall(b"served")
        assert relay.wait_for(lambda: client.recv(100)) == b"served"


@pytest.mark.parametrize("ends", [False, True])
def test_data_after_urgent_data_in_bulk_arrives(relay: SharedRelay, ends: bool) -> None:
    """The urgent byte itself is lost, as it is with docker-proxy."""
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port, host_port), server)
    client = relay.client("127.0.0.1", host_port)
    backend = relay.accepted(server)
    client.settimeout(10)
    backend.settimeout(10)
    received = bytearray()

    def receive() -> None:
        while len(received) < _BULK_BYTES + 1000 and (data := backend.recv(1 << 20)):
            received.extend(data)

    reader = threading.Thread(target=receive)
    reader.start()
    client.sendall(bytes(_BULK_BYTES))
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"x" * 1000)
    if ends:
        client.shutdown(socket.SHUT_WR)
    reader.join(20)
    assert len(received) == _BULK_BYTES + 1000
    assert received.endswith(b"x" * 1000)


def test_port_counts_connections_and_bytes(relay: SharedRelay) -> None:
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    port = relay.publish("127.0.0.1", (host_port, host_port), server)
    assert isinstance(port, Port)
    client = relay.client("127.0.0.1", host_port)
    backend = relay.accepted(server)
    client.send(b"request")
    assert relay.wait_for(lambda: backend.recv(100)) == b"request"
    backend.send(b"yes")
    assert relay.wait_for(lambda: client.recv(100)) == b"yes"
    wait_until(lambda: port.counters().down_bytes, "the bytes to be counted")
    found = port.counters()
    assert (found.connections, found.active, found.up_bytes, found.down_bytes) == (1, 1, 7, 3)
    assert (found.failed, found.timeouts, found.resets, found.not_admitted, found.lost) == (0,) * 5
