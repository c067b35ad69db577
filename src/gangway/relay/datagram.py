"""Relays datagrams: UDP.

What this file knows: sockets, clients, and when one is forgotten.  What it must not know: where listeners come from,
that there are other processes.

How it works.  Clients arrive at a `Receiver`, a socket that serves one `Port` or many.  For each of them the relay
keeps a `Client`: a socket connected to the backend, whose port is what the backend knows the client by, and the way
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

* ip(7), struct in_pktinfo: `ipi_spec_dst` is the local address for the datagram: the one that was asked or, for a
  broadcast, the interface's own; given to sendmsg it is the source of the answer.  With `ipi_ifindex` 0 routing picks
  the interface.
* ipv6(7), struct in6_pktinfo: address and interface; the interface matters to link-local addresses only.  A multicast
  address cannot be a source: the kernel chooses.
* A dual-stack socket tells the IPv4 way (IP_PKTINFO) too, if asked: only there does a broadcast have its interface's
  address (net/ipv6/udp.c, udpv6_recvmsg and udpv6_sendmsg know both).
* A connected UDP socket reports the backend's ICMP "port unreachable" as ECONNREFUSED once, to whatever call comes
  next; a send that reports it has sent nothing (net/core/sock.c, sock_error).
"""

import errno
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from gangway.relay.batch import BATCH, Ancillary, Inbox, Outbox, read_label, write_label
from gangway.relay.log import Log
from gangway.relay.loop import READABLE, Loop
from gangway.relay.pump import OUT_OF_DESCRIPTORS
from gangway.relay.settings import Settings
from gangway.relay.stream import Backend, Closable

_IP_PKTINFO = 8  # include/uapi/linux/in.h; Python 3.11 does not name it
_IP_ORIGDSTADDR = 20
_IPV6_ORIGDSTADDR = 74  # include/uapi/linux/in6.h
_ASKED4 = socket.IPPROTO_IP, _IP_PKTINFO
_ASKED6 = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO
_ORIGINAL = {(socket.IPPROTO_IP, _IP_ORIGDSTADDR), (socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR)}
_LINK_LOCAL = 0xFE80 >> 6
_MULTICAST = 0xFF
# Labels that a client is known by: one for each interface and broadcast address that it came to.
_LABELS = 8


class Key(NamedTuple):
    """What a client is known by."""

    sockaddr: bytes
    """Its struct sockaddr."""
    asked: bytes
    """The host address that it asked, as `_asked4` and `_asked6` give it."""
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

    __slots__ = ("backend", "key", "labels", "outlet", "port", "receive", "receiver", "seen_tick", "send", "way_back")

    def __init__(self, port: "Port", key: Key, receiver: "Receiver", backend: socket.socket, outlet: Outlet) -> None:
        self.port = port
        self.key = key
        self.receiver = receiver
        self.outlet = outlet
        self.labels: list[bytes] = []
        self.way_back = write_label(key.sockaddr, _way_back(key.asked))
        self.backend = backend
        self.send = backend.send
        self.receive = backend.recv_into
        self.seen_tick = port.datagrams.tick
        outlet.clients += 1

    def answer(self, _events: int) -> None:
        """Takes one datagram that the backend has sent; epoll says if there are more."""
        outlet, datagrams = self.outlet, self.port.datagrams
        if self.seen_tick != datagrams.tick:
            datagrams.saw(self)
        if datagrams.answering is not outlet:
            datagrams.send_answers()
            datagrams.answering = outlet
        outbox = datagrams.outbox
        try:
            size = self.receive(outbox.room())
        except OSError:  # ECONNREFUSED: the container refused an earlier datagram, and that ends nothing
            return
        outbox.add(size, self.way_back)
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
        self.port.leave(self.key.port)


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

    def saw(self, client: Client) -> None:
        """Something was moved for `client`, for the first time in this tick."""
        client.seen_tick = self.tick
        del self.clients[client]
        self.clients[client] = None

    def remember(self, client: Client) -> None:
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
            self.outbox.send(outlet.fd, lambda error: self.lost(error, "to a client", outlet.backend))

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

    def lost(self, error: OSError, whither: str, backend: Backend) -> None:
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

    def __init__(self, datagrams: Datagrams, sock: socket.socket, find: Callable[[bytes, int], "Port | None"]) -> None:
        self.datagrams = datagrams
        self.fd = sock.fileno()
        self.known: dict[bytes, Client] = {}
        """The clients by the labels that their datagrams came with."""
        self._sock = sock
        self._find = find
        self._asked = _asked6 if sock.family == socket.AF_INET6 else _asked4
        sock.setblocking(False)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        datagrams.loop.add(self.fd, self._ready, READABLE)

    def tell_ports(self) -> None:
        """It serves many ports: which one was asked is to come with each datagram."""
        if self._sock.family == socket.AF_INET6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR, 1)
        else:
            self._sock.setsockopt(socket.IPPROTO_IP, _IP_ORIGDSTADDR, 1)

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
                self.datagrams.saw(client)
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
            self.datagrams.lost(error, "to the container", client.port.backend)

    def _recognize(self, label: bytes) -> Client | None:
        """Whose datagrams come with a label not seen before: a new client's, mostly."""
        sockaddr, ancillary = read_label(label)
        key = Key(sockaddr, self._asked(ancillary), _asked_port(ancillary))
        port = self._find(key.asked, key.port)
        client = None if port is None else port.clients.get(key) or port.meet(key, self)
        if client is not None:
            if client.receiver is not self:  # the daemon has handed the socket over anew
                client.receiver, client.labels = self, []
            if len(client.labels) == _LABELS:
                del self.known[client.labels.pop(0)]
            client.labels.append(label)
            self.known[label] = client
        return client


class Port:
    """A published UDP port, or a range of them: its backend, its clients.

    `first` is the port whose clients get to the backend's; `bind` makes a socket that a port of them is answered by.
    """

    def __init__(
        self, datagrams: Datagrams, backend: Backend, first: int, bind: Callable[[int], socket.socket]
    ) -> None:
        self.datagrams = datagrams
        self.backend = backend
        self.clients: dict[Key, Client] = {}
        self.way_in: Closable | None = None
        self._first = first
        self._bind = bind
        self._outlets: dict[int, Outlet] = {}

    def close(self) -> None:
        """The port is withdrawn, and its clients with it."""
        if self.way_in is not None:
            self.way_in.close()
        for client in tuple(self.clients.values()):
            client.forget()

    def meet(self, key: Key, receiver: Receiver) -> Client | None:
        """A new client; None when the backend cannot be reached, or there is no descriptor even after forgetting
        another."""
        to = self.backend._replace(port=self.backend.port + key.port - self._first)
        try:
            outlet = self.outlet(key.port)
            backend = self._open_backend(to)
        except OSError as error:
            self.datagrams.log.warning("cannot reach %s: %s", to, error.strerror)
            self.leave(key.port)
            return None
        client = self.clients[key] = Client(self, key, receiver, backend, outlet)
        self.datagrams.remember(client)
        self.datagrams.loop.add(backend.fileno(), client.answer, READABLE)
        return client

    def leave(self, port: int) -> None:
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


def arriving(datagrams: Datagrams, backend: Backend, sock: socket.socket) -> Port:
    """A port that has a socket of its own, and answers by it."""
    port = Port(datagrams, backend, 0, lambda _port: sock)
    port.outlet(0).clients += 1  # it is needed, and closed, as the way in
    port.way_in = Receiver(datagrams, sock, lambda _asked, _port: port)
    return port


def _asked_port(ancillary: Ancillary) -> int:
    """The host port that a shared socket's client asked (struct sockaddr_in and _in6 begin alike); 0 of any other."""
    return next((int.from_bytes(data[2:4]) for level, kind, data in ancillary if (level, kind) in _ORIGINAL), 0)


def _asked4(ancillary: Ancillary) -> bytes:
    """The host address that an IPv4 socket's client asked: ipi_spec_dst, 4 bytes."""
    return next((data[4:8] for level, kind, data in ancillary if (level, kind) == _ASKED4), b"")


def _asked6(ancillary: Ancillary) -> bytes:
    """The same of an IPv6 socket: 16 bytes and, for a link-local address, the interface (4 bytes); 4 bytes from an
    IPv4 client."""
    asked4 = _asked4(ancillary)
    if asked4:
        return asked4
    asked = next((data for level, kind, data in ancillary if (level, kind) == _ASKED6), b"")
    return asked if int.from_bytes(asked[:2]) >> 6 == _LINK_LOCAL else asked[:16]


def _way_back(asked: bytes) -> Ancillary:
    """The ancillary data that makes an answer leave from `asked`, as `_asked4` and `_asked6` give it."""
    if len(asked) == 4:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, asked, b"\0\0\0\0"))]
    if not asked or asked[0] == _MULTICAST:
        return []
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, asked.ljust(20, b"\0"))]
