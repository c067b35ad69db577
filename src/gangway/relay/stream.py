"""Relays byte streams: TCP, and SCTP in its one-to-one style.

What this file knows: sockets, pipes, and how a flow's actions are carried out.  What it must not know: what follows from an
event (`flow.py` says that), where listeners come from, that there are other processes.

How it works.  A `Port` accepts clients and opens a socket to the backend for each: the pair is a `Flow` of two `Half`s,
and a half pumps what its own socket receives into its peer's.  There are two pumps.  `_pump` moves what fits a small
buffer with recv and send: two system calls for a message, which no other way beats.  When reads come back full time
after time the flow is bulky, and `_pour` moves pages from socket to socket with splice(2) through a pipe, without ever
looking at them.  A pipe belongs to a flow only while bytes are stuck in it; otherwise one pipe serves everybody.

Where the bytes are.  A half that cannot hand on what it read holds it (at most one small buffer or one pipe full), says that
it is stalled, and reads no further until the peer's socket has taken all.  So a client that does not read stalls its own
flow, TCP's window closes behind it, and nothing grows.

Facts that it leans on:

* An accepted socket inherits TCP_NODELAY and the keepalive settings of its listener (net/ipv4/tcp.c, sk_clone): they
  are set once for all clients.
* A client may send, and end, before its backend has answered.  Nothing is read from it until then; the edges that epoll
  reported meanwhile are kept (`seen`) and played back.
* recv returns what is in the queue before it returns the reset that came after it, so a reset overtakes no data that the
  relay could have passed on.
* splice(2) from a socket blocks unless the *socket* is non-blocking, whatever SPLICE_F_NONBLOCK says (tcp_splice_read): that
  flag speaks of the pipe only.
* SCTP (kernel 6.1): no half-close, a message is read whole or in parts but never together with the next one, so a short
  read does not mean an empty queue; after a shutdown recv can raise ENOTCONN where TCP gives the end.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from gangway.relay.flow import OPEN, START, TABLE, Action, Event, Phase, State, Way
from gangway.relay.log import Log
from gangway.relay.loop import EDGES, ENDED, FAILED, READABLE, WRITABLE, Loop
from gangway.relay.settings import Settings

SMALL_BYTES = 16 * 1024
# The largest message that one SCTP send passed (kernel 6.1: 212,992 bytes); larger ones are EMSGSIZE at the sender.
MESSAGE_BYTES = 256 * 1024
PIPE_BYTES = 1024 * 1024
# Full reads in a row that make a flow bulky.
BULKY_READS = 4
# Transfers of one flow before the others get a turn.
TURN = 16
# Pipes kept for the next bulky flow; F_SETPIPE_SZ of an unprivileged user is limited by fs.pipe-user-pages-soft (64 MiB).
SPARE_PIPES = 4
# After this the listeners that ran out of descriptors try again, should no flow have ended before.
RETRY_S = 0.1

IPPROTO_SCTP = 132
SCTP_NODELAY = 3  # include/uapi/linux/sctp.h
_RESET = struct.pack("ii", 1, 0)  # struct linger: close at once, with a reset
_DONTWAIT = socket.MSG_DONTWAIT
_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Backend(NamedTuple):
    """Where a port's connections go: the container's end of a port mapping."""

    protocol: int
    """socket.IPPROTO_TCP or IPPROTO_SCTP."""
    family: int
    address: str
    port: int

    def __str__(self) -> str:
        name = {socket.IPPROTO_TCP: "tcp", IPPROTO_SCTP: "sctp"}.get(self.protocol, "udp")
        host = f"[{self.address}]" if self.family == socket.AF_INET6 else self.address
        return f"{name} {host}:{self.port}"


class Pipe:
    """A pipe for splice, and how many bytes are in it."""

    __slots__ = ("entrance", "exit", "held_bytes")

    def __init__(self) -> None:
        self.exit, self.entrance = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held_bytes = 0
        try:
            fcntl.fcntl(self.entrance, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except PermissionError:
            pass  # the user's share of pipe memory is used up: a smaller pipe does the same in more steps

    def close(self) -> None:
        """Gives both ends back to the kernel, and what is in it."""
        os.close(self.exit)
        os.close(self.entrance)


class Half:
    """One side of a flow: its socket, and the way from there to the other side's."""

    __slots__ = (
        "bulky", "drained", "ended", "fd", "flow", "full_reads", "held", "peer", "pipe", "reading", "recv", "reset",
        "send", "size", "sock", "stalled",
    )  # fmt: skip

    def __init__(self, flow: "Flow", sock: socket.socket, size: int) -> None:
        self.flow = flow
        self.sock = sock
        self.fd = sock.fileno()
        self.recv = sock.recv
        self.send = sock.send
        self.size = size
        self.peer: Half
        self.reading = False
        self.held: bytes | None = None
        self.pipe: Pipe | None = None
        self.full_reads = 0
        self.bulky = False

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
            self.flow.on(self.reset)

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
                return self.flow.on(self.ended)
            try:
                sent = peer.send(data, _DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self.flow.on(peer.reset)
            if sent < len(data):
                self.held = data[sent:]
                return self.flow.on(self.stalled)
            if len(data) < SMALL_BYTES:
                self.full_reads = 0
                if not events & ENDED and size == SMALL_BYTES:
                    return
            elif size == SMALL_BYTES and self._proves_bulky():
                return self._pour()
        self.flow.streams.loop.again(self.ready, READABLE | ENDED)

    def _pour(self) -> None:
        """Moves pages to the peer until there are no more, the peer takes no more, or others want a turn."""
        pipes = self.flow.streams.pipes
        pipe = pipes.take()
        if pipe is None:
            self.bulky = False
            return self._pump(ENDED)
        for _ in range(TURN):
            try:
                moved = os.splice(self.fd, pipe.entrance, PIPE_BYTES, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return pipes.give(pipe)
            except OSError as error:
                pipes.give(pipe)
                return self._failed(error)
            if not moved:
                pipes.give(pipe)
                return self.flow.on(self.ended)
            pipe.held_bytes = moved
            try:
                self._empty(pipe)
            except BlockingIOError:
                self.pipe = pipe
                return self.flow.on(self.stalled)
            except OSError:
                pipe.close()
                return self.flow.on(self.peer.reset)
            if moved < SMALL_BYTES:
                self.bulky = False
                pipes.give(pipe)
                return self._pump(ENDED)
        pipes.give(pipe)
        self.flow.streams.loop.again(self.ready, READABLE | ENDED)
        return None

    def drain(self) -> None:
        """The peer's socket has room again: hands on what is held."""
        try:
            if self.held is not None:
                self.held = self.held[self.peer.send(self.held, _DONTWAIT) :] or None
            elif self.pipe is not None:
                self._empty(self.pipe)
                self.flow.streams.pipes.give(self.pipe)
                self.pipe = None
        except BlockingIOError:
            return
        except OSError:
            return self.flow.on(self.peer.reset)
        if self.held is None:
            self.flow.on(self.drained)

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
                pipe.exit, self.peer.fd, pipe.held_bytes, flags=os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
            )

    def _proves_bulky(self) -> bool:
        """A read came back full; after some of them in a row both sockets are made ready for splice."""
        self.full_reads += 1
        if self.full_reads < BULKY_READS:
            return False
        self.full_reads = 0
        self.bulky = True
        os.set_blocking(self.fd, False)
        os.set_blocking(self.peer.fd, False)
        return True

    def _failed(self, error: OSError) -> None:
        self.flow.on(self.ended if error.errno == errno.ENOTCONN else self.reset)


class Pipes:
    """The pipes that nobody's bytes are stuck in."""

    def __init__(self) -> None:
        self._spare: list[Pipe] = []

    def take(self) -> Pipe | None:
        """An empty pipe, or None when the process has no descriptors left for one."""
        if self._spare:
            return self._spare.pop()
        try:
            return Pipe()
        except OSError as error:
            if error.errno in _OUT_OF_DESCRIPTORS:
                return None
            raise

    def give(self, pipe: Pipe) -> None:
        """Takes an empty pipe back."""
        if len(self._spare) < SPARE_PIPES:
            self._spare.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Closes what is spare."""
        while self._spare:
            self._spare.pop().close()


class Flow:
    """One client's connection, and the one that the relay opened to the backend for it."""

    __slots__ = ("backend", "client", "port", "seen", "state", "streams")

    def __init__(self, port: "Port", client: socket.socket, backend: socket.socket, state: State) -> None:
        self.port = port
        self.streams = port.streams
        self.state = state
        self.seen = 0
        size = SMALL_BYTES if port.backend.protocol == socket.IPPROTO_TCP else MESSAGE_BYTES
        up, down = Half(self, client, size), Half(self, backend, size)
        up.peer, down.peer = down, up
        up.stalled, up.drained, up.ended, up.reset = _UP
        down.stalled, down.drained, down.ended, down.reset = _DOWN
        self.client, self.backend = up, down

    def connect(self) -> None:
        """Opens the connection to the backend.  The client is watched meanwhile, and not read."""
        loop, to = self.streams.loop, self.port.backend
        self.streams.connecting[self] = loop.clock() + self.streams.settings.connect_timeout_s
        error = self.backend.sock.connect_ex((to.address, to.port))
        if error not in (0, errno.EINPROGRESS):
            return self._connect_failed(error)
        loop.add(self.backend.fd, self._backend_ready)
        loop.add(self.client.fd, self._client_ready)
        return None

    def relay(self) -> None:
        """Begins to relay: both sides are connected."""
        self._apply(self.state)
        seen, self.seen = self.seen, 0
        if seen & ~WRITABLE:
            self.client.ready(seen)

    def on(self, event: Event) -> None:
        """Something happened: goes to the next state and does what `flow.py` wants done."""
        state, actions = TABLE[self.state, event]
        if state is not self.state:
            self._apply(state)
        for action in actions:
            _ACTIONS[action](self)

    def timed_out(self) -> None:
        """The backend has not answered in time."""
        self._connect_failed(errno.ETIMEDOUT)

    def is_quiet(self) -> bool:
        """Nothing is under way in this process: another one could take over the two sockets."""
        return self.state == OPEN

    def let_go(self) -> tuple[socket.socket, socket.socket]:
        """Gives the two sockets away; only for a quiet flow."""
        self.port.flows.discard(self)
        for half in (self.client, self.backend):
            self.streams.loop.forget(half.fd)
            half.drop()
        return self.client.sock, self.backend.sock

    def _apply(self, state: State) -> None:
        self.state = state
        relaying = state.phase is Phase.RELAYING
        self.client.reading = relaying and state.up is Way.FLOWING
        self.backend.reading = relaying and state.down is Way.FLOWING

    def _client_ready(self, events: int) -> None:
        self.seen |= events
        if events & FAILED:
            self.on(Event.CLIENT_RESET)

    def _backend_ready(self, events: int) -> None:
        error = self.backend.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & FAILED else 0
        if error:
            return self._connect_failed(error)
        del self.streams.connecting[self]
        loop = self.streams.loop
        loop.redirect(self.client.fd, self.client.ready)
        loop.redirect(self.backend.fd, self.backend.ready)
        self.on(Event.CONNECTED)
        self.relay()
        if events & READABLE:
            self.backend.ready(events)
        return None

    def _connect_failed(self, error: int) -> None:
        self.streams.log.warning("cannot connect to %s: %s", self.port.backend, os.strerror(error))
        self.on(Event.CONNECT_FAILED)

    def _pump_up(self) -> None:
        self.client.read()

    def _pump_down(self) -> None:
        self.backend.read()

    def _end_backend(self) -> None:
        _shut(self.backend.sock)

    def _end_client(self) -> None:
        _shut(self.client.sock)

    def _close(self) -> None:
        self.port.flows.discard(self)
        self.streams.connecting.pop(self, None)
        for half in (self.client, self.backend):
            half.drop()
            self.streams.loop.close_later(half.sock)
        self.streams.descriptors_are_back()

    def _reset(self) -> None:
        for half in (self.client, self.backend):
            half.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close()


_UP = (Event.UP_STALLED, Event.UP_DRAINED, Event.UP_ENDED, Event.CLIENT_RESET)
_DOWN = (Event.DOWN_STALLED, Event.DOWN_DRAINED, Event.DOWN_ENDED, Event.BACKEND_RESET)
_ACTIONS: dict[Action, Callable[[Flow], None]] = {
    Action.PUMP_UP: Flow._pump_up,
    Action.PUMP_DOWN: Flow._pump_down,
    Action.END_BACKEND: Flow._end_backend,
    Action.END_CLIENT: Flow._end_client,
    Action.CLOSE: Flow._close,
    Action.RESET: Flow._reset,
}


class Streams:
    """What all streams of a process share."""

    def __init__(self, loop: Loop, settings: Settings, log: Log) -> None:
        self.loop = loop
        self.settings = settings
        self.log = log
        self.pipes = Pipes()
        self.connecting: dict[Flow, float] = {}
        self._paused: list[Port] = []
        self._ticking = False

    def started(self) -> None:
        """A flow began to connect: looks after its timeout."""
        if not self._ticking:
            self._ticking = True
            self.loop.call_in(1.0, self._tick)

    def pause(self, port: "Port") -> None:
        """The process ran out of descriptors: `port` accepts no more until there are some again."""
        self.log.warning("out of file descriptors: clients wait to be accepted")
        self.loop.modify(port.listener_fd, 0)
        if not self._paused:
            self.loop.call_in(RETRY_S, self.descriptors_are_back)
        self._paused.append(port)

    def descriptors_are_back(self) -> None:
        """Accepts again, where that was stopped."""
        if self._paused:
            paused, self._paused = self._paused, []
            for port in paused:
                port.resume()

    def _tick(self) -> None:
        now = self.loop.clock()
        late = [flow for flow, deadline in self.connecting.items() if deadline <= now]
        for flow in late:
            flow.timed_out()
        self._ticking = bool(self.connecting)
        if self._ticking:
            self.loop.call_in(1.0, self._tick)


class Port:
    """A published port: its listener (in the process that accepts), its backend, its flows."""

    def __init__(self, streams: Streams, backend: Backend, listener: socket.socket | None = None) -> None:
        self.streams = streams
        self.backend = backend
        self.flows: set[Flow] = set()
        self.listener_fd = -1
        self._listener = listener
        self._type = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
        if listener is not None:
            self._prepare(listener)
            self.listener_fd = listener.fileno()
            listener.setblocking(False)
            streams.loop.add(self.listener_fd, self._accept, READABLE)

    def adopt(self, client: socket.socket, backend: socket.socket) -> None:
        """Relays between two sockets that are connected already."""
        flow = Flow(self, client, backend, OPEN)
        self.flows.add(flow)
        for half in (flow.client, flow.backend):
            self.streams.loop.add(half.fd, half.ready, EDGES)
        flow.relay()

    def resume(self) -> None:
        """Accepts again."""
        if self._listener is not None:
            self.streams.loop.modify(self.listener_fd, READABLE)

    def close(self) -> None:
        """The port is withdrawn: nobody is accepted any more, and its connections end at once."""
        if self._listener is not None:
            self.streams.loop.forget(self.listener_fd)
            self._listener.close()
            self._listener = None
        for flow in tuple(self.flows):
            flow.on(Event.WITHDRAWN)

    def _accept(self, _events: int) -> None:
        """One client.  The socket to the backend is made first: out of descriptors, the client still waits in the queue."""
        assert self._listener is not None
        backend = None
        try:
            backend = socket.socket(self.backend.family, self._type, self.backend.protocol)
            client, _ = self._listener.accept()
        except OSError as error:
            if backend is not None:
                backend.close()
            if error.errno in _OUT_OF_DESCRIPTORS:
                self.streams.pause(self)
            return
        self._prepare(backend)
        flow = Flow(self, client, backend, START)
        self.flows.add(flow)
        self.streams.started()
        flow.connect()

    def _prepare(self, sock: socket.socket) -> None:
        """Small messages go at once, and a peer that vanished is noticed."""
        idle_s = self.streams.settings.keepalive_s
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.backend.protocol == IPPROTO_SCTP:
            sock.setsockopt(IPPROTO_SCTP, SCTP_NODELAY, 1)  # SCTP's own heartbeats do the rest
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, idle_s)


def _shut(sock: socket.socket) -> None:
    """Passes an end on.  A side that is already gone says so by an event of its own."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
