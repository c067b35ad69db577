"""UDP ports that share a socket: which port a client asked for, and where answers leave from."""

import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable, Iterator

import pytest

from gangway.errors import InvalidRequest
from lab.waiting import wait_until
from tests.unit.descriptors import socket_count
from tests.unit.shared_relay import UDP, SharedRelay, free_descriptors, port_of, running_relay

UDP_SEGMENT = 103  # include/uapi/linux/udp.h


@pytest.fixture
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        yield made


# Outlets are bound to the unspecified address; what stands for the shared socket has one, so it is preferred.


def unread_bytes(sock: socket.socket) -> int:
    """Return how many bytes of the first datagram in a socket's queue nobody has read (udp(7))."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def sockets_are(number: int) -> Callable[[], bool]:
    return lambda: socket_count() == number


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
    server, client, sock = (relay.bound(UDP, "127.0.0.1") for _ in range(3))
    entrance, host_port = relay.duplicate(sock), relay.use(sock)
    client.sendto(b"too early", ("127.0.0.1", host_port))
    wait_until(lambda: unread_bytes(entrance) == 0, "the datagram to be read")
    relay.publish("0.0.0.0", (host_port, host_port), server)
    client.sendto(b"in time", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"in time"
    assert relay.log_lines == []


def test_clients_of_a_port_share_one_outlet_while_they_are_known() -> None:
    with running_relay(udp_timeout_s=1) as relay:
        server, first, host_port = udp(relay)
        second = relay.bound(UDP, "127.0.0.1")
        port = relay.publish("0.0.0.0", (host_port, host_port), server)
        before = socket_count()
        for number, client in enumerate((first, second)):
            client.sendto(b"request", ("127.0.0.1", host_port))
            relay.receive(server)
            assert socket_count() == before + 2 + number, "one for the port, and one to the backend for each client"
        wait_until(sockets_are(before), "the clients to be forgotten")
        assert (port.counters().connections, port.counters().active) == (2, 0)
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


def test_held_port_needs_no_socket_of_its_own() -> None:
    """A socket without SO_REUSEADDR keeps all others from the port; dockerd binds such a one whenever it likes."""
    with running_relay(udp_timeout_s=1) as relay:
        server, client, host_port = udp(relay)
        before, raw = socket_count(), relay.raw(4)
        published = relay.publish("0.0.0.0", (host_port, host_port), server, raw=raw)
        client.sendto(b"request", ("127.0.0.1", host_port))
        relay.receive(server)
        assert socket_count() == before + 2, "the raw one, and the client's to the backend"
        wait_until(sockets_are(before + 1), "the client to be forgotten: another one may come")
        relay.closed(published)
        assert (socket_count(), relay.log_lines) == (before, [])


def test_unpublishing_removes_the_clients_of_its_range(relay: SharedRelay) -> None:
    server, client, sock = (relay.bound(UDP, "127.0.0.1") for _ in range(3))
    entrance, host_port = relay.duplicate(sock), relay.use(sock)
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    client.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    relay.closed(port)
    assert socket_count() == before
    client.sendto(b"too late", ("127.0.0.1", host_port))
    wait_until(lambda: unread_bytes(entrance) == 0, "the datagram to be read")
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
    before = socket_count()
    relay.closed(port)
    wait_until(sockets_are(before - 2), "the end of one for the port, and one to the backend")


def test_client_expires_after_the_socket_was_passed_again() -> None:
    with running_relay(udp_timeout_s=1) as relay:
        sock = relay.bound(UDP, "127.0.0.1")
        again = relay.duplicate(sock)
        server, client, host_port = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1"), relay.use(sock)
        relay.publish("0.0.0.0", (host_port, host_port), server)
        before = socket_count()
        client.sendto(b"request", ("127.0.0.1", host_port))
        relay.receive(server)
        relay.use(again)
        wait_until(sockets_are(before - 1), "the client to be forgotten, and the former socket to be closed")
        client.sendto(b"request", ("127.0.0.1", host_port))
        assert relay.receive(server)[0] == b"request"


def test_failure_to_open_sockets_is_logged_and_leaves_none(relay: SharedRelay) -> None:
    server, client, host_port = udp(relay)
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    for left in (0, 1):  # for neither socket that a client needs, and for one
        with free_descriptors(left):
            client.sendto(b"request", ("127.0.0.1", host_port))
            wait_until(lambda lost=left + 1: port.counters().lost == lost, "the loss")  # type: ignore[misc]
        assert socket_count() == before

    def is_logged() -> bool:
        relay.turn()
        return bool(relay.log_lines)

    wait_until(is_logged, "a line in the log")
    at = f"udp 127.0.0.1:{port_of(server)}"
    assert [line.partition(": raise")[0] for line in relay.log_lines] == [
        f"new clients of {at} are not relayed: out of file descriptors"
    ]
    client.sendto(b"second request", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"second request"


def test_without_descriptors_the_longest_idle_client_is_removed(relay: SharedRelay) -> None:
    server, other = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1")
    sock, first, second = (relay.bound(UDP, "127.0.0.1") for _ in range(3))
    number = port_of(sock)
    port = relay.publish("0.0.0.0", (number, number), server)
    host_port = relay.use(relay.bound(UDP, "127.0.0.1"))
    idle = relay.publish("0.0.0.0", (host_port, host_port), other)
    first.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(other)
    before = socket_count()
    relay.use(sock)
    wait_until(sockets_are(before - 1), "the former socket to be closed")
    with free_descriptors(1):
        second.sendto(b"request", ("127.0.0.1", number))
        data, sender = relay.receive(server)
    assert (data, idle.counters().evicted, port.counters().active) == (b"request", 1, 1)
    server.sendto(b"answer", sender)
    assert relay.receive(second) == (b"answer", ("127.0.0.1", number))


def test_without_descriptors_the_outlet_of_the_removed_client_stays_usable(relay: SharedRelay) -> None:
    server, first, host_port = udp(relay)
    second = relay.bound(UDP, "127.0.0.1")
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    first.sendto(b"request", ("127.0.0.1", host_port))
    relay.receive(server)
    with free_descriptors(0):
        second.sendto(b"request", ("127.0.0.1", host_port))
        data, sender = relay.receive(server)
    assert (data, port.counters().evicted, port.counters().active) == (b"request", 1, 1)
    server.sendto(b"answer", sender)
    assert relay.receive(second) == (b"answer", ("127.0.0.1", host_port))


def test_udp_socket_needs_the_binding_map(relay: SharedRelay) -> None:
    with relay.bound(UDP, "127.0.0.1") as sock, pytest.raises(InvalidRequest, match="no map came"):
        relay.core.share(UDP, socket.AF_INET, sock)
    assert relay.core.shared_count == 0


@pytest.mark.parametrize("times", [1, 2])
def test_binding_allows_no_socket_when_a_client_is_served(relay: SharedRelay, times: int) -> None:
    """While a socket to answer from is bound its cookie is there: `test_steered_ranges` needs that."""
    server, client, host_port = udp(relay)
    relay.publish("0.0.0.0", (host_port - 1, host_port + 1), server, shift=1)
    for _ in range(times):
        client.sendto(b"request", ("127.0.0.1", host_port))
        relay.receive(server)
    assert os.pread(relay.binding_fd, 8, 0) == bytes(8)


def test_refused_client_is_told(relay: SharedRelay) -> None:
    """A connected socket learns that nobody listens in the container, as it would without a relay."""
    for address in ("127.0.0.1", "::1"):
        server, client, host_port = udp(relay, address)
        port = relay.publish(address, (host_port, host_port), server)
        server.close()
        client.connect((address, host_port))
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            relay.wait_for(lambda client=client: client.recv(1))  # type: ignore[misc]
        assert port.counters().resets == 1
        relay.closed(port)


def test_answer_from_another_port_of_the_container_is_accepted(relay: SharedRelay) -> None:
    server, client, host_port = udp(relay)
    other, stranger = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.2")
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    for _ in range(2):
        client.sendto(b"request", ("127.0.0.1", host_port))
        sender = relay.receive(server)[1]
        stranger.sendto(b"not from the container", sender)
        other.sendto(b"answer", sender)
        assert relay.receive(client) == (b"answer", ("127.0.0.1", host_port))
    assert port.counters().dropped == 2


def test_tftp_transfer_goes_on_with_the_port_that_answered(relay: SharedRelay) -> None:
    server, client, host_port = udp(relay)
    relay.publish("0.0.0.0", (host_port, host_port), server)
    request, block, acknowledgement = b"\0\1file\0octet\0", b"\0\3\0\1text", b"\0\4\0\1"
    for _ in range(2):
        client.sendto(request, ("127.0.0.1", host_port))
        data, sender = relay.receive(server)
        assert data == request
        transfer = relay.bound(UDP, "127.0.0.1")
        for _ in range(2):
            transfer.sendto(block, sender)
            assert relay.receive(client) == (block, ("127.0.0.1", host_port))
            client.sendto(acknowledgement, ("127.0.0.1", host_port))
            assert relay.receive(transfer) == (acknowledgement, sender)


@pytest.mark.parametrize(("of_all", "per_port"), [(20, 7), (10, 10)])
def test_floods_of_two_ports_forget_no_client_of_a_third(of_all: int, per_port: int) -> None:
    with running_relay(udp_clients=of_all, udp_clients_per_port=per_port) as relay:
        servers, socks = ([relay.bound(UDP, "127.0.0.1") for _ in range(3)] for _ in range(2))
        numbers = [port_of(sock) for sock in socks]
        ports = [relay.publish_own(sock, server) for sock, server in zip(socks, servers, strict=True)]

        def ask(client: socket.socket, number: int) -> tuple[str, int]:
            client.sendto(b"request", ("127.0.0.1", numbers[number]))
            return relay.receive(servers[number])[1]

        for number in (0, 1):
            for _ in range(2 * of_all):
                ask(relay.bound(UDP, "127.0.0.1"), number)
        quiet = [relay.bound(UDP, "127.0.0.1") for _ in range(2)]
        senders = [ask(one, 2) for one in quiet]
        for number in (0, 1, 0):
            for _ in range(of_all):
                ask(relay.bound(UDP, "127.0.0.1"), number)
        assert [ask(one, 2) for one in quiet] == senders
        counters = [one.counters() for one in ports]
        assert (counters[2].active, counters[2].evicted) == (2, 0)
        assert sum(one.active for one in counters) <= of_all
        assert max(one.active for one in counters) <= per_port


def icmp_refusal(sender: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """Return a message that says nobody listens at a datagram's destination (RFC 792)."""
    source, to = socket.inet_aton(sender[0]), socket.inet_aton(destination[0])
    quoted = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, UDP, 0, source, to)
    quoted += struct.pack("!HHHH", sender[1], destination[1], 8, 0)
    message = struct.pack("!BBHI", 3, 3, 0, 0) + quoted
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    total = (total & 0xFFFF) + (total >> 16)
    return message[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + message[4:]


@pytest.mark.parametrize("is_forged", [True, False])
def test_refusal_counts_only_if_it_is_about_the_container(relay: SharedRelay, is_forged: bool) -> None:
    """Whoever sends an ICMP message has to know what the relay has sent to whom."""
    server, client, host_port = udp(relay)
    port = relay.publish("0.0.0.0", (host_port, host_port), server)
    client.connect(("127.0.0.1", host_port))
    client.send(b"request")
    sender = relay.receive(server)[1]
    destination = ("198.51.100.9", 4242) if is_forged else server.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        for _ in range(3 if is_forged else 1):
            raw.sendto(icmp_refusal(sender, destination), ("127.0.0.1", 0))
    if not is_forged:
        wait_until(lambda: port.counters().resets > 0, "the refusal")
        with pytest.raises(ConnectionRefusedError):
            relay.wait_for(lambda: client.recv(1))
    server.sendto(b"answer", sender)
    assert relay.wait_for(lambda: client.recv(10)) == b"answer", "and it is served"
    assert (port.counters().resets > 0, port.counters().dropped) == (not is_forged, 0)


def test_stranger_does_not_keep_a_client() -> None:
    with running_relay(udp_timeout_s=1) as relay:
        server, client, host_port = udp(relay)
        stranger = relay.bound(UDP, "127.0.0.2")
        port = relay.publish("0.0.0.0", (host_port, host_port), server)
        client.sendto(b"request", ("127.0.0.1", host_port))
        sender = relay.receive(server)[1]

        def is_forgotten() -> bool:
            stranger.sendto(b"not from the container", sender)
            return port.counters().active == 0

        wait_until(is_forgotten, "the client to be forgotten")


def test_joined_datagrams_are_cut_again(relay: SharedRelay) -> None:
    """A client that has the kernel cut its datagrams sends them joined as far as the relay, and so does a container."""
    server, client, host_port = udp(relay)
    relay.publish("0.0.0.0", (host_port, host_port), server)
    datagrams = [bytes([number]) * 1000 for number in range(20)] + [b"the last one"]
    client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    client.sendto(b"".join(datagrams), ("127.0.0.1", host_port))
    arrived = [relay.wait_for(lambda: server.recvfrom(2000)) for _ in datagrams]
    assert [data for data, _ in arrived] == datagrams
    server.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    server.sendto(b"".join(datagrams), arrived[0][1])
    assert [relay.wait_for(lambda: client.recv(2000)) for _ in datagrams] == datagrams
