"""Serves ports that have no socket of their own: one socket for each protocol and family serves them all.

The kernel steers all traffic for these ports to that socket.

How it works.  The ranges are published first and the sockets are passed after them, as clients may be waiting there.
The lookup, which is here for UDP and in the library for
byte streams, tries the range at the address that the client connected or sent to, then the one at the unspecified
address (0.0.0.0, ::).  If neither matches, the port was unpublished while the client waited in the queue.

A UDP answer has to leave from the port that the client sent to, so from a socket bound to it.  The program
`ebpf/steering.bpf.c` refuses to bind a socket to a published port, except the one whose cookie is in `binding` at that
moment: memory that the daemon shares with this process.  A port that another program holds comes with a raw socket.
"""

import errno
import mmap
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from gangway.errors import InvalidRequest
from gangway.intervals import Intervals
from gangway.relay.core.batch import request_port
from gangway.relay.core.datagram import DatagramPort, Datagrams, Receiver
from gangway.relay.core.streams import Listener, StreamPort, Streams
from gangway.relay.sockets import Backend, PublishedRange

_SO_COOKIE = 57  # include/uapi/asm-generic/socket.h
_COOKIE_BYTES = 8
_UNSPECIFIED: dict[int, str] = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}
_MIN_BUFFER_BYTES = 1  # the kernel raises it to its minimum: a socket that only sends needs no receive buffer


class Binding:
    """The variable `binding` of steering.bpf.c, mapped from its descriptor."""

    def __init__(self, fd: int) -> None:
        self._cell = mmap.mmap(fd, mmap.PAGESIZE)

    @contextmanager
    def allowed(self, sock: socket.socket) -> Iterator[None]:
        """Allow `sock` to be bound to a published port within the block."""
        self._cell[:_COOKIE_BYTES] = sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE_BYTES)
        try:
            yield
        finally:
            self._cell[:_COOKIE_BYTES] = bytes(_COOKIE_BYTES)


class SharedSockets:
    """The shared sockets, and the ranges that they serve."""

    def __init__(self, streams: Streams, datagrams: Datagrams) -> None:
        self._streams = streams
        self._datagrams = datagrams
        self._receivers: dict[tuple[int, int], Listener | Receiver] = {}
        self._bindings: dict[int, Binding] = {}
        self._ranges: dict[tuple[int, str], Intervals[DatagramPort]] = {}
        """The ranges of UDP; the library knows those of byte streams."""

    def __len__(self) -> int:
        return len(self._receivers)

    def use(self, protocol: int, family: int, sock: socket.socket, binding_fd: int | None) -> None:
        """Serve a protocol and family by `sock`, in place of the socket before it.

        UDP needs the descriptor of `binding`, too.  InvalidRequest: it is missing.
        """
        former = self._receivers.get((protocol, family))
        if protocol == socket.IPPROTO_UDP:
            if binding_fd is None:
                raise InvalidRequest("no map came with the socket: the relay is out of file descriptors")
            self._bindings[family] = Binding(binding_fd)
            request_port(sock)
            find_datagram_port = partial(self._find_datagram_port, family)
            self._receivers[protocol, family] = Receiver(self._datagrams, sock, find_datagram_port)
        else:
            self._receivers[protocol, family] = self._streams.listen(sock)
        if former is not None:
            former.close()

    def close(self) -> None:
        """Serve nobody by these sockets from now on."""
        for receiver in self._receivers.values():
            receiver.close()
        self._receivers.clear()

    def publish(
        self, ports: PublishedRange, backend: Backend, raw: socket.socket | None = None
    ) -> StreamPort | DatagramPort:
        """Publish a range; clients of its first port are connected to `backend`, those of the next to its next port.

        `raw` is the raw socket to answer from, if a UDP port is held.
        """
        if ports.protocol != socket.IPPROTO_UDP:
            return self._streams.publish_shared(ports, backend)
        port = DatagramPort(self._datagrams, backend, ports.first, partial(self._bind, ports), raw)
        self._ranges.setdefault((ports.family, ports.address), Intervals()).add(ports.first, ports.last, port)
        port.close_entrance = partial(self._remove, ports)
        return port

    def _remove(self, ports: PublishedRange) -> None:
        ranges = self._ranges[ports.family, ports.address]
        ranges.remove(ports.first)
        if not ranges:
            del self._ranges[ports.family, ports.address]

    def _find_datagram_port(self, family: int, destination: bytes, number: int) -> DatagramPort | None:
        for at in (socket.inet_ntop(family, destination[:16]), _UNSPECIFIED[family]):
            ranges = self._ranges.get((family, at))
            found = None if ranges is None else ranges.at(number)
            if found is not None:
                return found
        return None

    def _bind(self, ports: PublishedRange, port: int) -> socket.socket:
        """Return a socket that is bound to a port of a range, to answer from."""
        sock = self._datagrams.open_socket(ports.family)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the shared socket may have that very port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _MIN_BUFFER_BYTES)
            if ports.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            with self._bindings[ports.family].allowed(sock):
                sock.bind((ports.address, port))
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                raise OSError(error.errno, f"cannot answer from port {port}: another program uses it") from None
            raise
        return sock
