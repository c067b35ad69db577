"""Relays byte streams: TCP, and SCTP in its one-to-one style.

It does not know what follows from an event (`flow.py`), how bytes move (`pump.py`), or that there are other processes.

How it works.  A `StreamPort` is given accepted clients (`listener.py`), and opens a connection to the backend for
each client: the pair is a `Flow` of two `Half`s.  Whenever a half, or the connection attempt, reports an event, the
flow looks up the actions in `flow.TABLE`.

Kernel facts:

* A client may send data, and end, before its backend has answered.  Nothing is read from it until then; the edges that
  epoll reports meanwhile are recorded (`client_events`) and handled afterwards.
* The connecting side of TCP's handshake ends it with an acknowledgement.  With TCP_QUICKACK off (tcp(7)) that waits for
  the first data, which a client has mostly sent by the time that its backend answers: this saves a packet and a wake-up
  of the backend.  If the client has sent none, turning the option on sends the acknowledgement at once
  (net/ipv4/tcp.c, __tcp_sock_set_quickack): a backend that speaks first must not wait.
* Keepalive is set on a backend's socket when its flow is one second old.  Most flows never are.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable
from itertools import count
from socket import SocketType

from gangway.limits import exhausted, out_of_ports
from gangway.log import Log
from gangway.relay.core.loop import FAILED, WRITABLE, Loop
from gangway.relay.core.pump import DOWN, MESSAGE_BYTES, SMALL_BYTES, UP, Half, PipePool
from gangway.relay.flow import OPEN, START, TABLE, Action, DirectionState, Event, FlowState, Phase
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend

RETRY_S = 0.1  # listeners that ran out of descriptors try again after this time, if no flow has ended before

_SCTP_NODELAY = 3  # include/uapi/linux/sctp.h
RESET = struct.pack("ii", 1, 0)  # struct linger: close at once, with a reset

Delegate = Callable[["StreamPort", int, SocketType], None]
"""Takes over an accepted client: its port, the backend's port to connect to, the client's socket."""


class Flow:
    """A client's connection, and the connection that the relay opened to the backend for it."""

    __slots__ = ("backend", "backend_port", "client", "client_events", "loop", "pipes", "port", "state", "streams")

    def __init__(
        self, port: "StreamPort", backend_port: int, client: SocketType, backend: SocketType, state: FlowState
    ) -> None:
        self.port = port
        self.backend_port = backend_port
        self.streams = port.streams
        self.loop = port.streams.loop
        self.pipes = port.streams.pipes
        self.state = state
        self.client_events = 0  # the epoll events of the client while the backend is being connected to
        size = MESSAGE_BYTES if port.backend.protocol == socket.IPPROTO_SCTP else SMALL_BYTES
        self.client: Half = Half(self, client, size, UP)
        self.backend: Half = Half(self, backend, size, DOWN)
        self.client.peer, self.backend.peer = self.backend, self.client
        port.flows.add(self)
        self.streams.flows.add(self)

    def connect(self) -> None:
        """Connect to the backend.  Meanwhile the client is watched, but not read."""
        self.streams.deadlines[self] = self.loop.clock() + self.streams.settings.connect_timeout_s
        error = self.backend.sock.connect_ex((self.port.backend.address, self.backend_port))
        if error not in (0, errno.EINPROGRESS):
            return self._on_connect_error(error)
        # The client first: its events must be known when the backend's answer is handled.
        self.loop.add(self.client.fd, self._on_client_events)
        self.loop.add(self.backend.fd, self._on_backend_events)

    def on(self, event: Event) -> None:
        """Handle an event: enter the next state and carry out the actions."""
        state, actions = TABLE[self.state, event]
        if state is not self.state:
            self._enter(state)
        for action in actions:
            _ACTIONS[action](self)

    def on_tick(self, late: bool) -> bool:
        """Handle a tick; True if the flow needs no more ticks.  `late`: the time for the connection attempt is over."""
        if self.state.phase is Phase.CONNECTING:
            if late:
                self._on_connect_error(errno.ETIMEDOUT)
            return late
        enable_keepalive(self.backend.sock, self.streams.settings.keepalive_s)
        return True

    def is_idle(self) -> bool:
        """True if no data or end is in transit in this process: another one could take over the two sockets."""
        return self.state == OPEN

    def is_bulky(self) -> bool:
        """True if the flow has been bulky in at least one direction."""
        return self.client.was_bulky or self.backend.was_bulky

    def detach(self) -> None:
        """Remove an idle flow from this process; its two sockets stay open."""
        self._remove()
        enable_keepalive(self.backend.sock, self.streams.settings.keepalive_s)
        for half in (self.client, self.backend):
            self.loop.forget(half.fd)
            half.discard()

    def abort(self) -> str:
        """Reset both connections after an unexpected error, whatever the state is."""
        if self in self.port.flows:
            self._reset()
        return f"a connection to {self.port.backend._replace(port=self.backend_port)} was reset"

    def _remove(self) -> None:
        self.port.flows.remove(self)
        self.streams.flows.remove(self)
        self.streams.deadlines.pop(self, None)

    def _enter(self, state: FlowState) -> None:
        self.state = state
        relaying = state.phase is Phase.RELAYING
        self.client.reading = relaying and state.up is DirectionState.FLOWING
        self.backend.reading = relaying and state.down is DirectionState.FLOWING

    def _on_client_events(self, events: int) -> None:
        self.client_events |= events
        if events & FAILED:
            self.on(Event.CLIENT_RESET)

    def _on_backend_events(self, events: int) -> None:
        error = self.backend.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if events & FAILED else 0
        if error:
            return self._on_connect_error(error)
        self.loop.set_handler(self.client.fd, self.client.ready)
        self.loop.set_handler(self.backend.fd, self.backend.ready)
        self.on(Event.CONNECTED)
        if self.client_events & ~WRITABLE:
            self.client.ready(self.client_events)
        else:
            self.port.set_quick_ack(self.backend.sock, 1)
        if events & ~WRITABLE:
            self.backend.ready(events)

    def _on_connect_error(self, error: int) -> None:
        backend = self.port.backend._replace(port=self.backend_port)
        if reason := out_of_ports(error, backend.protocol, backend.family == socket.AF_INET6):
            self.streams.log.lasting(f"cannot connect to {backend}: {reason}")
        else:
            self.streams.log.warning("cannot connect to %s: %s", backend, os.strerror(error))
        self.on(Event.CONNECT_FAILED)

    def _close(self) -> None:
        self._remove()
        for half in (self.client, self.backend):
            half.discard()
            self.loop.close_later(half.sock)
        self.streams.resume_accepting()

    def _reset(self) -> None:
        for half in (self.client, self.backend):
            half.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._close()


_ACTIONS: dict[Action, Callable[[Flow], None]] = {
    Action.PUMP_UP: lambda flow: flow.client.resume(),
    Action.PUMP_DOWN: lambda flow: flow.backend.resume(),
    Action.END_BACKEND: lambda flow: _shut_down(flow.backend.sock),
    Action.END_CLIENT: lambda flow: _shut_down(flow.client.sock),
    Action.CLOSE: Flow._close,
    Action.RESET: Flow._reset,
}


class Streams:
    """The state that all streams of a process share."""

    def __init__(self, loop: Loop, settings: Settings, log: Log) -> None:
        self.loop = loop
        self.settings = settings
        self.log = log
        self.pipes = PipePool()
        self.keys = count(1)
        self.deadlines: dict[Flow, float] = {}
        """The new and the connecting flows, which need the next tick, and when connecting times out."""
        self.flows: set[Flow] = set()
        self.find_delegate: Callable[[], Delegate | None] | None = None
        """Called before each accept; returns a function to take over the client, or None."""
        self._paused: list[Callable[[], None]] = []
        self.excluded: frozenset[str] = frozenset()
        """The host's addresses that ports at all addresses are not served at."""
        self._ticking = False

    def start_ticking(self) -> None:
        """Tick once a second for as long as there are flows that need it."""
        if not self._ticking:
            self._ticking = True
            self.loop.call_in(1.0, self._tick)

    def pause_accepting(self, resume: Callable[[], None]) -> None:
        """Call `resume` when the process, which has reached a limit, may be below it again."""
        if not self._paused:
            self.loop.call_in(RETRY_S, self.resume_accepting)
        self._paused.append(resume)

    def resume_accepting(self) -> None:
        """Resume all paused listeners."""
        if self._paused:
            paused, self._paused = self._paused, []
            for resume in paused:
                resume()

    def report_lost(self, error: OSError) -> None:
        """Log that a connection was dropped because there is no socket for it, or because none can be watched."""
        if reason := exhausted(error):
            self.log.lasting(f"connections are dropped: {reason}")
        else:
            self.log.warning("cannot open a socket: a connection was dropped: %s", error.strerror)

    def _tick(self) -> None:
        now_s = self.loop.clock()
        for flow, deadline_s in tuple(self.deadlines.items()):
            try:
                is_done = flow.on_tick(late=deadline_s <= now_s)
            except Exception as error:
                self.loop.fail(error, flow)
                is_done = True
            if is_done:
                self.deadlines.pop(flow, None)
        self._ticking = bool(self.deadlines)
        if self._ticking:
            self.loop.call_in(1.0, self._tick)


class StreamPort:
    """A published port, or a range of them: its backend and its flows.

    `first` is the host port that is connected to the backend's port.  `key` identifies the port in messages to other
    processes; 0 assigns a new one.
    """

    __slots__ = ("backend", "close_entrance", "first", "flows", "key", "streams")

    def __init__(self, streams: Streams, backend: Backend, first: int = 0, key: int = 0) -> None:
        self.streams = streams
        self.backend = backend
        self.first = first
        self.key = key or next(streams.keys)
        self.flows: set[Flow] = set()
        self.close_entrance: Callable[[], None] = lambda: None  # stop accepting; set in the process that accepts

    def serve(self, client: SocketType, backend_port: int, spare: SocketType | None = None) -> bool:
        """Connect an accepted client to the backend's port `backend_port`, by the socket `spare` if its family fits.

        False: the client was dropped, as no socket can be made or watched.
        """
        if spare is not None and spare.family != self.backend.family:
            spare.close()
            spare = None
        try:
            backend = spare or open_backend(self.backend.family, self.backend.protocol)
        except OSError as error:
            self.streams.report_lost(error)
            client.close()
            return False
        disable_delay(backend)
        self.set_quick_ack(backend, 0)
        self.streams.start_ticking()
        flow = Flow(self, backend_port, client, backend, START)
        try:
            flow.connect()
        except OSError as error:
            flow.abort()
            self.streams.report_lost(error)
            return False
        except Exception as error:
            self.streams.loop.fail(error, flow)
        return True

    def adopt(self, client: SocketType, backend: SocketType) -> None:
        """Relay between two sockets that are already connected."""
        flow = Flow(self, self.backend.port, client, backend, OPEN)
        try:
            for half in (flow.client, flow.backend):
                half.reading = True
                flow.loop.add(half.fd, half.ready)
        except OSError as error:
            flow.abort()
            self.streams.report_lost(error)

    def close(self) -> None:
        """Stop accepting, and reset all connections: the port is unpublished."""
        self.close_entrance()
        for flow in tuple(self.flows):
            try:
                flow.on(Event.UNPUBLISHED)
            except Exception as error:
                self.streams.loop.fail(error, flow)

    def set_quick_ack(self, backend: SocketType, enabled: int) -> None:
        """Send the handshake's last acknowledgement now (1), or with the first data (0)."""
        if self.backend.protocol != socket.IPPROTO_SCTP:
            backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, enabled)


def open_backend(family: int, protocol: int) -> SocketType:
    """Return a new socket to connect to a backend."""
    return SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, protocol)


def enable_keepalive(sock: SocketType, idle_s: int) -> None:
    """Detect a peer that has disappeared.  SCTP does so by its own heartbeats."""
    if sock.proto != socket.IPPROTO_SCTP:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, idle_s)


def disable_delay(sock: SocketType) -> None:
    """Send data at once instead of waiting for more (Nagle's algorithm)."""
    if sock.proto == socket.IPPROTO_SCTP:
        sock.setsockopt(socket.IPPROTO_SCTP, _SCTP_NODELAY, 1)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shut_down(sock: SocketType) -> None:
    """Pass an end on.  If the connection has ended already, that is reported as an event of its own."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
