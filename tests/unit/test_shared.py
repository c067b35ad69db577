"""Ports that share sockets: whose a client is, where an answer leaves from, and what a withdrawn port leaves behind.

Nothing is steered here: a socket that is bound to one port stands for the one to which the kernel steers many.
"""

import gc
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import TypeVar

import pytest

from gangway.errors import InvalidRequest
from gangway.log import Log
from gangway.relay.core import datagram, stream
from gangway.relay.core.datagram import Datagrams
from gangway.relay.core.loop import Loop
from gangway.relay.core.shared import Binding, SharedSockets
from gangway.relay.core.stream import Streams
from gangway.relay.flow import Event
from gangway.relay.kept import parse_range
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend
from tests.unit.descriptors import socket_count

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
NAMES = {TCP: "tcp", UDP: "udp"}
_SO_COOKIE = 57

_Got = TypeVar("_Got")


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Place:
    """A relay's shared ports, in this process.  All sockets are closed at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.said: list[str] = []
        settings, log = Settings(workers=1), Log(lambda _level, line: self.said.append(line), self.clock)
        self.streams = Streams(self.loop, settings, log)
        self.datagrams = Datagrams(self.loop, settings, log)
        keys = count(1)
        self.shared = SharedSockets(self.streams, self.datagrams, partial(next, keys))
        self.binding_fd = os.memfd_create("binding")
        stack.callback(os.close, self.binding_fd)
        os.truncate(self.binding_fd, os.sysconf("SC_PAGESIZE"))

    def turn(self) -> None:
        """One round that waits for nothing."""
        self.loop.call_soon(lambda _events: None, 0)
        self.loop.turn()

    def got(self, get: Callable[[], _Got]) -> _Got:
        """What a call that never waits gives, as soon as it gives something."""
        while True:
            try:
                return get()
            except BlockingIOError:
                self.turn()

    def bound(self, protocol: int, address: str, port: int = 0) -> socket.socket:
        """A socket that never waits, and listens if that is in its nature."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM if protocol == UDP else socket.SOCK_STREAM, protocol)
        self._stack.enter_context(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        if protocol == TCP:
            sock.listen()
        sock.setblocking(False)
        return sock

    def use(self, sock: socket.socket) -> int:
        """A socket is shared from now on; its port."""
        self.shared.use(sock.proto, sock.family, sock, self.binding_fd if sock.proto == UDP else None)
        return port_of(sock)

    def again(self, sock: socket.socket) -> socket.socket:
        """The same, as it comes with another message."""
        return self._stack.enter_context(sock.dup())

    def publish(
        self, at: str, ports: tuple[int, int], to: socket.socket, shift: int = 0
    ) -> stream.StreamPort | datagram.DatagramPort:
        """A range; who asks its first port, and `shift` more, gets to this socket."""
        ranges = parse_range(NAMES[to.proto], at, *map(str, ports))
        address, port = to.getsockname()[:2]
        found = self.shared.publish(ranges, Backend(to.proto, to.family, address, port - shift))
        assert isinstance(found, stream.StreamPort | datagram.DatagramPort)
        return found

    def client(self, address: str, port: int) -> socket.socket:
        """Of TCP: connected as far as the kernel does it."""
        sock = self._stack.enter_context(socket.create_connection((address, port), 5))
        sock.setblocking(False)
        return sock

    def accepted(self, server: socket.socket) -> socket.socket:
        """A connection to a backend, when it comes."""
        sock = self._stack.enter_context(self.got(lambda: server.accept()[0]))
        sock.setblocking(False)
        return sock

    def told(self, sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
        """A datagram, when it comes, and who sent it."""
        data, address = self.got(lambda: sock.recvfrom(100))
        return data, address[:2]

    def pass_seconds(self, seconds: float) -> None:
        """Each with a round."""
        for _ in range(round(seconds)):
            self.clock.now_s += 1
            self.turn()

    def close(self) -> None:
        """All flows and clients go."""
        for flow in tuple(self.streams.flows):
            flow.on(Event.UNPUBLISHED)
        for client in tuple(self.datagrams.clients):
            client.remove()
        self.loop.close()


@pytest.fixture
def place() -> Iterator[Place]:
    with ExitStack() as stack:
        made = Place(stack)
        yield made
        made.close()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@contextmanager
def no_more_than(count: int) -> Iterator[None]:
    """So many descriptors more can be had in the block."""
    gc.collect()  # else garbage of earlier tests may free descriptors in the block
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    for fd in held:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# TCP


def test_a_client_gets_as_far_into_the_backends_ports_as_it_asked_into_the_range(place: Place) -> None:
    server = place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "127.0.0.1"))
    place.publish("127.0.0.1", (asked - 3, asked + 2), server, shift=3)
    client = place.client("127.0.0.1", asked)
    backend = place.accepted(server)
    client.send(b"ask")
    assert place.got(lambda: backend.recv(100)) == b"ask"
    backend.send(b"answer")
    assert place.got(lambda: client.recv(100)) == b"answer"


def test_the_range_of_the_very_address_comes_before_that_of_all(place: Place) -> None:
    exact, any_, other = (place.bound(TCP, "127.0.0.1") for _ in range(3))
    asked = place.use(place.bound(TCP, "0.0.0.0"))
    place.publish("0.0.0.0", (asked, asked), any_)
    place.publish("127.0.0.1", (asked - 1, asked + 1), exact, shift=1)
    place.publish("127.0.0.2", (asked + 1, asked + 1), other)
    for address, server in (("127.0.0.1", exact), ("127.0.0.2", any_), ("127.0.0.3", any_)):
        client = place.client(address, asked)
        assert place.accepted(server).getpeername()[0] == "127.0.0.1"
        assert client.getpeername() == (address, asked)
    for server in (exact, any_, other):
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("touching", [-1, 1])
def test_a_range_ends_where_another_begins(place: Place, touching: int) -> None:
    server, other = place.bound(TCP, "127.0.0.1"), place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "127.0.0.1"))
    place.publish("127.0.0.1", (asked, asked), server)
    place.publish("127.0.0.1", (asked + touching, asked + touching), other)
    place.client("127.0.0.1", asked)
    place.accepted(server)
    with pytest.raises(BlockingIOError):
        other.accept()


@pytest.mark.parametrize("at", ["::1", "0:0::0001", "::", "0:0:0:0::"])
def test_an_ipv6_address_is_found_however_it_was_written(place: Place, at: str) -> None:
    """And its container may have IPv4 only."""
    server = place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "::1"))
    place.publish(at, (asked, asked), server)
    place.client("::1", asked)
    place.accepted(server)


def test_a_client_that_waited_while_its_port_was_withdrawn_is_refused(place: Place) -> None:
    """As if nobody had listened; clients of other ports of the same socket are not."""
    server = place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "0.0.0.0"))
    gone = place.publish("127.0.0.1", (asked - 1, asked), server, shift=1)
    place.publish("127.0.0.2", (asked, asked), server)
    waiting = place.client("127.0.0.1", asked)
    gone.close()
    stays = place.client("127.0.0.2", asked)
    with pytest.raises(ConnectionResetError):
        place.got(lambda: waiting.recv(1))
    backend = place.accepted(server)
    stays.send(b"here")
    assert place.got(lambda: backend.recv(100)) == b"here"
    with pytest.raises(BlockingIOError):
        server.accept()
    assert place.said == []


def test_who_is_refused_leaves_no_socket(place: Place) -> None:
    asked = place.use(place.bound(TCP, "127.0.0.1"))
    client = place.client("127.0.0.1", asked)
    before = socket_count()
    with pytest.raises(ConnectionResetError):
        place.got(lambda: client.recv(1))
    assert socket_count() == before


def test_with_a_withdrawn_range_its_connections_end_and_no_others(place: Place) -> None:
    server = place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "0.0.0.0"))
    gone, _ = (place.publish(f"127.0.0.{number}", (asked, asked), server) for number in (1, 2))
    ends, stays = place.client("127.0.0.1", asked), place.client("127.0.0.2", asked)
    backends = [place.accepted(server) for _ in range(2)]
    gone.close()
    for sock in (ends, backends[0]):
        with pytest.raises(ConnectionResetError):
            place.got(partial(sock.recv, 1))
    stays.send(b"here")
    assert place.got(lambda: backends[1].recv(100)) == b"here"


def test_a_withdrawn_range_leaves_its_ports_to_others(place: Place) -> None:
    before, after = place.bound(TCP, "127.0.0.1"), place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "127.0.0.1"))
    place.publish("127.0.0.1", (asked - 5, asked + 5), before).close()
    place.publish("127.0.0.1", (asked, asked), after)
    place.client("127.0.0.1", asked)
    place.accepted(after)


def test_clients_that_waited_for_a_socket_to_be_shared_are_served(place: Place) -> None:
    """Ranges come first: with a relay that comes after another, clients are waiting already."""
    server, sock = place.bound(TCP, "127.0.0.1"), place.bound(TCP, "127.0.0.1")
    client = place.client("127.0.0.1", port_of(sock))
    place.publish("127.0.0.1", (port_of(sock), port_of(sock)), server)
    assert len(place.shared) == 0
    place.use(sock)
    assert len(place.shared) == 1
    backend = place.accepted(server)
    client.send(b"still here")
    assert place.got(lambda: backend.recv(100)) == b"still here"


def test_a_socket_that_is_handed_over_anew_takes_the_place_of_the_former(place: Place) -> None:
    server, sock = place.bound(TCP, "127.0.0.1"), place.bound(TCP, "127.0.0.1")
    again = place.again(sock)
    asked = place.use(sock)
    place.publish("127.0.0.1", (asked, asked), server)
    before = place.client("127.0.0.1", asked)
    backends = [place.accepted(server)]
    place.use(again)
    place.turn()
    assert (len(place.shared), sock.fileno()) == (1, -1)
    after = place.client("127.0.0.1", asked)
    backends.append(place.accepted(server))
    for client, backend in zip((before, after), backends, strict=True):
        client.send(b"here")
        assert place.got(partial(backend.recv, 100)) == b"here"


def test_whoever_takes_a_client_over_is_told_where_it_is_to_get_to(place: Place) -> None:
    server = place.bound(TCP, "127.0.0.1")
    asked = place.use(place.bound(TCP, "127.0.0.1"))
    port = place.publish("127.0.0.1", (asked - 3, asked), server, shift=3)
    taken: list[tuple[object, int]] = []

    def take(of: stream.StreamPort, number: int, client: socket.SocketType) -> None:
        taken.append((of, number))
        client.close()

    place.streams.find_delegate = lambda: take
    client = place.client("127.0.0.1", asked)
    assert place.got(lambda: client.recv(1)) == b""
    assert taken == [(port, port_of(server))]


def test_ports_of_tcp_are_numbered(place: Place) -> None:
    """Other processes know them by that."""
    server = place.bound(TCP, "127.0.0.1")
    ports = [place.publish("127.0.0.1", (number, number), server) for number in (8000, 8001)]
    assert [port.key for port in ports if isinstance(port, stream.StreamPort)] == [1, 2]


# UDP.  Outlets are bound to the unspecified address; what stands for the shared socket has one, so it is preferred.


def udp(place: Place, address: str = "127.0.0.1") -> tuple[socket.socket, socket.socket, int]:
    """A backend, a client, and the port of a socket that is shared."""
    sock = place.bound(UDP, address)
    return place.bound(UDP, address), place.bound(UDP, address), place.use(sock)


@pytest.mark.parametrize(("address", "at"), [("127.0.0.1", "0.0.0.0"), ("::1", "::"), ("::1", "0:0:0::")])
def test_an_answer_leaves_from_the_port_that_was_asked(place: Place, address: str, at: str) -> None:
    server, client, asked = udp(place, address)
    place.publish(at, (asked - 3, asked + 3), server, shift=3)
    for _ in range(2):
        client.sendto(b"ask", (address, asked))
        data, relay = place.told(server)
        assert data == b"ask"
        server.sendto(b"answer", relay)
        assert place.told(client) == (b"answer", (address, asked))


def test_a_datagram_gets_to_the_range_of_the_very_address_before_that_of_all(place: Place) -> None:
    exact, any_ = place.bound(UDP, "127.0.0.1"), place.bound(UDP, "127.0.0.1")
    client, asked = place.bound(UDP, "127.0.0.1"), place.use(place.bound(UDP, "0.0.0.0"))
    place.publish("0.0.0.0", (asked, asked), any_)
    place.publish("127.0.0.1", (asked - 1, asked), exact, shift=1)
    for address, server in (("127.0.0.1", exact), ("127.0.0.2", any_)):
        client.sendto(address.encode(), (address, asked))
        data, relay = place.told(server)
        server.sendto(b"answer", relay)
        assert data == address.encode()
        assert place.told(client) == (b"answer", (address, asked))


def test_a_datagram_for_nobody_is_dropped_and_whoever_comes_later_is_served(place: Place) -> None:
    server, client, asked = udp(place)
    client.sendto(b"too early", ("127.0.0.1", asked))
    place.turn()
    place.publish("0.0.0.0", (asked, asked), server)
    client.sendto(b"in time", ("127.0.0.1", asked))
    assert place.told(server)[0] == b"in time"
    assert place.said == []


def test_clients_of_a_port_are_answered_by_one_socket_for_as_long_as_they_are_known(place: Place) -> None:
    server, first, asked = udp(place)
    second = place.bound(UDP, "127.0.0.1")
    place.publish("0.0.0.0", (asked, asked), server)
    before = socket_count()
    for number, client in enumerate((first, second)):
        client.sendto(b"ask", ("127.0.0.1", asked))
        place.told(server)
        assert socket_count() == before + 2 + number, "one for the port, and one to the backend for each client"
    place.pass_seconds(Settings().udp_timeout_s + 2)
    assert socket_count() == before
    first.sendto(b"again", ("127.0.0.1", asked))
    _, relay = place.told(server)
    server.sendto(b"answer", relay)
    assert place.told(first) == (b"answer", ("127.0.0.1", asked))


def test_answers_of_one_round_leave_each_from_its_port(place: Place) -> None:
    server, clients, asked, relays = place.bound(UDP, "127.0.0.1"), [], [], []
    for number in range(2):
        clients.append(place.bound(UDP, "127.0.0.1"))
        asked.append(place.use(place.bound(UDP, "127.0.0.1")))
        place.publish("0.0.0.0", (asked[number], asked[number]), server)
        clients[number].sendto(b"ask", ("127.0.0.1", asked[number]))
        relays.append(place.told(server)[1])
    for number in (0, 1, 0, 1, 1):
        server.sendto(b"answer", relays[number])
    for number, times in ((0, 2), (1, 3)):
        told = [place.told(clients[number]) for _ in range(times)]
        assert told == [(b"answer", ("127.0.0.1", asked[number]))] * times


def test_with_a_withdrawn_range_its_clients_go(place: Place) -> None:
    server, client, asked = udp(place)
    port = place.publish("0.0.0.0", (asked, asked), server)
    before = socket_count()
    client.sendto(b"ask", ("127.0.0.1", asked))
    place.told(server)
    port.close()
    place.turn()
    assert socket_count() == before
    client.sendto(b"too late", ("127.0.0.1", asked))
    place.turn()
    with pytest.raises(BlockingIOError):
        server.recv(100)


@pytest.mark.parametrize("times", [1, 2, 20])
def test_a_client_is_known_after_the_socket_was_handed_over_anew(place: Place, times: int) -> None:
    sock = place.bound(UDP, "127.0.0.1")
    again = [place.again(sock) for _ in range(times)]
    server, client, asked = place.bound(UDP, "127.0.0.1"), place.bound(UDP, "127.0.0.1"), place.use(sock)
    port = place.publish("0.0.0.0", (asked, asked), server)
    client.sendto(b"ask", ("127.0.0.1", asked))
    _, relay = place.told(server)
    for one in again:
        place.use(one)
        client.sendto(b"ask", ("127.0.0.1", asked))
        assert place.told(server) == (b"ask", relay)
        server.sendto(b"answer", relay)
        assert place.told(client) == (b"answer", ("127.0.0.1", asked))
    place.turn()
    before = socket_count()
    port.close()
    place.turn()
    assert socket_count() == before - 2, "one for the port, and one to the backend"


def test_a_client_is_forgotten_though_the_socket_was_handed_over_anew(place: Place) -> None:
    sock = place.bound(UDP, "127.0.0.1")
    again = place.again(sock)
    server, client, asked = place.bound(UDP, "127.0.0.1"), place.bound(UDP, "127.0.0.1"), place.use(sock)
    place.publish("0.0.0.0", (asked, asked), server)
    before = socket_count()
    client.sendto(b"ask", ("127.0.0.1", asked))
    place.told(server)
    place.use(again)
    place.pass_seconds(Settings().udp_timeout_s + 2)
    assert socket_count() == before - 1, "the former socket is closed, too"
    client.sendto(b"ask", ("127.0.0.1", asked))
    assert place.told(server)[0] == b"ask"


def test_a_port_that_cannot_be_answered_from_is_told_and_leaves_no_socket(place: Place) -> None:
    server, client, asked = udp(place)
    place.publish("0.0.0.0", (asked, asked), server)
    before = socket_count()
    for left in (0, 1):  # for neither socket that a client needs, and for one
        client.sendto(b"ask", ("127.0.0.1", asked))
        with no_more_than(left):
            place.turn()
        assert socket_count() == before
        assert place.said.pop().startswith(f"cannot reach udp 127.0.0.1:{port_of(server)}: ")
        place.clock.now_s += 1
    client.sendto(b"ask again", ("127.0.0.1", asked))
    assert place.told(server)[0] == b"ask again"


def test_without_descriptors_the_client_that_was_silent_longest_goes(place: Place) -> None:
    server, other = place.bound(UDP, "127.0.0.1"), place.bound(UDP, "127.0.0.1")
    sock, first, second = (place.bound(UDP, "127.0.0.1") for _ in range(3))
    place.publish("0.0.0.0", (port_of(sock), port_of(sock)), server)
    asked = place.use(place.bound(UDP, "127.0.0.1"))
    place.publish("0.0.0.0", (asked, asked), other)
    first.sendto(b"ask", ("127.0.0.1", asked))
    place.told(other)
    place.use(sock)
    second.sendto(b"ask", ("127.0.0.1", port_of(sock)))
    with no_more_than(1):
        data, relay = place.told(server)
    assert (data, len(place.datagrams.clients)) == (b"ask", 1)
    server.sendto(b"answer", relay)
    assert place.told(second) == (b"answer", ("127.0.0.1", port_of(sock)))


def test_without_descriptors_the_port_of_the_client_that_goes_is_still_answered_from(place: Place) -> None:
    server, first, asked = udp(place)
    second = place.bound(UDP, "127.0.0.1")
    place.publish("0.0.0.0", (asked, asked), server)
    first.sendto(b"ask", ("127.0.0.1", asked))
    place.told(server)
    second.sendto(b"ask", ("127.0.0.1", asked))
    with no_more_than(0):
        data, relay = place.told(server)
    assert (data, len(place.datagrams.clients)) == (b"ask", 1)
    server.sendto(b"answer", relay)
    assert place.told(second) == (b"answer", ("127.0.0.1", asked))


def test_a_socket_of_udp_comes_with_the_map_in_which_to_say_what_is_bound(place: Place) -> None:
    with place.bound(UDP, "127.0.0.1") as sock, pytest.raises(InvalidRequest, match="no map came"):
        place.shared.use(UDP, socket.AF_INET, sock, None)
    assert len(place.shared) == 0


def test_only_a_socket_that_is_being_bound_may_have_a_published_port(place: Place) -> None:
    binding = Binding(place.binding_fd)
    sock = place.bound(UDP, "127.0.0.1")
    nobody = bytes(8)
    with binding.allowed(sock):
        assert os.pread(place.binding_fd, 8, 0) == sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8) != nobody
    assert os.pread(place.binding_fd, 8, 0) == nobody
    with pytest.raises(OSError, match="taken"), binding.allowed(sock):
        raise OSError("taken")
    assert os.pread(place.binding_fd, 8, 0) == nobody


def test_what_a_port_is_answered_by_is_said_before_it_is_bound(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[tuple[str, int]] = []

    @contextmanager
    def allow(_binding: Binding, sock: socket.socket) -> Iterator[None]:
        assert port_of(sock) == 0
        yield
        allowed.append(sock.getsockname())

    monkeypatch.setattr(Binding, "allowed", allow)
    server, client, asked = udp(place)
    place.publish("0.0.0.0", (asked - 1, asked + 1), server, shift=1)
    client.sendto(b"ask", ("127.0.0.1", asked))
    place.told(server)
    assert allowed == [("0.0.0.0", asked)]
