"""A relay process from its first moment to its last.

What this file knows: how the relay's parts are put together, and when it is over.  What it must not know: what they do.

How it works.  The process is handed a unix socket that already listens, gives up root, says that it is ready, and
serves leases until there has been none for `LINGER_S` seconds.  Everything that it opens later (clients, backends,
pipes) needs no right, and the ports' sockets are bound by those who hand them over; those that it answers by may be
bound though it has none (`shared.py`).
"""

import gc
import socket
from collections.abc import Callable
from functools import partial
from itertools import count

from gangway.log import Log
from gangway.relay import privilege
from gangway.relay.core import datagram, stream
from gangway.relay.core.datagram import Datagrams
from gangway.relay.core.listener import create_stream_port
from gangway.relay.core.loop import Loop, Timer
from gangway.relay.core.shared import SharedSockets
from gangway.relay.core.stream import Streams
from gangway.relay.core.worker import WorkerPool, run_worker
from gangway.relay.keeper import Keeper
from gangway.relay.kept import Published
from gangway.relay.lease import Leases
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend

# dockerd starts launchers one after the other and `docker restart` ends the last one before it starts the next: the
# relay is not to go up and down with that.
LINGER_S = 3.0


class Relay:
    """The relay process: one loop, the leases, the ports."""

    def __init__(
        self, launchers: socket.socket, settings: Settings, log: Log, channel: socket.socket | None = None
    ) -> None:
        self.loop = Loop()
        self._keeper = None if channel is None else Keeper(self.loop, channel)
        self.streams = Streams(self.loop, settings, log)
        self.workers = WorkerPool(self.loop, self.streams, settings, log)
        self._datagrams = Datagrams(self.loop, settings, log)
        self._keys = count(1)
        shared = SharedSockets(self.streams, self._datagrams, partial(next, self._keys))
        self._leases = Leases(self.loop, launchers, log, self._publish, self._withdraw, self._unused, shared)
        self._end: Timer | None = None
        self._unused()

    def let_go(self) -> None:
        """In a worker: what no socket's end closes."""
        self._leases.kept.let_go()
        for flow in self.streams.flows:
            flow.client.discard()
            flow.backend.discard()
        self.streams.pipes.close()

    def _publish(self, backend: Backend, listener: socket.socket) -> Published:
        port = self._serve(backend, listener)
        if self._keeper is not None:
            self._keeper.enter(port, backend, listener)
        return port

    def _serve(self, backend: Backend, listener: socket.socket) -> Published:
        if backend.protocol == socket.IPPROTO_UDP:
            return datagram.create_datagram_port(self._datagrams, backend, listener)
        return create_stream_port(self.streams, backend, next(self._keys), listener)

    def _withdraw(self, port: Published, then: Callable[[], None]) -> None:
        if self._keeper is None:
            self._stop_serving(port, then)
        else:
            self._keeper.erase(port, lambda: self._stop_serving(port, then))

    def _stop_serving(self, port: Published, then: Callable[[], None]) -> None:
        port.close()
        if isinstance(port, stream.StreamPort):
            self.workers.unpublish(port, then)
        else:
            then()

    def _unused(self) -> None:
        """No lease is left: ends in a while, unless there is one by then."""
        if self._end is not None:
            self._end.cancel()
        self._end = self.loop.call_in(LINGER_S, self._end_if_unused)

    def _end_if_unused(self) -> None:
        if not self._leases:
            self.loop.stop()


def run(
    launchers: socket.socket,
    settings: Settings,
    log: Log,
    ready: Callable[[], None],
    keeper: int | None = None,
    channel: socket.socket | None = None,
) -> None:
    """Serves leases that come over `launchers` until there are none; not longer than `keeper` (a pid) lives, if there
    is one.  Over `channel` that one is told of ports to redirect.  OSError: the privileges could not be given up.
    """
    privilege.raise_descriptor_limit()
    privilege.drop_privileges()
    if keeper is not None:
        privilege.end_with_parent(keeper)
    relay = Relay(launchers, settings, log, channel)
    gc.collect()
    gc.freeze()
    ready()
    relay.loop.run()
    while relay.workers.start_requested:
        role = relay.workers.start()
        if role is not None:
            launchers.close()
            if channel is not None:
                channel.close()
            relay.let_go()
            del relay
            gc.unfreeze()
            gc.collect()  # closes every socket of the relay's
            return run_worker(*role, settings, log)
        relay.loop.run()
    return None
