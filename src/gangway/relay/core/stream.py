"""Relays byte streams: TCP, and SCTP in its one-to-one style.

What this file knows: how the backend is reached, and how a flow's actions are carried out.  What it must not know: what
follows from an event (`flow.py` says that), how bytes move (`pump.py`), how clients come (`listener.py`), that there
are other processes.

How it works.  A `Port` takes clients and opens a connection to the backend for each: the pair is a `Flow` of two
`Half`s.  The flow asks `flow.TABLE` what is to be done whenever a half, or the connection attempt, reports an event.

Facts that it leans on:

* A client may send, and end, before its backend has answered.  Nothing is read from it until then; the edges that epoll
  reported meanwhile are kept (`seen`) and played back.
* A connection's own side of TCP's handshake ends with an acknowledgement.  With TCP_QUICKACK off (tcp(7)) it waits
  for the first data, which a client has mostly sent by the time that its backend answers: one packet and one wake-up
  of the backend less.  If it has sent none, turning the option on sends the acknowledgement at once (net/ipv4/tcp.c,
  __tcp_sock_set_quickack): a backend that speaks first must not wait.
* Keepalive is set on a backend's socket when its flow is a second old.  Most never are.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable
from socket import SocketType
from typing import NamedTuple, Protocol

from gangway.log import Log
from gangway.relay.core.loop import FAILED, WRITABLE, Loop
from gangway.relay.core.pump import DOWN, MESSAGE_BYTES, SMALL_BYTES, UP, Half, Pipes
from gangway.relay.flow import OPEN, START, TABLE, Action, Event, Phase, State, Way
from gangway.relay.settings import Settings
from gangway.text import in_brackets

# After this the listeners that ran out of descriptors try again, should no flow have ended before.
RETRY_S = 0.1

IPPROTO_SCTP = 132
SCTP_NODELAY = 3  # include/uapi/linux/sctp.h
RESET = struct.pack("ii", 1, 0)  # struct linger: close at once, with a reset
_NAMES = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp", IPPROTO_SCTP: "sctp"}


Taker = Callable[["Port", int, SocketType], None]
"""Takes a client of a port that was accepted; the number is the backend's port that it is to get to."""


class Backend(NamedTuple):
    """Where a port's clients are taken: the container's end of a port mapping."""

    protocol: int
    """socket.IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP."""
    family: int
    """socket.AF_INET or AF_INET6."""
    address: str
    port: int

    def __str__(self) -> str:
        host = in_brackets(self.address)
        return f"{_NAMES[self.protocol]} {host}:{self.port}"


class Flow:
    """One client's connection, and the one that the relay opened to the backend for it."""

    __slots__ = ("backend", "client", "number", "port", "seen", "state", "streams")

    def __init__(self, port: "Port", number: int, client: SocketType, backend: SocketType, state: State) -> None:
        self.port = port
        self.number = number
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
        self.streams.young[self] = loop.clock() + self.streams.settings.connect_timeout_s
        error = self.backend.sock.connect_ex((to.address, self.number))
        if error not in (0, errno.EINPROGRESS):
            return self._connect_failed(error)
        # The client first: what it has sent is to be known when the backend's answer is looked at.
        loop.add(self.client.fd, self._client_ready)
        loop.add(self.backend.fd, self._backend_ready)
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

    def grow_up(self, late: bool) -> bool:
        """A second went by: whether that was all that had to be waited for.

        `late`: the backend has not answered in time.
        """
        if self.state.phase is Phase.CONNECTING:
            if late:
                self._connect_failed(errno.ETIMEDOUT)
            return late
        self.port.keep_alive(self.backend.sock)
        return True

    def is_quiet(self) -> bool:
        """Nothing is under way in this process: another one could take over the two sockets."""
        return self.state == OPEN

    def is_bulky(self) -> bool:
        """It has moved pages, one way at least."""
        return self.client.poured or self.backend.poured

    def let_go(self) -> tuple[SocketType, SocketType]:
        """Gives the two sockets away; only for a quiet flow."""
        self._leave()
        self.port.keep_alive(self.backend.sock)
        for half in (self.client, self.backend):
            self.streams.loop.forget(half.fd)
            half.drop()
        return self.client.sock, self.backend.sock

    def _leave(self) -> None:
        self.port.flows.remove(self)
        self.streams.flows.remove(self)
        self.streams.young.pop(self, None)

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
        loop = self.streams.loop
        loop.redirect(self.client.fd, self.client.ready)
        loop.redirect(self.backend.fd, self.backend.ready)
        self.on(Event.CONNECTED)
        if self.seen & ~WRITABLE:
            self.client.ready(self.seen)
        else:
            self.port.acknowledge(self.backend.sock, 1)
        if events & ~WRITABLE:
            self.backend.ready(events)
        return None

    def _connect_failed(self, error: int) -> None:
        asked = self.port.backend._replace(port=self.number)
        self.streams.log.warning("cannot connect to %s: %s", asked, os.strerror(error))
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
        for half in (self.client, self.backend):
            half.drop()
            self.streams.loop.close_later(half.sock)
        self.streams.descriptors_are_back()

    def _reset(self) -> None:
        for half in (self.client, self.backend):
            half.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
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
        self.young: dict[Flow, float] = {}
        """The flows that began within the last second or have no backend yet, and when that is too late."""
        self.flows: set[Flow] = set()
        self.find_taker: Callable[[], Taker | None] | None = None
        """Asked before each client: whether somebody else should take it."""
        self._paused: list[Callable[[], None]] = []
        self._ticking = False

    def started(self) -> None:
        """A flow began: looks after it in a second."""
        if not self._ticking:
            self._ticking = True
            self.loop.call_in(1.0, self._tick)

    def pause(self, resume: Callable[[], None]) -> None:
        """The process ran out of descriptors: `resume` is called when there are some again."""
        self.log.warning("out of file descriptors: clients wait to be accepted")
        if not self._paused:
            self.loop.call_in(RETRY_S, self.descriptors_are_back)
        self._paused.append(resume)

    def descriptors_are_back(self) -> None:
        """Accepts again, where that was stopped."""
        if self._paused:
            paused, self._paused = self._paused, []
            for resume in paused:
                resume()

    def _tick(self) -> None:
        now_s = self.loop.clock()
        for flow, deadline_s in tuple(self.young.items()):
            if flow.grow_up(late=deadline_s <= now_s):
                self.young.pop(flow, None)
        self._ticking = bool(self.young)
        if self._ticking:
            self.loop.call_in(1.0, self._tick)


class Closable(Protocol):
    """How clients get to a port."""

    def close(self) -> None: ...


class Port:
    """A published port, or a range of them: its backend, its flows; and, in the process that accepts, its `way_in`.

    `key` names it to other processes.
    """

    __slots__ = ("backend", "flows", "key", "streams", "way_in")

    def __init__(self, streams: Streams, backend: Backend, key: int) -> None:
        self.streams = streams
        self.backend = backend
        self.key = key
        self.flows: set[Flow] = set()
        self.way_in: Closable | None = None

    def serve(self, client: SocketType, number: int, spare: SocketType | None = None) -> None:
        """Takes a client that was accepted already, to the backend's port `number`; `spare` is a socket for it, if that
        is of its family.  A client whose backend cannot be had a socket for is dropped."""
        if spare is not None and spare.family != self.backend.family:
            spare.close()
            spare = None
        try:
            backend = spare or open_backend(self.backend.family, self.backend.protocol)
        except OSError as error:
            self.streams.log.warning("a connection was dropped: %s", error.strerror)
            client.close()
            return
        send_at_once(backend)
        self.acknowledge(backend, 0)
        self.streams.started()
        Flow(self, number, client, backend, START).connect()

    def adopt(self, client: SocketType, backend: SocketType) -> None:
        """Relays between two sockets that are connected already."""
        Flow(self, self.backend.port, client, backend, OPEN).relay()

    def close(self) -> None:
        """The port is withdrawn: nobody is accepted any more, and its connections end at once."""
        if self.way_in is not None:
            self.way_in.close()
        for flow in tuple(self.flows):
            flow.on(Event.WITHDRAWN)

    def acknowledge(self, backend: SocketType, quick: int) -> None:
        """Sends the handshake's last acknowledgement with the first data (0), or now (1)."""
        if self.backend.protocol != IPPROTO_SCTP:
            backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, quick)

    def keep_alive(self, sock: SocketType) -> None:
        """A peer that vanished is noticed."""
        keep_alive(sock, self.streams.settings.keepalive_s)


def open_backend(family: int, protocol: int) -> SocketType:
    """A socket that is to be connected to a backend."""
    return SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, protocol)


def keep_alive(sock: SocketType, idle_s: int) -> None:
    """A peer that vanished is noticed.  SCTP notices by heartbeats of its own."""
    if sock.proto != IPPROTO_SCTP:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, idle_s)


def send_at_once(sock: SocketType) -> None:
    """What is written is not held back in the hope of more."""
    if sock.proto == IPPROTO_SCTP:
        sock.setsockopt(IPPROTO_SCTP, SCTP_NODELAY, 1)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shut(sock: SocketType) -> None:
    """Passes an end on.  A side that is already gone says so by an event of its own."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
