"""Accepts clients: of one port, or of many that share a socket.

What this file knows: listening sockets, and that a process can run out of descriptors.  What it must not know: where
listeners come from, what is done with a client.

Facts that it leans on:

* An accepted socket inherits TCP_NODELAY and the keepalive settings of its listener (net/ipv4/tcp.c, sk_clone): they
  are set once for all clients.
* A backend socket is made before its client is accepted: when the process is out of descriptors the client still
  waits in the kernel's queue, where it loses nothing.
"""

import socket
from collections.abc import Callable
from socket import SocketType

from gangway.relay.core.loop import READABLE
from gangway.relay.core.stream import RESET, StreamPort, Streams, disable_delay, enable_keepalive, open_backend
from gangway.relay.sockets import OUT_OF_DESCRIPTORS, Backend

FindPort = Callable[[SocketType], tuple[StreamPort, int] | None]
"""Whose client was accepted, and the backend's port that it is to get to; None: nobody's."""


class Listener:
    """A listening socket whose clients are those of the ports that `find` names.

    `family` is that of most of their backends.
    """

    def __init__(self, streams: Streams, sock: socket.socket, family: int, find: FindPort) -> None:
        self._streams = streams
        self._sock = sock
        self._family = family
        self._find = find
        self._is_closed = False
        disable_delay(sock)
        enable_keepalive(sock, streams.settings.keepalive_s)
        sock.setblocking(False)
        streams.loop.add(sock.fileno(), self._accept, READABLE)

    def resume(self) -> None:
        """Accepts again."""
        if not self._is_closed:
            self._streams.loop.modify(self._sock.fileno(), READABLE)

    def close(self) -> None:
        """Nobody is accepted any more."""
        self._is_closed = True
        self._streams.loop.forget(self._sock.fileno())
        self._streams.loop.close_later(self._sock)

    def _accept(self, _events: int) -> None:
        """One client; see the head of this file for the order."""
        find_delegate = self._streams.find_delegate
        taker = find_delegate() if find_delegate is not None else None
        backend = None
        try:
            backend = open_backend(self._family, self._sock.proto) if taker is None else None
            client = self._next_client()
        except OSError as error:
            if backend is not None:
                backend.close()
            if error.errno in OUT_OF_DESCRIPTORS:
                self._streams.loop.modify(self._sock.fileno(), 0)
                self._streams.pause_accepting(self.resume)
            return
        found = self._find(client)
        if found is None:
            _refuse(client, backend)
        elif taker is None:
            found[0].serve(client, found[1], backend)
        else:
            taker(*found, client)

    def _next_client(self) -> SocketType:
        """`accept()` without the wrapping in Python, which takes longer than the system call."""
        sock = self._sock
        fd, _ = sock._accept()  # type: ignore[attr-defined]  # CPython's own, beneath socket.accept
        return SocketType(sock.family, socket.SOCK_STREAM, sock.proto, fd)


def create_stream_port(streams: Streams, backend: Backend, key: int, sock: socket.socket) -> StreamPort:
    """A port that has a listening socket of its own."""
    port = StreamPort(streams, backend, key)
    port.entrance = Listener(streams, sock, backend.family, lambda _client: (port, backend.port))
    return port


def _refuse(client: SocketType, spare: SocketType | None) -> None:
    """A port that was withdrawn while a client waited: as if nobody had listened."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    if spare is not None:
        spare.close()
