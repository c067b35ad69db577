"""Accepts clients from a listening socket, which serves one port or many.

Kernel facts:

* An accepted socket inherits TCP_NODELAY and the keepalive settings of its listener (net/ipv4/tcp.c, sk_clone): they
  are set once for all clients.
* A client that is not accepted waits in the kernel's queue and loses nothing.  So the backend's socket is made first:
  if the process is out of descriptors, the client keeps waiting.
"""

import socket
from collections.abc import Callable
from socket import SocketType

from gangway.relay.core.loop import READABLE
from gangway.relay.core.stream import RESET, StreamPort, Streams, disable_delay, enable_keepalive, open_backend
from gangway.relay.sockets import OUT_OF_DESCRIPTORS, Backend

FindPort = Callable[[SocketType], tuple[StreamPort, int] | None]
"""Returns the port that an accepted client connected to, and the backend's port for it; None if it is unpublished."""


class Listener:
    """Accepts clients from a listening socket for the ports that `find_port` returns.

    `family` is the family of most of their backends.
    """

    def __init__(self, streams: Streams, sock: socket.socket, family: int, find_port: FindPort) -> None:
        self._streams = streams
        self._sock = sock
        self._family = family
        self._find_port = find_port
        self._is_closed = False
        disable_delay(sock)
        enable_keepalive(sock, streams.settings.keepalive_s)
        sock.setblocking(False)
        streams.loop.add(sock.fileno(), self._accept, READABLE)

    def resume(self) -> None:
        """Accept again after a pause."""
        if not self._is_closed:
            self._streams.loop.modify(self._sock.fileno(), READABLE)

    def close(self) -> None:
        """Stop accepting, and close the socket."""
        self._is_closed = True
        self._streams.loop.forget(self._sock.fileno())
        self._streams.loop.close_later(self._sock)

    def _accept(self, _events: int) -> None:
        """Accept one client, in the order that the head of this file explains."""
        find_delegate = self._streams.find_delegate
        delegate = find_delegate() if find_delegate is not None else None
        backend = None
        try:
            backend = open_backend(self._family, self._sock.proto) if delegate is None else None
            client = accept(self._sock)
        except OSError as error:
            if backend is not None:
                backend.close()
            if error.errno in OUT_OF_DESCRIPTORS:
                self._streams.loop.modify(self._sock.fileno(), 0)
                self._streams.pause_accepting(self.resume)
            return
        found = self._find_port(client)
        if found is None:
            _refuse(client, backend)
        elif delegate is None:
            found[0].serve(client, found[1], backend)
        else:
            delegate(*found, client)


def accept(sock: socket.socket) -> SocketType:
    """Accept a client, as `sock.accept()` does, with the method of CPython's C type that it is built on.

    The Python code of `accept` and its socket class costs another 4 µs for each connection, 4 % of the relay's work.
    `tests/unit/test_listener.py` checks everything that this relies on.
    """
    fd, _address = sock._accept()  # type: ignore[attr-defined]
    return SocketType(sock.family, socket.SOCK_STREAM, sock.proto, fd)


def create_stream_port(streams: Streams, backend: Backend, sock: socket.socket) -> StreamPort:
    """Return a port that accepts from a listening socket of its own."""
    port = StreamPort(streams, backend)
    port.close_entrance = Listener(streams, sock, backend.family, lambda _client: (port, backend.port)).close
    return port


def _refuse(client: SocketType, spare: SocketType | None) -> None:
    """Reset a client of a port that was unpublished while it waited, as if nothing had listened."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    if spare is not None:
        spare.close()
