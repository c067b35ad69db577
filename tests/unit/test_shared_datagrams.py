"""UDP ports that share a socket: which port a client asked for, and where answers leave from."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gangway.errors import InvalidRequest
from gangway.relay.core.shared import Binding
from gangway.relay.settings import Settings
from tests.unit.descriptors import socket_count
from tests.unit.shared_relay import UDP, SharedRelay, free_descriptors, port_of, running_relay

_SO_COOKIE = 57


@pytest.fixture
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        yield made


# UDP.  Outlets are bound to the unspecified address; what stands for the shared socket has one, so it is preferred.


def udp(relay: SharedRelay, address: str = "127.0.0.1") -> tuple[socket.socket, socket.socket, int]:
    """Return a backend, a client, and the port of a shared socket."""
    sock = relay.bound(UDP, address)
    return relay.bound(UDP, address), relay.bound(UDP, address), relay.use(sock)


@pytest.mark.parametrize(("address", "at"), [("127.0.0.1", "0.0.0.0"), ("::1", "::"), ("::1", "0:0:0::")])
def test_answer_leaves_from_the_destination_port(relay: SharedRelay, address: str, at: str) -> None:
    server, client, host_port = udp(relay, address)
    relay.publish(at, (host_port - 3, host_port + 3), server, shift=3)
    for _ in range(2):
        client.sendto(b"request", (address, host_port))
        data, sender = relay.receive(server)
        assert data == b"request"
        server.sendto(b"answer", sender)
        assert relay.receive(client) == (b"answer", (address, host_port))


def test_datagram_prefers_exact_address_to_unspecified(relay: SharedRelay) -> None:
    exact, unspecified = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1")
    client, host_port = relay.bound(UDP, "127.0.0.1"), relay.use(relay.bound(UDP, "0.0.0.0"))
    relay.publish("0.0.0.0", (host_port, host_port), unspecified)
    relay.publish("127.0.0.1", (host_port - 1, host_port), exact, shift=1)
    for address, server in (("127.0.0.1", exact), ("127.0.0.2", unspecified)):
        client.sendto(address.encode(), (address, host_port))
        data, sender = relay.receive(server)
        server.sendto(b"answer", sender)
        assert data == address.encode()
        assert relay.receive(client) == (b"answer", (address, host_port))


def test_datagram_for_unpublished_port_is_dropped(relay: SharedRelay) -> None:
    server, client, host_port = udp(relay)
    client.sendto(b"too early", ("127.0.0.1", host_port))
    relay.turn()
    relay.publish("0.0.0.0", (host_port, host_port), server)
    client.sendto(b"in time", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"in time"
    assert relay.log_lines == []


def test_clients_of_a_port_share_one_outlet_while_they_are_known(relay: SharedRelay) -> None:
    server, first, host_port = udp(relay)
    second = relay.bound(UDP, "127.0.0.1")
    relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    for number, client in enumerate((first, second)):
        client.sendto(b"request", ("127.0.0.1", host_port))
        relay.receive(server)
        assert socket_count() == before + 2 + number, "one for the port, and one to the backend for each client"
    relay.pass_seconds(Settings().udp_timeout_s + 2)
    assert socket_count() == before
    first.sendto(b"again", ("127.0.0.1", host_port))
    _, sender = relay.receive(server)
    server.sendto(b"answer", sender)
    assert relay.receive(first) == (b"answer", ("127.0.0.1", host_port))


def test_answers_of_one_round_leave_from_their_own_ports(relay: SharedRelay) -> None:
    server, clients, host_port, senders = relay.bound(UDP, "127.0.0.1"), [], [], []
    for number in range(2):
        clients.append(relay.bound(UDP, "127.0.0.1"))
        host_port.append(relay.use(relay.bound(UDP, "127.0.0.1")))
        relay.publish("0.0.0.0", (host_port[number], host_port[number]), server)
        clients[number].sendto(b"request", ("127.0.0.1", host_port[number]))
        senders.append(relay.receive(server)[1])
    for number in (0, 1, 0, 1, 1):
        server.sendto(b"answer", senders[number])
    for number, times in ((0, 2), (1, 3)):
        answers = [relay.receive(clients[number]) for _ in range(times)]
        assert answers == [(b"answer", ("127.0.0.1", host_port[number]))] * times


@pytest.mark.parametrize("size", [0, 1, 2, 1001, 40_000])
@pytest.mark.parametrize(("address", "at"), [("127.0.0.1", "0.0.0.0"), ("127.0.0.5", "127.0.0.5"), ("::1", "::")])
def test_held_port_answers_by_a_raw_socket(relay: SharedRelay, address: str, at: str, size: int) -> None:
    """The kernel delivers no answer whose checksum is wrong."""
    server, client, host_port = udp(relay, address)
    raw = relay.raw(6 if ":" in address else 4)
    relay.publish(at, (host_port - 1, host_port), server, shift=1, raw=raw)
    client.connect((address, host_port))  # it then receives from there only
    client.send(b"request")
    sender = relay.receive(server)[1]
    answers = [os.urandom(size) for _ in range(3)]
    for one in answers:
        server.sendto(one, sender)
    assert [relay.wait_for(lambda: client.recv(65535)) for _ in answers] == answers


def test_held_port_needs_no_socket_of_its_own(relay: SharedRelay) -> None:
    """A socket without SO_REUSEADDR keeps all others from the port; dockerd binds such a one whenever it likes."""
    server, client, host_port = udp(relay)
    before, raw = socket_count(), relay.raw(4)
    published = relay.publish("0.0.0.0", (host_port, host_port), server, raw=raw)
    client.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    assert socket_count() == before + 2, "the raw one, and the client's to the backend"
    relay.pass_seconds(Settings().udp_timeout_s + 2)
    assert socket_count() == before + 1, "another client may come"
    published.close()
    relay.turn()
    assert (socket_count(), relay.log_lines) == (before, [])


def test_unpublishing_removes_the_clients_of_its_range(relay: SharedRelay) -> None:
    server, client, host_port = udp(relay)
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    client.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    port.close()
    relay.turn()
    assert socket_count() == before
    client.sendto(b"too late", ("127.0.0.1", host_port))
    relay.turn()
    with pytest.raises(BlockingIOError):
        server.recv(100)


@pytest.mark.parametrize("times", [1, 2, 20])
def test_client_is_recognized_after_the_socket_was_passed_again(relay: SharedRelay, times: int) -> None:
    sock = relay.bound(UDP, "127.0.0.1")
    again = [relay.duplicate(sock) for _ in range(times)]
    server, client, host_port = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1"), relay.use(sock)
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    client.sendto(b"request", ("127.0.0.1", host_port))
    _, sender = relay.receive(server)
    for one in again:
        relay.use(one)
        client.sendto(b"request", ("127.0.0.1", host_port))
        assert relay.receive(server) == (b"request", sender)
        server.sendto(b"answer", sender)
        assert relay.receive(client) == (b"answer", ("127.0.0.1", host_port))
    relay.turn()
    before = socket_count()
    port.close()
    relay.turn()
    assert socket_count() == before - 2, "one for the port, and one to the backend"


def test_client_expires_after_the_socket_was_passed_again(relay: SharedRelay) -> None:
    sock = relay.bound(UDP, "127.0.0.1")
    again = relay.duplicate(sock)
    server, client, host_port = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1"), relay.use(sock)
    relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    client.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    relay.use(again)
    relay.pass_seconds(Settings().udp_timeout_s + 2)
    assert socket_count() == before - 1, "the former socket is closed, too"
    client.sendto(b"request", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"request"


def test_failure_to_open_sockets_is_logged_and_leaves_none(relay: SharedRelay) -> None:
    server, client, host_port = udp(relay)
    relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    for left in (0, 1):  # for neither socket that a client needs, and for one
        client.sendto(b"request", ("127.0.0.1", host_port))
        with free_descriptors(left):
            relay.turn()
        assert socket_count() == before
        relay.clock.now_s += 1
    at = f"udp 127.0.0.1:{port_of(server)}"
    assert [line.partition(": raise")[0] for line in relay.log_lines] == [
        f"new clients of {at} are not relayed: out of file descriptors"
    ]
    client.sendto(b"second request", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"second request"


def test_without_descriptors_the_longest_idle_client_is_removed(relay: SharedRelay) -> None:
    server, other = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1")
    sock, first, second = (relay.bound(UDP, "127.0.0.1") for _ in range(3))
    relay.publish("0.0.0.0", (port_of(sock), port_of(sock)), server)
    host_port = relay.use(relay.bound(UDP, "127.0.0.1"))
    relay.publish("0.0.0.0", (host_port, host_port), other)
    first.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(other)
    relay.use(sock)
    second.sendto(b"request", ("127.0.0.1", port_of(sock)))
    with free_descriptors(1):
        data, sender = relay.receive(server)
    assert (data, len(relay.datagrams.clients)) == (b"request", 1)
    server.sendto(b"answer", sender)
    assert relay.receive(second) == (b"answer", ("127.0.0.1", port_of(sock)))


def test_without_descriptors_the_outlet_of_the_removed_client_stays_usable(relay: SharedRelay) -> None:
    server, first, host_port = udp(relay)
    second = relay.bound(UDP, "127.0.0.1")
    relay.publish("0.0.0.0", (host_port, host_port), server)
    first.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    second.sendto(b"request", ("127.0.0.1", host_port))
    with free_descriptors(0):
        data, sender = relay.receive(server)
    assert (data, len(relay.datagrams.clients)) == (b"request", 1)
    server.sendto(b"answer", sender)
    assert relay.receive(second) == (b"answer", ("127.0.0.1", host_port))


def test_udp_socket_needs_the_binding_map(relay: SharedRelay) -> None:
    with relay.bound(UDP, "127.0.0.1") as sock, pytest.raises(InvalidRequest, match="no map came"):
        relay.shared.use(UDP, socket.AF_INET, sock, None)
    assert len(relay.shared) == 0


def test_binding_is_allowed_only_within_the_block(relay: SharedRelay) -> None:
    binding = Binding(relay.binding_fd)
    sock = relay.bound(UDP, "127.0.0.1")
    unset = bytes(8)
    with binding.allowed(sock):
        assert os.pread(relay.binding_fd, 8, 0) == sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8) != unset
    assert os.pread(relay.binding_fd, 8, 0) == unset
    with pytest.raises(OSError, match="in use"), binding.allowed(sock):
        raise OSError("in use")
    assert os.pread(relay.binding_fd, 8, 0) == unset


def test_outlet_is_allowed_before_it_is_bound(relay: SharedRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[str, int]] = []

    @contextmanager
    def allow(_binding: Binding, sock: socket.socket) -> Iterator[None]:
        assert port_of(sock) == 0
        yield
        allowed.append(sock.getsockname())

    monkeypatch.setattr(Binding, "allowed", allow)
    server, client, host_port = udp(relay)
    relay.publish("0.0.0.0", (host_port - 1, host_port + 1), server, shift=1)
    client.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    assert allowed == [("0.0.0.0", host_port)]
