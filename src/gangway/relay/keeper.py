"""The relay's word to its keeper, who has the right to redirect sockets.

What this file knows: the messages between the two.  What it must not know: what a redirect is.

How it works.  The two have a connection from their beginning, a pair of SOCK_SEQPACKET sockets:

    relay → keeper   enter NUMBER CONTAINER-IP CONTAINER-PORT      with the port's socket (SCM_RIGHTS)
                     erase NUMBER
    keeper → relay   erased NUMBER

The keeper believes nothing that it is told about a host port: it reads that from the socket, and keeps it, so that
nobody else can have that port meanwhile.  So a relay that somebody else has got hold of can have clients led astray
only at ports that it serves anyway.

A port is served whether it is entered yet or not; but its socket is closed only when it is erased, or clients would be
led to the container on behalf of whoever has the port next.  The relay never waits: what the connection does not take
is said later, in order.  A keeper that cannot redirect closes the connection, and no more is said.
"""

import socket
from collections import deque
from collections.abc import Callable

from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.kept import Published
from gangway.relay.sockets import Backend

_MESSAGE_BYTES = 64
RETRY_S = 0.01


class Keeper:
    """The keeper at the other end of `channel`."""

    def __init__(self, loop: Loop, channel: socket.socket) -> None:
        self._loop = loop
        self._channel: socket.socket | None = channel
        self._last = 0
        self._numbers: dict[Published, int] = {}
        self._waiting: dict[int, Callable[[], None]] = {}
        self._unsaid: deque[tuple[str, socket.socket | None]] = deque()
        channel.setblocking(False)
        loop.add(channel.fileno(), self._hear, READABLE)

    def enter(self, port: Published, backend: Backend, sock: socket.socket) -> None:
        """Clients of a port, whose socket this is, are to be led to `backend`."""
        self._last += 1
        self._numbers[port] = self._last
        self._say(f"enter {self._last} {backend.address} {backend.port}", sock)

    def erase(self, port: Published, then: Callable[[], None]) -> None:
        """No more; `then` is called when nobody is led there any more."""
        number = self._numbers.pop(port)
        if self._channel is None:
            then()
        else:
            self._waiting[number] = then
            self._say(f"erase {number}")

    def _say(self, text: str, sock: socket.socket | None = None) -> None:
        if self._channel is not None:
            self._unsaid.append((text, sock))
            if len(self._unsaid) == 1:
                self._send()

    def _send(self) -> None:
        while self._unsaid and self._channel is not None:
            text, sock = self._unsaid[0]
            try:
                socket.send_fds(self._channel, [text.encode()], [] if sock is None else [sock.fileno()])
            except (BrokenPipeError, ConnectionError):
                return  # it is gone, and we shall hear of it
            except OSError:  # it has not read what was said before, or the kernel is short of memory
                self._loop.call_in(RETRY_S, self._send)
                return
            self._unsaid.popleft()

    def _hear(self, _events: int) -> None:
        try:
            words = self._channel.recv(_MESSAGE_BYTES).split() if self._channel is not None else []
        except OSError:
            words = []
        if words:
            self._waiting.pop(int(words[1]))()
        elif self._channel is not None:
            self._lose(self._channel)

    def _lose(self, channel: socket.socket) -> None:
        self._loop.forget(channel.fileno())
        self._loop.close_later(channel)
        self._channel = None
        self._unsaid.clear()
        waiting, self._waiting = self._waiting, {}
        for then in waiting.values():
            then()
