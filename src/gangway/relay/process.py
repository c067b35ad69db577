"""The relay process, from its start to its end.

What this file knows: how the relay's parts are put together, and when the process ends.  What it must not know: what
the parts do.

The process is given a listening unix socket.  It gives up root, reports that it is ready, and serves ports
until it has had neither a port nor a daemon for `LINGER_S` seconds.  Nothing that it opens later (clients, backends,
pipes) needs a privilege: the daemon or a launcher binds the ports' sockets, and the sockets that answer UDP clients of
shared ports may be bound without one (core/shared.py).
"""

import gc
import socket
from collections.abc import Callable
from functools import partial
from itertools import count

from gangway.log import Log
from gangway.relay import privilege
from gangway.relay.control import Control
from gangway.relay.core import datagram
from gangway.relay.core.datagram import Datagrams
from gangway.relay.core.listener import create_stream_port
from gangway.relay.core.loop import Loop, Timer
from gangway.relay.core.shared import SharedSockets
from gangway.relay.core.stream import StreamPort, Streams
from gangway.relay.core.worker import WorkerPool, run_worker
from gangway.relay.ports import ServedPorts
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend, Entrance

# dockerd starts launchers one after the other, and `docker restart` ends the last before it starts the next.
LINGER_S = 3.0


class RelayProcess:
    """One event loop, the control socket, and what serves the ports."""

    def __init__(self, control: socket.socket, settings: Settings, log: Log) -> None:
        self.loop = Loop()
        self.streams = Streams(self.loop, settings, log)
        self.workers = WorkerPool(self.loop, self.streams, settings, log)
        self._datagrams = Datagrams(self.loop, settings, log)
        self._keys = count(1)
        self.shared = SharedSockets(self.streams, self._datagrams, partial(next, self._keys))
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

    def publish(self, backend: Backend, sock: socket.socket) -> Entrance:
        """Serve a port by a socket of its own."""
        if backend.protocol == socket.IPPROTO_UDP:
            return datagram.create_datagram_port(self._datagrams, backend, sock)
        return create_stream_port(self.streams, backend, next(self._keys), sock)

    def withdraw(self, port: Entrance, then: Callable[[], None]) -> None:
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


def run(control: socket.socket, settings: Settings, log: Log, ready: Callable[[], None]) -> None:
    """Serve the ports that daemons hand over by the listening socket `control`.  Call `ready` when connections to it
    are accepted.

    OSError: the privileges could not be given up.
    """
    privilege.raise_descriptor_limit()
    privilege.drop_privileges()
    relay = RelayProcess(control, settings, log)
    gc.collect()
    gc.freeze()
    ready()
    relay.loop.run()
    while relay.workers.start_requested:
        role = relay.workers.start()
        if role is not None:
            control.close()
            relay.become_worker()
            del relay
            gc.unfreeze()
            gc.collect()  # closes every socket of the relay process
            return run_worker(*role, settings, log)
        relay.loop.run()
    return None
