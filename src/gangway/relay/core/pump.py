"""Moves the bytes of one direction of a stream from a socket to its peer.

It does not know what follows from an end or a reset (`flow.py`), nor where the sockets come from (`stream.py`).

How it works.  A `Half` moves the data that its own socket receives to its peer's socket, in one of two ways.  `_pump`
moves data that fits a small buffer with recv and send: two system calls for a message, which no other way beats.  When
several reads in a row fill the buffer, the flow is bulky, and `_pour` moves pages from socket to socket with splice(2),
without copying them to user space.  A pipe belongs to a flow only while bytes are stuck in it.

Stalls.  A half that cannot send the data that it has read holds it (at most one small buffer or one pipe full), and
does not read until the peer's socket has accepted all of it.  So a client that does not read stalls its own flow only:
TCP's window closes behind it, and memory does not grow.

Kernel facts:

* recv returns the data in the queue before it returns the reset that came after it, so a reset overtakes no data that
  the relay could have passed on.
* splice(2) from a socket blocks unless the *socket* is non-blocking; SPLICE_F_NONBLOCK applies to the pipe only
  (tcp_splice_read).
* SCTP (kernel 6.1) has no half-close.  A message is read whole or in parts but never together with the next one, so a
  short read does not mean an empty queue; after a shutdown recv can raise ENOTCONN where TCP returns the end.
"""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from socket import SocketType
from typing import NamedTuple, Protocol

from gangway.relay.core.loop import ENDED, FAILED, READABLE, WRITABLE, Loop
from gangway.relay.flow import Event
from gangway.relay.sockets import OUT_OF_DESCRIPTORS

SMALL_BYTES = 16 * 1024
# The largest message that one SCTP send passed (kernel 6.1: 212,992 bytes); larger ones are EMSGSIZE at the sender.
MESSAGE_BYTES = 256 * 1024
PIPE_BYTES = 256 * 1024
BULKY_READS = 4  # a flow is bulky after this many full reads in a row
TURN = 16  # transfers of one flow before the others get a turn
# Pipes kept for the next bulky flow: an unprivileged user's are limited by fs.pipe-user-pages-soft (64 MiB).
SPARE_PIPES = 4

_DONTWAIT = socket.MSG_DONTWAIT


class Pipe:
    """A pipe for splice, and the number of bytes in it."""

    __slots__ = ("held_bytes", "read_end", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held_bytes = 0
        with suppress(PermissionError):  # the user's pipe memory is used up: a smaller pipe works in more steps
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def close(self) -> None:
        """Close both ends; data in the pipe is lost."""
        os.close(self.read_end)
        os.close(self.write_end)


class PipePool:
    """The empty pipes of a process."""

    def __init__(self) -> None:
        self._spare: list[Pipe] = []

    def acquire(self) -> Pipe | None:
        """Return an empty pipe, or None when the process has no descriptors left for one."""
        try:
            return self._spare.pop() if self._spare else Pipe()
        except OSError as error:
            if error.errno not in OUT_OF_DESCRIPTORS:
                raise
            return None

    def release(self, pipe: Pipe) -> None:
        """Take back a pipe, which must be empty."""
        if len(self._spare) < SPARE_PIPES:
            self._spare.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        while self._spare:
            self._spare.pop().close()


class HalfEvents(NamedTuple):
    """The events that a half reports for its direction."""

    stalled: Event
    drained: Event
    ended: Event
    reset: Event


UP = HalfEvents(Event.UP_STALLED, Event.UP_DRAINED, Event.UP_ENDED, Event.CLIENT_RESET)
DOWN = HalfEvents(Event.DOWN_STALLED, Event.DOWN_DRAINED, Event.DOWN_ENDED, Event.BACKEND_RESET)


class PumpedFlow(Protocol):
    """What a half needs of its flow."""

    loop: Loop
    pipes: PipePool

    def on(self, event: Event) -> None: ...

    def abort(self) -> str: ...


class Half:
    """One side of a flow: its socket, and the direction from there to the other side."""

    __slots__ = (
        "bulky", "events", "fd", "flow", "full_reads", "held", "peer", "pipe", "reading", "recv", "send", "size",
        "sock", "was_bulky",
    )  # fmt: skip

    def __init__(self, flow: PumpedFlow, sock: SocketType, size: int, events: HalfEvents) -> None:
        self.flow = flow
        self.sock = sock
        self.fd = sock.fileno()
        self.recv = sock.recv
        self.send = sock.send
        self.size = size
        self.events = events
        self.peer: Half
        self.reading = False
        self.held: bytes | None = None
        self.pipe: Pipe | None = None
        self.full_reads = 0
        self.bulky = False
        self.was_bulky = False  # true once the half has been bulky

    def ready(self, events: int) -> None:
        """Handle the epoll events of this half's socket."""
        if events & WRITABLE:
            peer = self.peer
            if peer.held is not None or peer.pipe is not None:
                peer.drain()
        if self.reading:
            if self.bulky:
                self._pour()
            else:
                self._pump(events)
        elif events & FAILED:
            self.flow.on(self.events.reset)

    def abort(self) -> str:
        return self.flow.abort()

    def resume(self) -> None:
        """Read again after a stall.  Edges were ignored meanwhile, so this reads until the queue is empty."""
        self.ready(ENDED)

    def _pump(self, events: int) -> None:
        """Move messages to the peer until none are left, the peer's buffer is full, or other flows need a turn."""
        size, peer = self.size, self.peer
        for _ in range(TURN):
            try:
                data = self.recv(size, _DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                return self._on_receive_error(error)
            if not data:
                return self.flow.on(self.events.ended)
            try:
                sent = peer.send(data, _DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self._on_send_error()
            if sent < len(data):
                self.held = data[sent:]
                return self.flow.on(self.events.stalled)
            if len(data) < SMALL_BYTES:
                self.full_reads = 0
                if not events & ENDED and size == SMALL_BYTES:
                    return
            elif size == SMALL_BYTES and self._becomes_bulky():
                return self._pour()
        self.flow.loop.call_soon(self.ready, READABLE | ENDED)

    def _pour(self) -> None:
        """Move pages to the peer until none are left, the peer's buffer is full, or other flows need a turn."""
        pipes = self.flow.pipes
        self.flow.loop.chatty = False
        pipe = pipes.acquire()
        if pipe is None:
            self.bulky = False
            return self._pump(ENDED)
        for _ in range(TURN):
            try:
                moved = os.splice(self.fd, pipe.write_end, PIPE_BYTES, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return pipes.release(pipe)
            except OSError as error:
                pipes.release(pipe)
                return self._on_receive_error(error)
            if not moved:
                pipes.release(pipe)
                return self.flow.on(self.events.ended)
            pipe.held_bytes = moved
            try:
                self._empty(pipe)
            except BlockingIOError:
                self.pipe = pipe
                return self.flow.on(self.events.stalled)
            except OSError:
                pipe.close()
                return self._on_send_error()
            if moved < SMALL_BYTES:
                self.bulky = False
                pipes.release(pipe)
                return self._pump(ENDED)
        pipes.release(pipe)
        self.flow.loop.call_soon(self.ready, READABLE | ENDED)

    def drain(self) -> None:
        """Send held data, now that the peer's socket has buffer space again."""
        try:
            if self.held is not None:
                self.held = self.held[self.peer.send(self.held, _DONTWAIT) :] or None
            elif self.pipe is not None:
                self._empty(self.pipe)
                self.flow.pipes.release(self.pipe)
                self.pipe = None
        except BlockingIOError:
            return
        except OSError:
            return self._on_send_error()
        if self.held is None:
            self.flow.on(self.events.drained)

    def discard(self) -> None:
        """Stop reading and discard held data: the flow is over."""
        self.reading = False
        self.held = None
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None

    def _empty(self, pipe: Pipe) -> None:
        """Move all data in the pipe to the peer.  BlockingIOError: the peer's buffer is full."""
        while pipe.held_bytes:
            pipe.held_bytes -= os.splice(
                pipe.read_end, self.peer.fd, pipe.held_bytes, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
            )

    def _becomes_bulky(self) -> bool:
        """Count a full read; True after `BULKY_READS` in a row, when both sockets have been prepared for splice."""
        self.full_reads += 1
        if self.full_reads < BULKY_READS:
            return False
        self.full_reads = 0
        self.bulky = self.was_bulky = True
        os.set_blocking(self.fd, False)
        os.set_blocking(self.peer.fd, False)
        return True

    def _on_send_error(self) -> None:
        """Reset the flow because the peer accepts no more data.

        What the peer sent before (a server's "413", and then its end) is passed on first.
        """
        self.reading = False
        if self.peer.reading:
            self.peer.ready(READABLE | ENDED)
        self.flow.on(self.peer.events.reset)

    def _on_receive_error(self, error: OSError) -> None:
        self.flow.on(self.events.ended if error.errno == errno.ENOTCONN else self.events.reset)
