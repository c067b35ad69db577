"""Ports that share sockets: which port a client asked for, where answers leave from, and what unpublishing removes.

No traffic is steered here: a socket bound to one port stands for the one to which the kernel steers many.
"""

import gc
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
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
from gangway.relay.protocol import canonical
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend, PublishedRange
from tests.unit.descriptors import socket_count

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_SO_COOKIE = 57

_Result = TypeVar("_Result")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Relay:
    """A relay's shared sockets, in this process.  All sockets are closed at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.log_lines: list[str] = []
        settings, log = Settings(workers=1), Log(lambda _level, line: self.log_lines.append(line), self.clock)
        self.streams = Streams(self.loop, settings, log)
        self.datagrams = Datagrams(self.loop, settings, log)
        self.shared = SharedSockets(self.streams, self.datagrams)
        self.binding_fd = os.memfd_create("binding")
        stack.callback(os.close, self.binding_fd)
        os.truncate(self.binding_fd, os.sysconf("SC_PAGESIZE"))

    def turn(self) -> None:
        """Run one round without waiting."""
        self.loop.call_soon(lambda _events: None, 0)
        self.loop.turn()

    def wait_for(self, get: Callable[[], _Result]) -> _Result:
        """Run rounds until a non-blocking call succeeds; return its result."""
        while True:
            try:
                return get()
            except BlockingIOError:
                self.turn()

    def bound(self, protocol: int, address: str, port: int = 0) -> socket.socket:
        """Return a bound, non-blocking socket; for TCP it listens."""
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
        """Share a socket; return its port."""
        self.shared.use(sock.proto, sock.family, sock, self.binding_fd if sock.proto == UDP else None)
        return port_of(sock)

    def duplicate(self, sock: socket.socket) -> socket.socket:
        """Return a duplicate, as it comes with another message."""
        return self._stack.enter_context(sock.dup())

    def publish(
        self, at: str, ports: tuple[int, int], to: socket.socket, shift: int = 0
    ) -> stream.StreamPort | datagram.DatagramPort:
        """Publish a range; clients of its first port + `shift` are connected to the socket `to`."""
        address, port = to.getsockname()[:2]
        family = socket.AF_INET6 if ":" in at else socket.AF_INET
        published = PublishedRange(to.proto, family, canonical(at), *ports)
        found = self.shared.publish(published, Backend(to.proto, to.family, address, port - shift))
        assert isinstance(found, stream.StreamPort | datagram.DatagramPort)
        return found

    def client(self, address: str, port: int) -> socket.socket:
        """Return a TCP client, which the kernel connects before the relay accepts it."""
        sock = self._stack.enter_context(socket.create_connection((address, port), 5))
        sock.setblocking(False)
        return sock

    def accepted(self, server: socket.socket) -> socket.socket:
        """Wait for a connection to a backend, and accept it."""
        sock = self._stack.enter_context(self.wait_for(lambda: server.accept()[0]))
        sock.setblocking(False)
        return sock

    def receive(self, sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
        """Wait for a datagram; return it and its sender."""
        data, address = self.wait_for(lambda: sock.recvfrom(100))
        return data, address[:2]

    def pass_seconds(self, seconds: float) -> None:
        """Let seconds pass, with a round for each."""
        for _ in range(round(seconds)):
            self.clock.now_s += 1
            self.turn()

    def close(self) -> None:
        """Remove all flows and clients."""
        for flow in tuple(self.streams.flows):
            flow.on(Event.UNPUBLISHED)
        for client in tuple(self.datagrams.clients):
            client.remove()
        self.loop.close()


@pytest.fixture
def relay() -> Iterator[Relay]:
    gc.collect()  # garbage of earlier tests must not free descriptors later, while a test limits them
    with ExitStack() as stack:
        made = Relay(stack)
        yield made
        made.close()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Allow this many new descriptors in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]
    for fd in fds:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# TCP


def test_client_is_connected_to_the_backend_port_at_the_same_offset(relay: Relay) -> None:
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port - 3, host_port + 2), server, shift=3)
    client = relay.client("127.0.0.1", host_port)
    backend = relay.accepted(server)
    client.send(b"request")
    assert relay.wait_for(lambda: backend.recv(100)) == b"request"
    backend.send(b"answer")
    assert relay.wait_for(lambda: client.recv(100)) == b"answer"


def test_exact_address_is_preferred_to_unspecified(relay: Relay) -> None:
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
def test_adjacent_ranges_do_not_overlap(relay: Relay, touching: int) -> None:
    server, other = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port, host_port), server)
    relay.publish("127.0.0.1", (host_port + touching, host_port + touching), other)
    relay.client("127.0.0.1", host_port)
    relay.accepted(server)
    with pytest.raises(BlockingIOError):
        other.accept()


@pytest.mark.parametrize("at", ["::1", "0:0::0001", "::", "0:0:0:0::"])
def test_ipv6_address_matches_in_any_notation(relay: Relay, at: str) -> None:
    """And its container may have IPv4 only."""
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "::1"))
    relay.publish(at, (host_port, host_port), server)
    relay.client("::1", host_port)
    relay.accepted(server)


def test_client_that_waited_while_its_port_was_unpublished_is_refused(relay: Relay) -> None:
    """As if nobody had listened; clients of other ports of the same socket are not."""
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "0.0.0.0"))
    unpublished = relay.publish("127.0.0.1", (host_port - 1, host_port), server, shift=1)
    relay.publish("127.0.0.2", (host_port, host_port), server)
    waiting = relay.client("127.0.0.1", host_port)
    unpublished.close()
    stays = relay.client("127.0.0.2", host_port)
    with pytest.raises(ConnectionResetError):
        relay.wait_for(lambda: waiting.recv(1))
    backend = relay.accepted(server)
    stays.send(b"here")
    assert relay.wait_for(lambda: backend.recv(100)) == b"here"
    with pytest.raises(BlockingIOError):
        server.accept()
    assert relay.log_lines == []


def test_refused_client_leaves_no_socket(relay: Relay) -> None:
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    client = relay.client("127.0.0.1", host_port)
    before = socket_count()
    with pytest.raises(ConnectionResetError):
        relay.wait_for(lambda: client.recv(1))
    assert socket_count() == before


def test_unpublishing_ends_only_the_connections_of_its_range(relay: Relay) -> None:
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


def test_ports_of_an_unpublished_range_can_be_published_again(relay: Relay) -> None:
    before, after = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    relay.publish("127.0.0.1", (host_port - 5, host_port + 5), before).close()
    relay.publish("127.0.0.1", (host_port, host_port), after)
    relay.client("127.0.0.1", host_port)
    relay.accepted(after)


def test_clients_that_waited_for_the_shared_socket_are_served(relay: Relay) -> None:
    """Ranges come first: with a relay that comes after another, clients are waiting already."""
    server, sock = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    client = relay.client("127.0.0.1", port_of(sock))
    relay.publish("127.0.0.1", (port_of(sock), port_of(sock)), server)
    assert len(relay.shared) == 0
    relay.use(sock)
    assert len(relay.shared) == 1
    backend = relay.accepted(server)
    client.send(b"still here")
    assert relay.wait_for(lambda: backend.recv(100)) == b"still here"


def test_socket_passed_again_replaces_the_former(relay: Relay) -> None:
    server, sock = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    again = relay.duplicate(sock)
    host_port = relay.use(sock)
    relay.publish("127.0.0.1", (host_port, host_port), server)
    before = relay.client("127.0.0.1", host_port)
    backends = [relay.accepted(server)]
    relay.use(again)
    relay.turn()
    assert (len(relay.shared), sock.fileno()) == (1, -1)
    after = relay.client("127.0.0.1", host_port)
    backends.append(relay.accepted(server))
    for client, backend in zip((before, after), backends, strict=True):
        client.send(b"here")
        assert relay.wait_for(partial(backend.recv, 100)) == b"here"


def test_delegate_gets_the_backend_port(relay: Relay) -> None:
    server = relay.bound(TCP, "127.0.0.1")
    host_port = relay.use(relay.bound(TCP, "127.0.0.1"))
    port = relay.publish("127.0.0.1", (host_port - 3, host_port), server, shift=3)
    delegated: list[tuple[object, int]] = []

    def delegate(of: stream.StreamPort, number: int, client: socket.SocketType) -> None:
        delegated.append((of, number))
        client.close()

    relay.streams.find_delegate = lambda: delegate
    client = relay.client("127.0.0.1", host_port)
    assert relay.wait_for(lambda: client.recv(1)) == b""
    assert delegated == [(port, port_of(server))]


def test_stream_ports_are_numbered(relay: Relay) -> None:
    """Other processes know them by that."""
    server = relay.bound(TCP, "127.0.0.1")
    ports = [relay.publish("127.0.0.1", (number, number), server) for number in (8000, 8001)]
    assert [port.key for port in ports if isinstance(port, stream.StreamPort)] == [1, 2]


# UDP.  Outlets are bound to the unspecified address; what stands for the shared socket has one, so it is preferred.


def udp(relay: Relay, address: str = "127.0.0.1") -> tuple[socket.socket, socket.socket, int]:
    """Return a backend, a client, and the port of a shared socket."""
    sock = relay.bound(UDP, address)
    return relay.bound(UDP, address), relay.bound(UDP, address), relay.use(sock)


@pytest.mark.parametrize(("address", "at"), [("127.0.0.1", "0.0.0.0"), ("::1", "::"), ("::1", "0:0:0::")])
def test_answer_leaves_from_the_destination_port(relay: Relay, address: str, at: str) -> None:
    server, client, host_port = udp(relay, address)
    relay.publish(at, (host_port - 3, host_port + 3), server, shift=3)
    for _ in range(2):
        client.sendto(b"request", (address, host_port))
        data, sender = relay.receive(server)
        assert data == b"request"
        server.sendto(b"answer", sender)
        assert relay.receive(client) == (b"answer", (address, host_port))


def test_datagram_prefers_exact_address_to_unspecified(relay: Relay) -> None:
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


def test_datagram_for_unpublished_port_is_dropped(relay: Relay) -> None:
    server, client, host_port = udp(relay)
    client.sendto(b"too early", ("127.0.0.1", host_port))
    relay.turn()
    relay.publish("0.0.0.0", (host_port, host_port), server)
    client.sendto(b"in time", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"in time"
    assert relay.log_lines == []


def test_clients_of_a_port_share_one_outlet_while_they_are_known(relay: Relay) -> None:
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


def test_answers_of_one_round_leave_from_their_own_ports(relay: Relay) -> None:
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


def test_unpublishing_removes_the_clients_of_its_range(relay: Relay) -> None:
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
def test_client_is_recognized_after_the_socket_was_passed_again(relay: Relay, times: int) -> None:
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


def test_client_expires_after_the_socket_was_passed_again(relay: Relay) -> None:
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


def test_failure_to_open_sockets_is_logged_and_leaves_none(relay: Relay) -> None:
    server, client, host_port = udp(relay)
    relay.publish("0.0.0.0", (host_port, host_port), server)
    before = socket_count()
    for left in (0, 1):  # for neither socket that a client needs, and for one
        client.sendto(b"request", ("127.0.0.1", host_port))
        with free_descriptors(left):
            relay.turn()
        assert socket_count() == before
        assert relay.log_lines.pop().startswith(f"cannot reach udp 127.0.0.1:{port_of(server)}: ")
        relay.clock.now_s += 1
    client.sendto(b"second request", ("127.0.0.1", host_port))
    assert relay.receive(server)[0] == b"second request"


def test_without_descriptors_the_longest_idle_client_is_removed(relay: Relay) -> None:
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


def test_without_descriptors_the_outlet_of_the_removed_client_stays_usable(relay: Relay) -> None:
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


def test_udp_socket_needs_the_binding_map(relay: Relay) -> None:
    with relay.bound(UDP, "127.0.0.1") as sock, pytest.raises(InvalidRequest, match="no map came"):
        relay.shared.use(UDP, socket.AF_INET, sock, None)
    assert len(relay.shared) == 0


def test_binding_is_allowed_only_within_the_block(relay: Relay) -> None:
    binding = Binding(relay.binding_fd)
    sock = relay.bound(UDP, "127.0.0.1")
    unset = bytes(8)
    with binding.allowed(sock):
        assert os.pread(relay.binding_fd, 8, 0) == sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8) != unset
    assert os.pread(relay.binding_fd, 8, 0) == unset
    with pytest.raises(OSError, match="in use"), binding.allowed(sock):
        raise OSError("in use")
    assert os.pread(relay.binding_fd, 8, 0) == unset


def test_outlet_is_allowed_before_it_is_bound(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
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
