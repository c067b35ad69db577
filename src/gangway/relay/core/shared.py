"""Ports that have no socket of their own: one serves all of a protocol and family.

What this file knows: that the kernel steers to that socket whatever arrives for one of them, and how to tell which one
was asked.  What it must not know: how a client is served, how the kernel is told.

How it works.  First come the ranges, then the sockets: clients may be waiting there.  A connection's local address is
the one that was asked; with each datagram comes the one that it was sent to.  The range that has it is looked up: at
that very address, then at the unspecified one (0.0.0.0, ::).  Who is at neither has waited while the port was
withdrawn.

An answer by UDP has to leave from the port that was asked, hence from a socket that is bound to it.  Nobody may bind
such a socket (`steering/steer.bpf.c`), but one whose cookie is in `binding` at that moment: memory that the daemon
shares with this process.
"""

import errno
import mmap
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from socket import SocketType
from typing import Generic, TypeVar

from gangway.errors import InvalidRequest
from gangway.intervals import Intervals
from gangway.relay.core import datagram, pktinfo, stream
from gangway.relay.core.datagram import Datagrams, Receiver
from gangway.relay.core.listener import Listener
from gangway.relay.core.stream import Entrance, Streams
from gangway.relay.sockets import Backend, PublishedRange

_SO_COOKIE = 57  # include/uapi/asm-generic/socket.h
_COOKIE_BYTES = 8
_ANY: dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
_ADDRESS_BYTES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
_LEAST_BYTES = 1  # the kernel makes of it the least that it allows: a socket that only answers receives nothing

_Port = TypeVar("_Port")


class Binding:
    """`binding` of steer.bpf.c, behind a descriptor."""

    def __init__(self, fd: int) -> None:
        self._cell = mmap.mmap(fd, mmap.PAGESIZE)

    @contextmanager
    def allowed(self, sock: socket.socket) -> Iterator[None]:
        """This socket may be bound to a published port in the block."""
        self._cell[:_COOKIE_BYTES] = sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE_BYTES)
        try:
            yield
        finally:
            self._cell[:_COOKIE_BYTES] = bytes(_COOKIE_BYTES)


class SharedSockets:
    """The sockets that are shared, and the ranges that they serve.  `new_key` numbers ports of TCP."""

    def __init__(self, streams: Streams, datagrams: Datagrams, new_key: Callable[[], int]) -> None:
        self._streams = streams
        self._datagrams = datagrams
        self._new_key = new_key
        self._entrances: dict[tuple[int, int], Entrance] = {}
        self._bindings: dict[int, Binding] = {}
        self._stream_ports: _Ranges[stream.StreamPort] = _Ranges()
        self._datagram_ports: _Ranges[datagram.DatagramPort] = _Ranges()

    def __len__(self) -> int:
        return len(self._entrances)

    def use(self, protocol: int, family: int, sock: socket.socket, binding_fd: int | None) -> None:
        """The socket of a protocol and family, in place of the one before; for UDP, `binding` is needed too."""
        former = self._entrances.get((protocol, family))
        if protocol == socket.IPPROTO_UDP:
            if binding_fd is None:
                raise InvalidRequest("no map came with the socket: the relay has no file descriptor left")
            self._bindings[family] = Binding(binding_fd)
            pktinfo.request_port(sock)
            self._entrances[protocol, family] = Receiver(self._datagrams, sock, partial(self._datagram_port, family))
        else:
            self._entrances[protocol, family] = Listener(
                self._streams, sock, family, partial(self._stream_port, family)
            )
        if former is not None:
            former.close()

    def publish(self, ports: PublishedRange, backend: Backend) -> Entrance:
        """A range, and where clients of its first port are to be taken."""
        if ports.protocol == socket.IPPROTO_UDP:
            datagrams = datagram.DatagramPort(self._datagrams, backend, ports.first, partial(self._bind, ports))
            datagrams.entrance = self._datagram_ports.add(ports, datagrams)
            return datagrams
        streams = stream.StreamPort(self._streams, backend, self._new_key())
        streams.entrance = self._stream_ports.add(ports, streams)
        return streams

    def _stream_port(self, family: int, client: SocketType) -> tuple[stream.StreamPort, int] | None:
        address, number = client.getsockname()[:2]
        found = self._stream_ports.at(family, address, number)
        return None if found is None else (found[1], found[1].backend.port + number - found[0])

    def _datagram_port(self, family: int, packed: bytes, port: int) -> datagram.DatagramPort | None:
        address = socket.inet_ntop(family, packed[: _ADDRESS_BYTES[family]])
        found = self._datagram_ports.at(family, address, port)
        return None if found is None else found[1]

    def _bind(self, ports: PublishedRange, port: int) -> socket.socket:
        """A socket that a port of a range is answered by."""
        sock = self._datagrams.open_socket(ports.family)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the one that is shared may have that very port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LEAST_BYTES)
            if ports.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            with self._bindings[ports.family].allowed(sock):
                sock.bind((ports.address, port))
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise OSError(error.errno, f"no answer can leave: another program has port {port} for now") from None
            raise
        return sock


class _Ranges(Generic[_Port]):
    """Ranges by family and address, each with its port object."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], Intervals[tuple[int, _Port]]] = {}

    def add(self, ports: PublishedRange, port: _Port) -> Entrance:
        """One more, until it is closed."""
        self._found.setdefault((ports.family, ports.address), Intervals()).add(
            ports.first, ports.last, (ports.first, port)
        )
        return _Entry(partial(self._remove, ports))

    def at(self, family: int, address: str, port: int) -> tuple[int, _Port] | None:
        """The first port of the range that has one, and its object."""
        for one in (address, _ANY[family]):
            ranges = self._found.get((family, one))
            found = None if ranges is None else ranges.at(port)
            if found is not None:
                return found
        return None

    def _remove(self, ports: PublishedRange) -> None:
        ranges = self._found[ports.family, ports.address]
        ranges.remove(ports.first)
        if not ranges:
            del self._found[ports.family, ports.address]


class _Entry:
    """A range's way in."""

    __slots__ = ("close",)

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close
