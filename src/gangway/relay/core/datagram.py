"""Relays datagrams: UDP.

What this file knows: sockets, clients, and when one is forgotten.  What it must not know: where listeners come from,
that there are other processes.

How it works.  Clients arrive at a `Receiver`, a socket that serves one `DatagramPort` or many.  For each of them the
relay keeps a `Client`: a socket connected to the backend, whose port is what the backend knows the client by, and the
way
back.  Clients' datagrams come in batches, and the answers that a round of the loop finds go in batches, through memory
that serves the whole process (`batch.py`): a silent client costs a socket and some hundred bytes.

Answers leave by an `Outlet`, a socket that is bound to the port that was asked, as no other can send from there.  A
port with a socket of its own answers by that; one that shares its receiver has an outlet for as long as it has clients.

Whose a datagram is.  A client is known by its address (with the zone, if that is link-local) *and* the host address
and port that it asked: one that asks two of the host's addresses from one port must get each answer from the address
that it belongs to.  Which address was asked comes with each datagram (IP_PKTINFO, IPV6_RECVPKTINFO) and goes back with
each answer; at a receiver that is shared the port comes, too (IP_RECVORIGDSTADDR).

When one is forgotten.  `Datagrams.clients` is ordered by the last second in which something was moved, either way:
the first is the one that was silent longest.  Time is counted in ticks of one second, so a datagram costs a
comparison and no look at the clock, and a client that is busy is moved to the end of the order once a second.

Facts that it leans on:

* A connected UDP socket reports the backend's ICMP "port unreachable" as ECONNREFUSED once, to whatever call comes
  next; a send that reports it has sent nothing (net/core/sock.c, sock_error).
"""

import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from gangway.log import Log
from gangway.relay.core import pktinfo
from gangway.relay.core.batch import BATCH, Inbox, Outbox, read_label, write_label
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.core.stream import Entrance
from gangway.relay.settings import Settings
from gangway.relay.sockets import OUT_OF_DESCRIPTORS, Backend

# Labels that a client is known by: one for each interface and broadcast address that it came to.
_LABELS = 8


class ClientKey(NamedTuple):
    """What a client is known by."""

    sockaddr: bytes
    """Its struct sockaddr."""
    destination: bytes
    """The host address that it asked, as `pktinfo.destination4` and `pktinfo.destination6` give it."""
    port: int
    """And the port, if its receiver serves many; else 0."""


class Outlet:
    """A socket that answers leave by; `clients` are those that it is needed for."""

    def __init__(self, sock: socket.socket, backend: Backend) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.backend = backend
        self.clients = 0


class Client:
    """One client of a port: its backend socket, and how an answer gets back."""

    __slots__ = (
        "backend",
        "key",
        "labels",
        "outlet",
        "port",
        "receive",
        "receiver",
        "reply_label",
        "seen_tick",
        "send",
    )

    def __init__(
        self, port: "DatagramPort", key: ClientKey, receiver: "Receiver", backend: socket.socket, outlet: Outlet
    ) -> None:
        self.port = port
        self.key = key
        self.receiver = receiver
        self.outlet = outlet
        self.labels: list[bytes] = []
        self.reply_label = write_label(key.sockaddr, pktinfo.reply_ancillary(key.destination))
        self.backend = backend
        self.send = backend.send
        self.receive = backend.recv_into
        self.seen_tick = port.datagrams.tick

    def answer(self, _events: int) -> None:
        """Takes one datagram that the backend has sent; epoll says if there are more."""
        outlet, datagrams = self.outlet, self.port.datagrams
        if self.seen_tick != datagrams.tick:
            datagrams.touch(self)
        if datagrams.answering is not outlet:
            datagrams.send_answers()
            datagrams.answering = outlet
        outbox = datagrams.outbox
        try:
            size = self.receive(outbox.room())
        except OSError:  # ECONNREFUSED: the container refused an earlier datagram, and that ends nothing
            return
        outbox.add(size, self.reply_label)
        if outbox.count == 1:
            datagrams.loop.call_at_end(datagrams.send_answers)
        elif outbox.count == BATCH:
            datagrams.send_answers()

    def forget(self) -> None:
        """It is closed when the batch is done, as everything (`loop.py` says why)."""
        del self.port.clients[self.key]
        for label in self.labels:
            del self.receiver.known[label]
        del self.port.datagrams.clients[self]
        self.port.datagrams.loop.close_later(self.backend)
        self.outlet.clients -= 1
        self.port.release_outlet(self.key.port)


class Datagrams:
    """What all UDP ports of a process share: the clients, in the order in which they will be forgotten."""

    def __init__(self, loop: Loop, settings: Settings, log: Log) -> None:
        self.loop = loop
        self.settings = settings
        self.log = log
        self.tick = 0
        self.clients: dict[Client, None] = {}
        self.inbox = Inbox()
        self.outbox = Outbox()
        self.answering: Outlet | None = None
        """By which the answers in the outbox are to leave."""
        self._ticking = False

    def touch(self, client: Client) -> None:
        """Something was moved for `client`, for the first time in this tick."""
        client.seen_tick = self.tick
        del self.clients[client]
        self.clients[client] = None

    def register(self, client: Client) -> None:
        """A client is new; if there are too many, the one that was silent longest goes."""
        while len(self.clients) >= self.settings.udp_clients:
            next(iter(self.clients)).forget()
        self.clients[client] = None
        if not self._ticking:
            self._ticking = True
            self.loop.call_in(1.0, self._tick)

    def send_answers(self) -> None:
        """Empties the outbox."""
        outlet, self.answering = self.answering, None
        if outlet is not None:
            self.outbox.send(outlet.fd, lambda error: self.report_loss(error, "to a client", outlet.backend))

    def open_socket(self, family: int) -> socket.socket:
        """A socket; when there is no descriptor left, with that of the client that was silent longest.

        It is closed in the midst of a batch, but its number is taken at once by another UDP socket, and that is not
        harmed by an event that is not its own.
        """
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        try:
            return socket.socket(family, kind)
        except OSError as error:
            oldest = next(iter(self.clients), None)
            if error.errno not in OUT_OF_DESCRIPTORS or oldest is None:
                raise
            oldest.forget()
            oldest.backend.close()
            return socket.socket(family, kind)

    def report_loss(self, error: OSError, whither: str, backend: Backend) -> None:
        """A datagram could not be sent.  That is no error of the relay's: UDP promises nothing."""
        if error.errno != errno.EAGAIN:
            self.log.warning("udp: a datagram %s (%s) could not be sent: %s", whither, backend, error.strerror)

    def _tick(self) -> None:
        self.tick += 1
        late_tick = self.tick - self.settings.udp_timeout_s
        for client in tuple(self.clients):
            if client.seen_tick >= late_tick:
                break
            client.forget()
        self._ticking = bool(self.clients)
        if self._ticking:
            self.loop.call_in(1.0, self._tick)


class Receiver:
    """A socket that clients' datagrams arrive at.

    `find` says whose they are, of the host address and port that was asked; None: nobody's.
    """

    def __init__(
        self, datagrams: Datagrams, sock: socket.socket, find: Callable[[bytes, int], "DatagramPort | None"]
    ) -> None:
        self.datagrams = datagrams
        self.fd = sock.fileno()
        self.known: dict[bytes, Client] = {}
        """The clients by the labels that their datagrams came with."""
        self._sock = sock
        self._find = find
        self._destination = pktinfo.destination6 if sock.family == socket.AF_INET6 else pktinfo.destination4
        sock.setblocking(False)
        pktinfo.request_address(sock)
        datagrams.loop.add(self.fd, self._ready, READABLE)

    def close(self) -> None:
        """Nobody arrives any more."""
        self.datagrams.loop.forget(self.fd)
        self.datagrams.loop.close_later(self._sock)

    def _ready(self, _events: int) -> None:
        """Moves what clients have sent to the backend."""
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

    def _send_again(self, client: Client, data: memoryview, error: OSError) -> None:
        """The container's refusal of an earlier datagram is reported first, and keeps this one from being sent."""
        if error.errno == errno.ECONNREFUSED:
            with suppress(OSError):
                client.send(data)
        else:
            self.datagrams.report_loss(error, "to the container", client.port.backend)

    def _recognize(self, label: bytes) -> Client | None:
        """Whose datagrams come with a label not seen before: a new client's, mostly."""
        sockaddr, ancillary = read_label(label)
        key = ClientKey(sockaddr, self._destination(ancillary), pktinfo.destination_port(ancillary))
        port = self._find(key.destination, key.port)
        client = None if port is None else port.clients.get(key) or port.add_client(key, self)
        if client is not None:
            if client.receiver is not self:  # the daemon has handed the socket over anew
                client.receiver, client.labels = self, []
            if len(client.labels) == _LABELS:
                del self.known[client.labels.pop(0)]
            client.labels.append(label)
            self.known[label] = client
        return client


class DatagramPort:
    """A published UDP port, or a range of them: its backend, its clients.

    `first` is the port whose clients get to the backend's; `bind` makes a socket that a port of them is answered by.
    """

    def __init__(
        self, datagrams: Datagrams, backend: Backend, first: int, bind: Callable[[int], socket.socket]
    ) -> None:
        self.datagrams = datagrams
        self.backend = backend
        self.clients: dict[ClientKey, Client] = {}
        self.entrance: Entrance | None = None
        self._first = first
        self._bind = bind
        self._outlets: dict[int, Outlet] = {}

    def close(self) -> None:
        """The port is withdrawn, and its clients with it."""
        if self.entrance is not None:
            self.entrance.close()
        for client in tuple(self.clients.values()):
            client.forget()

    def add_client(self, key: ClientKey, receiver: Receiver) -> Client | None:
        """A new client; None when the backend cannot be reached, or there is no descriptor even after forgetting
        another."""
        to = self.backend._replace(port=self.backend.port + key.port - self._first)
        try:
            client = self._admit(key, receiver, to)
        except OSError as error:
            self.datagrams.log.warning("cannot reach %s: %s", to, error.strerror)
            return None
        self.datagrams.register(client)
        self.datagrams.loop.add(client.backend.fileno(), client.answer, READABLE)
        return client

    def _admit(self, key: ClientKey, receiver: Receiver, to: Backend) -> Client:
        outlet = self.outlet(key.port)
        outlet.clients += 1  # at once: who is forgotten to make room may have been the last one that it was for
        try:
            backend = self._open_backend(to)
        except OSError:
            outlet.clients -= 1
            self.release_outlet(key.port)
            raise
        client = self.clients[key] = Client(self, key, receiver, backend, outlet)
        return client

    def release_outlet(self, port: int) -> None:
        """An outlet may be needed no more."""
        outlet = self._outlets.get(port)
        if outlet is not None and not outlet.clients:
            del self._outlets[port]
            self.datagrams.loop.close_later(outlet.sock)

    def outlet(self, port: int) -> Outlet:
        """What a port is answered by, opened if need be."""
        found = self._outlets.get(port)
        if found is None:
            found = self._outlets[port] = Outlet(self._bind(port), self.backend)
        return found

    def _open_backend(self, to: Backend) -> socket.socket:
        backend = self.datagrams.open_socket(to.family)
        try:
            backend.connect((to.address, to.port))
        except OSError:
            backend.close()
            raise
        return backend


def create_datagram_port(datagrams: Datagrams, backend: Backend, sock: socket.socket) -> DatagramPort:
    """A port that has a socket of its own, and answers by it."""
    port = DatagramPort(datagrams, backend, 0, lambda _port: sock)
    port.outlet(0).clients += 1  # it is needed, and closed, as the way in
    port.entrance = Receiver(datagrams, sock, lambda _asked, _port: port)
    return port
