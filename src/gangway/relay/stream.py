"""Relays byte streams: TCP, and SCTP in its one-to-one style.

What this file knows: how clients are accepted, how the backend is reached, and how a flow's actions are carried out.
What it must not know: what follows from an event (`flow.py` says that), how bytes move (`pump.py`), where listeners
come from, that there are other processes.

How it works.  A `Port` accepts clients and opens a socket to the backend for each: the pair is a `Flow` of two
`Half`s.  The flow asks `flow.TABLE` what is to be done whenever a half, or the connection attempt, reports an event.

Facts that it leans on:

* An accepted socket inherits TCP_NODELAY and the keepalive settings of its listener (net/ipv4/tcp.c, sk_clone): they
  are set once for all clients.
* A client may send, and end, before its backend has answered.  Nothing is read from it until then; the edges that epoll
  reported meanwhile are kept (`seen`) and played back.
* A backend socket is made before its client is accepted: when the process is out of descriptors the client still
  waits in the kernel's queue, where it loses nothing.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from gangway.relay.flow import OPEN, START, TABLE, Action, Event, Phase, State, Way
from gangway.relay.log import Log
from gangway.relay.loop import FAILED, READABLE, WRITABLE, Loop
from gangway.relay.pump import DOWN, MESSAGE_BYTES, OUT_OF_DESCRIPTORS, SMALL_BYTES, UP, Half, Pipes
from gangway.relay.settings import Settings

# After this the listeners that ran out of descriptors try again, should no flow have ended before.
RETRY_S = 0.1

IPPROTO_SCTP = 132
SCTP_NODELAY = 3  # include/uapi/linux/sctp.h
_RESET = struct.pack("ii", 1, 0)  # struct linger: close at once, with a reset
_NAMES = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp", IPPROTO_SCTP: "sctp"}


class Backend(NamedTuple):
    """Where a port's clients are taken: the container's end of a port mapping."""

    protocol: int
    """socket.IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP."""
    family: int
    """socket.AF_INET or AF_INET6."""
    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.family == socket.AF_INET6 else self.address
        return f"{_NAMES[self.protocol]} {host}:{self.port}"


class Flow:
    """One client's connection, and the one that the relay opened to the backend for it."""

    __slots__ = ("backend", "client", "port", "seen", "state", "streams")

    def __init__(self, port: "Port", client: socket.socket, backend: socket.socket, state: State) -> None:
        self.port = port
        self.streams = port.streams
        self.state = state
        self.seen = 0
        size = MESSAGE_BYTES if port.backend.protocol == IPPROTO_SCTP else SMALL_BYTES
        self.client, self.backend = Half(self, client, size, UP), Half(self, backend, size, DOWN)
        self.client.peer, self.backend.peer = self.backend, self.client
        port.flows.add(self)
        self.streams.flows.add(self)

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
        """Begins to relay between two connected sockets that the loop does not know yet."""
        self._apply(self.state)
        for half in (self.client, self.backend):
            self.streams.loop.add(half.fd, half.ready)

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
        self._leave()
        for half in (self.client, self.backend):
            self.streams.loop.forget(half.fd)
            half.drop()
        return self.client.sock, self.backend.sock

    def _leave(self) -> None:
        self.port.flows.remove(self)
        self.streams.flows.remove(self)

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
        if self.seen & ~WRITABLE:
            self.client.ready(self.seen)
        if events & ~WRITABLE:
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
        self._leave()
        self.streams.connecting.pop(self, None)
        for half in (self.client, self.backend):
            half.drop()
            self.streams.loop.close_later(half.sock)
        self.streams.descriptors_are_back()

    def _reset(self) -> None:
        for half in (self.client, self.backend):
            half.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close()


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
        self.flows: set[Flow] = set()
        self.give_away: Callable[[Port, socket.socket], bool] | None = None
        """Asked for each client: whether somebody else has taken it."""
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
    """A published port: its listener (in the process that accepts), its backend, its flows.

    `key` names it to other processes.
    """

    def __init__(self, streams: Streams, backend: Backend, key: int, listener: socket.socket | None = None) -> None:
        self.streams = streams
        self.backend = backend
        self.key = key
        self.flows: set[Flow] = set()
        self._listener = listener
        if listener is not None:
            self._prepare(listener)
            listener.setblocking(False)
            streams.loop.add(listener.fileno(), self._accept, READABLE)

    def serve(self, client: socket.socket) -> None:
        """Takes a client that was accepted elsewhere.  OSError: there is no socket to be had for its backend."""
        self._begin(client, self._open_backend())

    def adopt(self, client: socket.socket, backend: socket.socket) -> None:
        """Relays between two sockets that are connected already."""
        Flow(self, client, backend, OPEN).relay()

    def resume(self) -> None:
        """Accepts again."""
        if self._listener is not None:
            self.streams.loop.modify(self._listener.fileno(), READABLE)

    def close(self) -> None:
        """The port is withdrawn: nobody is accepted any more, and its connections end at once."""
        if self._listener is not None:
            self.streams.loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for flow in tuple(self.flows):
            flow.on(Event.WITHDRAWN)

    def _accept(self, _events: int) -> None:
        """One client; see the head of this file for the order."""
        assert self._listener is not None
        backend = None
        try:
            backend = self._open_backend()
            client, _ = self._listener.accept()
        except OSError as error:
            if backend is not None:
                backend.close()
            if error.errno in OUT_OF_DESCRIPTORS:
                self.streams.loop.modify(self._listener.fileno(), 0)
                self.streams.pause(self)
            return
        give_away = self.streams.give_away
        if give_away is not None and give_away(self, client):
            backend.close()
        else:
            self._begin(client, backend)

    def _open_backend(self) -> socket.socket:
        to = self.backend
        return socket.socket(to.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, to.protocol)

    def _begin(self, client: socket.socket, backend: socket.socket) -> None:
        self._prepare(backend)
        self.streams.started()
        Flow(self, client, backend, START).connect()

    def _prepare(self, sock: socket.socket) -> None:
        """Small messages go at once, and a peer that vanished is noticed."""
        if self.backend.protocol == IPPROTO_SCTP:  # its own heartbeats notice that
            sock.setsockopt(IPPROTO_SCTP, SCTP_NODELAY, 1)
            return
        idle_s = self.streams.settings.keepalive_s
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
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
