"""Accepts clients of stream ports: TCP, and SCTP in its one-to-one style.

Kernel facts:

* An accepted socket inherits its listener's TCP_NODELAY and keepalive settings (net/core/sock.c, sk_clone_lock).
* A client that is not accepted waits in the kernel's queue and loses nothing.  So the backend's socket is made first:
  if the process is out of descriptors, the client keeps waiting.
"""

import socket
from collections.abc import Callable
from socket import SocketType

from gangway.limits import exhausted
from gangway.relay.core.loop import READABLE
from gangway.relay.core.stream import (
    RESET,
    RETRY_S,
    Delegate,
    StreamPort,
    Streams,
    disable_delay,
    enable_keepalive,
    open_backend,
)
from gangway.relay.sockets import Backend, is_unspecified

FindPort = Callable[[SocketType], tuple[StreamPort, int] | None]
"""Returns the port that an accepted client connected to, and the backend's port for it; None if it is unpublished."""


class Listener:
    """Accepts clients from a listening socket for the ports that `find_port` returns.

    `family` is that of most of their backends.
    """

    def __init__(self, streams: Streams, sock: socket.socket, family: int, find_port: FindPort) -> None:
        self._streams, self._sock, self._family, self._find_port = streams, sock, family, find_port
        self._is_closed = False
        disable_delay(sock)
        enable_keepalive(sock, streams.settings.keepalive_s)
        sock.setblocking(False)
        streams.loop.add(sock.fileno(), self._accept, READABLE)

    def resume(self) -> None:
        """Accept again after a pause."""
        if not self._is_closed:
            self._streams.loop.modify(self._sock.fileno(), READABLE)

    def abort(self) -> str:
        """Pause after an unexpected error: the client that it happened with may still be in the queue."""
        self._streams.loop.modify(self._sock.fileno(), 0)
        self._streams.loop.call_in(RETRY_S, self.resume)
        return f"a new client was lost; others are accepted again in {RETRY_S:g} s"

    def close(self) -> None:
        self._is_closed = True
        self._streams.loop.forget(self._sock.fileno())
        self._streams.loop.close_later(self._sock)

    def _accept(self, _events: int) -> None:
        find_delegate = self._streams.find_delegate
        delegate = find_delegate() if find_delegate is not None else None
        backend = None
        try:
            backend = open_backend(self._family, self._sock.proto) if delegate is None else None
            client = accept(self._sock)
        except OSError as error:
            if backend is not None:
                backend.close()
            if reason := exhausted(error):
                self._streams.log.lasting(f"new clients wait to be accepted: {reason}")
                self._pause()
            return
        try:
            if not self._assign(client, backend, delegate):
                self._pause()
        except Exception:
            for sock in (client, backend):
                if sock is not None:
                    sock.close()
            raise

    def _pause(self) -> None:
        self._streams.loop.modify(self._sock.fileno(), 0)
        self._streams.pause_accepting(self.resume)

    def _assign(self, client: SocketType, backend: SocketType | None, delegate: Delegate | None) -> bool:
        """Serve a client; False if a limit is reached, and other clients have to wait."""
        found = self._find_port(client)
        # Unpublished while the client waited, at an excluded address, or not for this client: as if nobody listened.
        if found is None or not _is_admitted(found[0].backend, client):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            for sock in (client, backend):
                if sock is not None:
                    sock.close()
        elif delegate is None:
            return found[0].serve(client, found[1], backend)
        else:
            delegate(*found, client)
        return True


def _is_admitted(backend: Backend, client: SocketType) -> bool:
    """True if a port is for a client; false also if the client has ended."""
    if backend.admission is None:
        return True
    try:
        return backend.admission.admits(client.getpeername()[0])
    except OSError:
        return False


def accept(sock: socket.socket) -> SocketType:
    """Accept a client, as `sock.accept()` does, with the method of CPython's C type that it is built on.

    The Python code of `accept` and its socket class costs another 4 µs for each connection, 4 % of the relay's work.
    `tests/unit/test_listener.py` checks everything that this relies on.
    """
    fd, _address = sock._accept()  # type: ignore[attr-defined]
    return SocketType(sock.family, socket.SOCK_STREAM, sock.proto, fd)


def create_stream_port(streams: Streams, backend: Backend, sock: socket.socket) -> StreamPort:
    """Return a port with a listening socket of its own; one at all addresses refuses clients of excluded ones."""
    port, is_anywhere = StreamPort(streams, backend), is_unspecified(sock)

    def find_port(client: SocketType) -> tuple[StreamPort, int] | None:
        if is_anywhere and streams.excluded:
            at = client.getsockname()[0].removeprefix("::ffff:")
            if at in streams.excluded:
                return None
        return port, backend.port

    port.close_entrance = Listener(streams, sock, backend.family, find_port).close
    return port
