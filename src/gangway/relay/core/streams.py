"""The ports of byte streams, TCP and SCTP: what the C library serves them with, and what it reports.

`core.h` says how the library works.  It moves all bytes in threads of its own; here is only what is asked of it.
"""

import os
import socket
from collections.abc import Callable, Iterable

from gangway.limits import exhausted, out_of_ports
from gangway.log import Log
from gangway.relay.core import library
from gangway.relay.core.library import Counters, End, PortSettings, Subnet
from gangway.relay.core.library import library as core
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend, PublishedRange, is_unspecified

_NOTES = 64  # read at once


class StreamPort:
    """A published port, or a range of them."""

    def __init__(self, streams: "Streams", handle: int) -> None:
        self._streams = streams
        self.handle = handle

    def counters(self) -> Counters:
        """Return what was counted since the port was published.  It is not closed."""
        assert self.handle
        counters = Counters()
        core.core_read_counters(self.handle, counters)
        return counters

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """Stop serving, once, and reset all connections; `then` is called when none is left."""
        assert self.handle
        handle, self.handle = self.handle, 0
        self._streams.remove(handle, then)


class Listener:
    """A listening socket that ports share."""

    def __init__(self, streams: "Streams", handle: int) -> None:
        self._streams, self._handle = streams, handle

    def close(self) -> None:
        """Accept nobody any more."""
        core.core_close_entrance(self._streams.handle, self._handle)


class Streams:
    """The library, with its threads.  OSError: they cannot be started."""

    def __init__(self, loop: Loop, settings: Settings, log: Log) -> None:
        asked = library.CoreSettings(settings.workers, settings.keepalive_s, round(settings.connect_timeout_s * 1000))
        self.handle = self._checked(core.core_start(asked))
        self._loop, self._log = loop, log
        self._removed: dict[int, Callable[[], None]] = {}
        self._notes = (library.Note * _NOTES)()
        self._notes_fd = core.core_notes_fd(self.handle)
        loop.add(self._notes_fd, self._read_notes, READABLE)

    def __len__(self) -> int:
        """The number of connections."""
        return int(core.core_active(self.handle))

    def publish(self, backend: Backend, sock: socket.socket) -> StreamPort:
        """Serve a port by a listening socket of its own.  OSError: it cannot be watched; it is closed."""
        return self._add(backend, PortSettings(), sock)

    def publish_shared(self, ports: PublishedRange, backend: Backend) -> StreamPort:
        """Serve a range by the sockets that ports share; the backend's port is that of the first."""
        return self._add(backend, PortSettings(host=End.at(ports.address, ports.first), last=ports.last))

    def listen(self, sock: socket.socket) -> Listener:
        """Serve all shared ports by a listening socket.  OSError: it cannot be watched; it is closed."""
        return Listener(self, self._checked(core.core_listen(self.handle, sock.detach())))

    def exclude(self, addresses: Iterable[str]) -> None:
        """Refuse new clients of these addresses at ports with a socket that is bound to all addresses."""
        ends = [End.at(one) for one in addresses]
        if core.core_exclude(self.handle, (End * len(ends))(*ends), len(ends)) < 0:
            raise library.error()

    def remove(self, port: int, then: Callable[[], None]) -> None:
        """Stop serving the port with this handle, and reset its connections; `then` is called when none is left."""
        self._removed[port] = then
        core.core_remove_port(self.handle, port)

    def close(self) -> None:
        """Reset all connections, and end the threads."""
        self._loop.forget(self._notes_fd)
        core.core_stop(self.handle)

    def _add(self, backend: Backend, settings: PortSettings, sock: socket.socket | None = None) -> StreamPort:
        admitted = [] if backend.admission is None else [Subnet.of(one) for one in backend.admission.subnets]
        settings.backend, settings.protocol = End.at(backend.address, backend.port), backend.protocol
        settings.admitted, settings.admitted_count = (Subnet * len(admitted))(*admitted), len(admitted)
        is_anywhere = sock is not None and is_unspecified(sock)
        fd = -1 if sock is None else sock.detach()
        return StreamPort(self, self._checked(core.core_add_port(self.handle, settings, fd, is_anywhere)))

    def abort(self) -> str:
        """Go on reading notes after an unexpected error."""
        return "what the library reported was lost"

    def _checked(self, handle: int | None) -> int:
        if handle is None:
            raise library.error()
        return handle

    def _read_notes(self, _events: int) -> None:
        notes = self._notes[: core.core_read_notes(self.handle, self._notes, _NOTES)]
        # All are popped before any is called: a new port may get the handle of one that was removed.
        removed = [self._removed.pop(note.port, None) for note in notes if note.kind == library.PORT_REMOVED]
        for then in removed:
            if then is not None:
                then()
        for note in notes:
            if note.kind != library.PORT_REMOVED:
                self.report(note)

    def report(self, note: library.Note) -> None:
        """Log what a thread of the library has met."""
        error = OSError(note.error, os.strerror(note.error))
        if note.kind == library.CANNOT_CONNECT:
            return self._report_connect(note, error)
        reason = exhausted(error)
        if note.kind == library.CLIENTS_WAIT:
            self._log.lasting(f"new clients wait to be accepted: {reason or error.strerror}")
        elif reason:
            self._log.lasting(f"connections are dropped: {reason}")
        else:
            self._log.warning("cannot open a socket: a connection was dropped: %s", error.strerror)

    def _report_connect(self, note: library.Note, error: OSError) -> None:
        end: End = note.end
        address = socket.inet_ntop(end.family, bytes(end.address)[: 4 if end.family == socket.AF_INET else 16])
        zone = f"%{end.zone}" if end.zone else ""
        backend = Backend(note.protocol, end.family, address + zone, end.port)
        if reason := out_of_ports(note.error, note.protocol, end.family == socket.AF_INET6):
            self._log.lasting(f"cannot connect to {backend}: {reason}")
        else:
            self._log.warning("cannot connect to %s: %s", backend, error.strerror)
