"""Moves the bytes of one direction of a stream: from one socket to its peer.

What this file knows: sockets, pipes, and when a transfer is over for now.  What it must not know: what follows from
an end or a reset (`flow.py` says that), where the sockets come from.

How it works.  A `Half` pumps what its own socket receives into its peer's.  There are two pumps.  `_pump` moves what
fits a small buffer with recv and send: two system calls for a message, which no other way beats.  When reads come
back full time after time the flow is bulky, and `_pour` moves pages from socket to socket with splice(2) through a
pipe, without ever looking at them.  A pipe belongs to a flow only while bytes are stuck in it; otherwise one pipe
serves everybody.

Where the bytes are.  A half that cannot hand on what it read holds it (at most one small buffer or one pipe full),
says that it is stalled, and reads no further until the peer's socket has taken all.  So a client that does not read
stalls its own flow, TCP's window closes behind it, and nothing grows.

Facts that it leans on:

* recv returns what is in the queue before it returns the reset that came after it, so a reset overtakes no data that
  the relay could have passed on.
* splice(2) from a socket blocks unless the *socket* is non-blocking, whatever SPLICE_F_NONBLOCK says
  (tcp_splice_read): that flag speaks of the pipe only.
* SCTP (kernel 6.1): no half-close, a message is read whole or in parts but never together with the next one, so a short
  read does not mean an empty queue; after a shutdown recv can raise ENOTCONN where TCP gives the end.
"""

import errno
import fcntl
import os
import socket
from contextlib import suppress
from socket import SocketType
from typing import TYPE_CHECKING, NamedTuple

from gangway.relay.core.loop import ENDED, FAILED, READABLE, WRITABLE
from gangway.relay.flow import Event
from gangway.relay.sockets import OUT_OF_DESCRIPTORS

if TYPE_CHECKING:
    from gangway.relay.core.stream import Flow

SMALL_BYTES = 16 * 1024
# The largest message that one SCTP send passed (kernel 6.1: 212,992 bytes); larger ones are EMSGSIZE at the sender.
MESSAGE_BYTES = 256 * 1024
PIPE_BYTES = 256 * 1024
# Full reads in a row that make a flow bulky.
BULKY_READS = 4
# Transfers of one flow before the others get a turn.
TURN = 16
# PipePool kept for the next bulky flow; F_SETPIPE_SZ of an unprivileged user is limited by fs.pipe-user-pages-soft (64
# MiB).
SPARE_PIPES = 4

_DONTWAIT = socket.MSG_DONTWAIT


class Pipe:
    """A pipe for splice, and how many bytes are in it."""

    __slots__ = ("held_bytes", "read_end", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held_bytes = 0
        with suppress(
            PermissionError
        ):  # the user's share of pipe memory is used up: a smaller pipe does the same in more steps
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def close(self) -> None:
        """Gives both ends back to the kernel, and what is in it."""
        os.close(self.read_end)
        os.close(self.write_end)


class HalfEvents(NamedTuple):
    """What a half says of its direction."""

    stalled: Event
    drained: Event
    ended: Event
    reset: Event


UP = HalfEvents(Event.UP_STALLED, Event.UP_DRAINED, Event.UP_ENDED, Event.CLIENT_RESET)
DOWN = HalfEvents(Event.DOWN_STALLED, Event.DOWN_DRAINED, Event.DOWN_ENDED, Event.BACKEND_RESET)


class Half:
    """One side of a flow: its socket, and the way from there to the other side's."""

    __slots__ = (
        "bulky", "events", "fd", "flow", "full_reads", "held", "peer", "pipe", "poured", "reading", "recv", "send",
        "size", "sock",
    )  # fmt: skip

    def __init__(self, flow: "Flow", sock: SocketType, size: int, events: HalfEvents) -> None:
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
        self.poured = False
        """It was bulky once."""

    def ready(self, events: int) -> None:
        """What epoll has seen of this half's socket."""
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

    def read(self) -> None:
        """Reads on after a stall: the edges of the meantime were not looked at, so look whether there is anything."""
        self.ready(ENDED)

    def _pump(self, events: int) -> None:
        """Moves messages to the peer until there are no more, the peer takes no more, or others want a turn."""
        size, peer = self.size, self.peer
        for _ in range(TURN):
            try:
                data = self.recv(size, _DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                return self._failed(error)
            if not data:
                return self.flow.on(self.events.ended)
            try:
                sent = peer.send(data, _DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self._send_failed()
            if sent < len(data):
                self.held = data[sent:]
                return self.flow.on(self.events.stalled)
            if len(data) < SMALL_BYTES:
                self.full_reads = 0
                if not events & ENDED and size == SMALL_BYTES:
                    return
            elif size == SMALL_BYTES and self._proves_bulky():
                return self._pour()
        self.flow.streams.loop.call_soon(self.ready, READABLE | ENDED)

    def _pour(self) -> None:
        """Moves pages to the peer until there are no more, the peer takes no more, or others want a turn."""
        pipes = self.flow.streams.pipes
        self.flow.streams.loop.chatty = False
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
                return self._failed(error)
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
                return self._send_failed()
            if moved < SMALL_BYTES:
                self.bulky = False
                pipes.release(pipe)
                return self._pump(ENDED)
        pipes.release(pipe)
        self.flow.streams.loop.call_soon(self.ready, READABLE | ENDED)
        return None

    def drain(self) -> None:
        """The peer's socket has room again: hands on what is held."""
        try:
            if self.held is not None:
                self.held = self.held[self.peer.send(self.held, _DONTWAIT) :] or None
            elif self.pipe is not None:
                self._empty(self.pipe)
                self.flow.streams.pipes.release(self.pipe)
                self.pipe = None
        except BlockingIOError:
            return
        except OSError:
            return self._send_failed()
        if self.held is None:
            self.flow.on(self.events.drained)

    def drop(self) -> None:
        """Lets go of what is held, unsent: the flow is over."""
        self.reading = False
        self.held = None
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None

    def _empty(self, pipe: Pipe) -> None:
        """Moves all that is in the pipe to the peer.  Raises BlockingIOError when the peer takes no more."""
        while pipe.held_bytes:
            pipe.held_bytes -= os.splice(
                pipe.read_end, self.peer.fd, pipe.held_bytes, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
            )

    def _proves_bulky(self) -> bool:
        """A read came back full; after some of them in a row both sockets are made ready for splice."""
        self.full_reads += 1
        if self.full_reads < BULKY_READS:
            return False
        self.full_reads = 0
        self.bulky = self.poured = True
        os.set_blocking(self.fd, False)
        os.set_blocking(self.peer.fd, False)
        return True

    def _send_failed(self) -> None:
        """The peer takes no more.  What it had said before (a server's "413", and then its end) is passed on first."""
        self.reading = False
        if self.peer.reading:
            self.peer.ready(READABLE | ENDED)
        self.flow.on(self.peer.events.reset)

    def _failed(self, error: OSError) -> None:
        self.flow.on(self.events.ended if error.errno == errno.ENOTCONN else self.events.reset)


class PipePool:
    """The pipes that nobody's bytes are stuck in."""

    def __init__(self) -> None:
        self._spare: list[Pipe] = []

    def acquire(self) -> Pipe | None:
        """An empty pipe, or None when the process has no descriptors left for one."""
        if self._spare:
            return self._spare.pop()
        try:
            return Pipe()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                return None
            raise

    def release(self, pipe: Pipe) -> None:
        """Takes an empty pipe back."""
        if len(self._spare) < SPARE_PIPES:
            self._spare.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Closes what is spare."""
        while self._spare:
            self._spare.pop().close()
