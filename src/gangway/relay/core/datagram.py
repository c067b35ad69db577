"""Relays datagrams: UDP.

It does not know where its sockets come from.

How it works.  Datagrams arrive at a `Receiver`, a socket that serves one `DatagramPort` or many.  For each client the
relay has a `Client`: a socket connected to the backend, whose port identifies the client to the backend, and the label
for answers to it.  Datagrams are received and sent in batches, through memory that serves the whole process
(`batch.py`): a silent client costs a socket and some hundred bytes.  Answers are sent from an `Outlet`: a socket bound
to the port that the client sent to, as no other socket can send from there.  A port with a socket of its own answers
from that; a port that shares its receiver has an outlet for as long as it has clients, or answers by a raw socket
(`raw.py`) if another program's socket has the port.

Identity.  A client is identified by its address (with the zone, if that is link-local) *and* the destination address
and port: a client that sends to two of the host's addresses from one port must get each answer from the address that
it belongs to.  The destination comes with each datagram (IP_PKTINFO, IPV6_RECVPKTINFO) and goes back with each answer;
with a shared receiver the port comes, too (IP_RECVORIGDSTADDR).

Expiry.  `Datagrams.clients` is ordered by the last second in which a datagram was moved, in either direction: the first
client is the one that was idle longest.  Time is counted in ticks of one second, so that a datagram does not read the
clock, and moves its client to the end of the order once a second only.

Kernel facts:

* A connected UDP socket reports the backend's ICMP "port unreachable" as ECONNREFUSED once, to the next call of any
  kind; a send that reports it has sent nothing (net/core/sock.c, sock_error).
"""

import errno
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from gangway.limits import exhausted, out_of_ports
from gangway.log import Log
from gangway.relay.core import batch
from gangway.relay.core.batch import BATCH, Inbox, Outbox, read_label, write_label
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.core.raw import Receive, raw_label, with_header
from gangway.relay.settings import Settings
from gangway.relay.sockets import OUT_OF_DESCRIPTORS, Backend, family_of, is_unspecified

# A client is recognized by this many labels: it has one for each interface and broadcast address that it sends to.
_LABELS = 8


class ClientKey(NamedTuple):
    """The identity of a client."""

    sockaddr: bytes  # its struct sockaddr
    destination: bytes  # the host address that it sends to, as `batch.destination4` and `batch.destination6` return it
    port: int  # the host port that it sends to, if its receiver serves many; else 0


class Outlet:
    """A socket that answers are sent from; `clients` counts those that need it."""

    def __init__(self, sock: socket.socket, backend: Backend) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.backend = backend
        self.clients = 0


class Client:
    """A client of a port: its socket to the backend, and how answers get back."""

    __slots__ = (
        "backend", "key", "labels", "outlet", "port", "receive", "receiver", "reply_label", "seen_tick", "send",
    )  # fmt: skip

    def __init__(
        self, port: "DatagramPort", key: ClientKey, receiver: "Receiver", backend: socket.socket, outlet: Outlet
    ) -> None:
        self.port = port
        self.key = key
        self.receiver = receiver
        self.outlet = outlet
        self.labels: list[bytes] = []
        self.backend = backend
        self.send = backend.send
        self.receive: Receive = backend.recv_into
        if port.raw is None:
            self.reply_label = write_label(key.sockaddr, batch.reply_ancillary(key.destination))
        else:
            self.reply_label = raw_label(key.sockaddr, key.destination)
            self.receive = with_header(self.receive, *key)
        self.seen_tick = port.datagrams.tick

    def answer(self, _events: int) -> None:
        """Receive one datagram from the backend; epoll reports if there are more."""
        outlet, datagrams = self.outlet, self.port.datagrams
        if self.seen_tick != datagrams.tick:
            datagrams.touch(self)
        if datagrams.answering is not outlet:
            datagrams.send_answers()
            datagrams.answering = outlet
        outbox = datagrams.outbox
        try:
            size = self.receive(outbox.room())
        except OSError:  # ECONNREFUSED: the container refused an earlier datagram; the client continues
            return
        outbox.add(size, self.reply_label)
        if outbox.count == 1:
            datagrams.loop.call_at_end(datagrams.send_answers)
        elif outbox.count == BATCH:
            datagrams.send_answers()

    def abort(self) -> str:
        """Remove the client after an unexpected error; its next datagram makes it a new one."""
        if self in self.port.datagrams.clients:
            self.remove()
        return f"a UDP client of {self.port.backend} was forgotten"

    def remove(self) -> None:
        """Remove the client; its socket is closed after the batch (`loop.py` explains why)."""
        del self.port.clients[self.key]
        for label in self.labels:
            del self.receiver.known[label]
        del self.port.datagrams.clients[self]
        self.port.datagrams.loop.close_later(self.backend)
        self.outlet.clients -= 1
        self.port.release_outlet(self.key.port)


class Datagrams:
    """The state that all UDP ports of a process share: the clients, in the order in which they expire."""

    def __init__(self, loop: Loop, settings: Settings, log: Log) -> None:
        self.loop = loop
        self.settings = settings
        self.log = log
        self.tick = 0
        self.clients: dict[Client, None] = {}
        self.excluded: frozenset[bytes] = frozenset()
        self.inbox = Inbox()
        self.outbox = Outbox()
        self.answering: Outlet | None = None  # the outlet for the answers in the outbox
        self._ticking = False

    def exclude(self, addresses: Iterable[str]) -> None:
        """Serve nobody at these addresses by sockets that are bound to all addresses; remove the clients there."""
        self.excluded = frozenset(socket.inet_pton(family_of(one), one) for one in addresses)
        for client in tuple(self.clients):
            if client.key.destination[:16] in self.excluded:
                client.remove()

    def touch(self, client: Client) -> None:
        """Move `client` to the end of the order, at its first datagram in this tick."""
        client.seen_tick = self.tick
        del self.clients[client]
        self.clients[client] = None

    def register(self, client: Client) -> None:
        """Add a new client; if there are too many, remove those that were idle longest."""
        while len(self.clients) >= self.settings.udp_clients:
            next(iter(self.clients)).remove()
        self.clients[client] = None
        if not self._ticking:
            self._ticking = True
            self.loop.call_in(1.0, self._tick)

    def send_answers(self) -> None:
        outlet, self.answering = self.answering, None
        if outlet is not None:
            self.outbox.send(outlet.fd, lambda error: self.report_loss(error, "a client", outlet.backend))

    def open_socket(self, family: int) -> socket.socket:
        """Return a new socket; without free descriptors, remove the client that was idle longest to get one.

        That closes a socket within a batch.  But the new one gets its number at once, and an old event does no harm.
        """
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        try:
            return socket.socket(family, kind)
        except OSError as error:
            oldest = next(iter(self.clients), None)
            if error.errno not in OUT_OF_DESCRIPTORS or oldest is None:
                raise
            oldest.remove()
            oldest.backend.close()
            return socket.socket(family, kind)

    def report_loss(self, error: OSError, receiver: str, backend: Backend) -> None:
        """Log a datagram that could not be sent.  The relay goes on: UDP guarantees no delivery."""
        if error.errno != errno.EAGAIN:
            self.log.warning("cannot send a datagram to %s (%s): dropped: %s", receiver, backend, error.strerror)

    def _tick(self) -> None:
        self.tick += 1
        late_tick = self.tick - self.settings.udp_timeout_s
        for client in tuple(self.clients):
            if client.seen_tick >= late_tick:
                break
            try:
                client.remove()
            except Exception as error:
                self.clients.pop(client, None)
                self.loop.on_error(error, f"a UDP client of {client.port.backend} was forgotten")
        self._ticking = bool(self.clients)
        if self._ticking:
            self.loop.call_in(1.0, self._tick)


class Receiver:
    """A socket that clients' datagrams arrive at.

    `find_port` returns the port for a destination address and port; None if it is not published.
    """

    def __init__(
        self, datagrams: Datagrams, sock: socket.socket, find_port: Callable[[bytes, int], "DatagramPort | None"]
    ) -> None:
        self.datagrams = datagrams
        self.fd = sock.fileno()
        self.known: dict[bytes, Client] = {}  # the clients by the labels of their datagrams
        self._sock = sock
        self._find_port = find_port
        self._destination = batch.destination6 if sock.family == socket.AF_INET6 else batch.destination4
        sock.setblocking(False)
        batch.request_address(sock)
        datagrams.loop.add(self.fd, self._ready, READABLE)

    def close(self) -> None:
        self.datagrams.loop.forget(self.fd)
        self.datagrams.loop.close_later(self._sock)

    def abort(self) -> str:
        """Go on after an unexpected error: the datagrams have been taken from the queue."""
        return "datagrams were lost"

    def _ready(self, _events: int) -> None:
        """Send the datagrams that have arrived to the backends."""
        known, tick = self.known, self.datagrams.tick
        for label, data in self.datagrams.inbox.receive(self.fd):
            client = known.get(label) or self._recognize(label)
            if client is None:
                continue
            if client.seen_tick != tick:
                self.datagrams.touch(client)
            try:
                client.send(data)
            except OSError as error:
                self._send_again(client, data, error)
            except Exception as error:
                self.datagrams.loop.fail(error, client)

    def _send_again(self, client: Client, data: memoryview, error: OSError) -> None:
        """Retry once if the error was the container's refusal of an earlier datagram; else log the loss."""
        if error.errno == errno.ECONNREFUSED:
            with suppress(OSError):
                client.send(data)
        else:
            self.datagrams.report_loss(error, "the container", client.port.backend)

    def _recognize(self, label: bytes) -> Client | None:
        """Return the client for a new label; mostly it is a new client."""
        sockaddr, ancillary = read_label(label)
        key = ClientKey(sockaddr, self._destination(ancillary), batch.destination_port(ancillary))
        port = self._find_port(key.destination, key.port)
        client = None if port is None else port.clients.get(key) or port.add_client(key, self)
        if client is not None:
            if client.receiver is not self:  # the daemon has passed the socket again
                client.receiver, client.labels = self, []
            if len(client.labels) == _LABELS:
                del self.known[client.labels.pop(0)]
            client.labels.append(label)
            self.known[label] = client
        return client


class DatagramPort:
    """A published UDP port, or a range of them: its backend and its clients.

    `first` is the host port that leads to the backend's port; `bind` returns a socket to answer from, for a host port.
    `raw` is a raw socket to answer from all of them, if none can be bound.
    """

    def __init__(
        self,
        datagrams: Datagrams,
        backend: Backend,
        first: int,
        bind: Callable[[int], socket.socket],
        raw: socket.socket | None = None,
    ) -> None:
        self.datagrams = datagrams
        self.backend = backend
        self.clients: dict[ClientKey, Client] = {}
        self.close_entrance: Callable[[], None]
        self._first = first
        self._bind = bind
        self._outlets: dict[int, Outlet] = {}
        self.raw = None if raw is None else Outlet(raw, backend)

    def close(self) -> None:
        """Stop receiving, and remove all clients: the port is unpublished."""
        self.close_entrance()
        for client in tuple(self.clients.values()):
            client.remove()
        if self.raw is not None:
            self.datagrams.loop.close_later(self.raw.sock)

    def add_client(self, key: ClientKey, receiver: Receiver) -> Client | None:
        """Return a new client; None if it is not admitted or the backend cannot be reached, or without descriptors."""
        admission = self.backend.admission
        if admission is not None and not admission.admits(batch.address_of(key.sockaddr)):
            return None
        datagrams, backend = self.datagrams, self.backend._replace(port=self.backend.port + key.port - self._first)
        try:
            outlet = self.outlet(key.port)
            outlet.clients += 1  # before the next call, which may remove the outlet's last client to free a descriptor
            try:
                client = self._open_client(key, receiver, backend, outlet)
            except OSError:
                outlet.clients -= 1
                self.release_outlet(key.port)
                raise
        except OSError as error:
            self._report_unreachable(backend, error)
            return None
        self.clients[key] = client
        datagrams.register(client)
        return client

    def release_outlet(self, port: int) -> None:
        """Close the outlet of a port if no client needs it."""
        outlet = self._outlets.get(port)
        if outlet is not None and not outlet.clients:
            del self._outlets[port]
            self.datagrams.loop.close_later(outlet.sock)

    def outlet(self, port: int) -> Outlet:
        """Return the outlet of a port; open it if there is none."""
        if self.raw is not None:
            return self.raw
        found = self._outlets.get(port)
        if found is None:
            found = self._outlets[port] = Outlet(self._bind(port), self.backend)
        return found

    def _open_client(self, key: ClientKey, receiver: Receiver, backend: Backend, outlet: Outlet) -> Client:
        """Return a new client that is connected to the backend and watched.  OSError: it cannot be."""
        sock = self.datagrams.open_socket(backend.family)
        try:
            sock.connect((backend.address, backend.port))
            client = Client(self, key, receiver, sock, outlet)
            self.datagrams.loop.add(sock.fileno(), client.answer, READABLE)
        except OSError:
            sock.close()
            raise
        return client

    def _report_unreachable(self, backend: Backend, error: OSError) -> None:
        is_ipv6 = backend.family == socket.AF_INET6
        if reason := exhausted(error) or out_of_ports(error.errno or 0, backend.protocol, is_ipv6):
            self.datagrams.log.lasting(f"new clients of {backend} are not relayed: {reason}")
        else:
            self.datagrams.log.warning("cannot reach %s: %s", backend, error.strerror)


def create_datagram_port(datagrams: Datagrams, backend: Backend, sock: socket.socket) -> DatagramPort:
    """Return a port with a socket of its own, which it answers from; one at all addresses skips excluded ones."""
    port = DatagramPort(datagrams, backend, 0, lambda _port: sock)
    port.outlet(0).clients += 1  # the receiver closes the socket
    is_anywhere = is_unspecified(sock)

    def find_port(destination: bytes, _port: int) -> DatagramPort | None:
        return None if is_anywhere and destination[:16] in datagrams.excluded else port

    port.close_entrance = Receiver(datagrams, sock, find_port).close
    return port
