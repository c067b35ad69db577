"""The relay process: how its parts are put together, and when it ends.

What this file must not know: what the parts do.

The process has given up root, and serves ports until it has had neither a port nor a daemon for `LINGER_S` seconds.
Nothing that it opens (clients, backends, pipes) needs a privilege: the daemon or a launcher binds the ports' sockets,
and the sockets that answer UDP clients of shared ports may be bound without one (core/shared.py).
"""

import socket
from collections.abc import Callable

from gangway.log import Log
from gangway.relay.control import Control
from gangway.relay.core.datagram import Datagrams, create_datagram_port
from gangway.relay.core.listener import create_stream_port
from gangway.relay.core.loop import Loop, Timer
from gangway.relay.core.shared import SharedSockets
from gangway.relay.core.stream import StreamPort, Streams
from gangway.relay.core.worker import WorkerPool
from gangway.relay.ports import ServedPorts
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend, PublishedPort

# dockerd starts launchers one after the other, and `docker restart` ends the last before it starts the next.
LINGER_S = 3.0


class RelayProcess:
    """One event loop, the control socket, and what serves the ports."""

    def __init__(self, control: socket.socket, settings: Settings, log: Log) -> None:
        self.loop = Loop()
        self.streams = Streams(self.loop, settings, log)
        self.workers = WorkerPool(self.loop, self.streams, settings, log)
        self._datagrams = Datagrams(self.loop, settings, log)
        self.shared = SharedSockets(self.streams, self._datagrams)
        self._control = Control(self.loop, control, log, self._schedule_end)
        self._control.ports = ServedPorts(self.loop, self, log, self._control.is_connected, self._schedule_end)
        self._end: Timer | None = None
        self._schedule_end()

    def become_worker(self) -> None:
        """In a forked worker: close what belongs to the relay process alone."""
        self._control.ports.forget()
        for flow in self.streams.flows:
            flow.client.discard()
            flow.backend.discard()
        self.streams.pipes.close()

    def publish(self, backend: Backend, sock: socket.socket) -> PublishedPort:
        """Serve a port by a socket of its own."""
        if backend.protocol == socket.IPPROTO_UDP:
            return create_datagram_port(self._datagrams, backend, sock)
        return create_stream_port(self.streams, backend, sock)

    def withdraw(self, port: PublishedPort, then: Callable[[], None]) -> None:
        """Stop serving a port; call `then` when no process has a connection of it."""
        port.close()
        if isinstance(port, StreamPort):
            self.workers.unpublish(port, then)
        else:
            then()

    def _schedule_end(self) -> None:
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_in(LINGER_S, self._end_if_unused)

    def _end_if_unused(self) -> None:
        if not self._control and not self._control.ports:
            self.loop.stop()
