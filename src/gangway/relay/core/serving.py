"""The ports that clients are served at: what the C library serves them with, and what it reports.

`core.h` says how the library works.  It moves all bytes in threads of its own; here is only what is asked of it.

Ports without a socket of their own share one for each protocol and family, to which the kernel steers all their
traffic.  Ranges are published first and the sockets are passed after them, as clients may be waiting there.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterable
from typing import NamedTuple

from gangway.errors import InvalidRequest
from gangway.limits import exhausted, out_of_ports
from gangway.log import Log
from gangway.relay.core import library
from gangway.relay.core.library import End, PortSettings, Subnet
from gangway.relay.core.library import library as core
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend, Counters, PublishedRange

_NOTES = 64  # read at once
_NONE = -1  # for a descriptor
_LOOPBACK = ("127.0.0.0/8", "::1/128")


class _Shared(NamedTuple):
    """A shared socket, which the library owns, and the map that came with it."""

    entrance: int  # its handle
    fd: int
    binding: int | None


class Port:
    """A published port, or a range of them.  `fd` is the socket that it was published with, which the library owns."""

    def __init__(self, served_by: "Core", handle: int, fd: int | None) -> None:
        self._core = served_by
        self.handle = handle
        self.fd = fd

    def counters(self) -> Counters:
        """Return what was counted since the port was published.  It is not closed."""
        assert self.handle
        found = library.Counters()
        core.core_read_counters(self.handle, found)
        return Counters._make(getattr(found, name) for name in Counters._fields)

    def leave(self) -> None:
        """Accept nobody at the port's own socket any more, once; connections and UDP clients go on."""
        assert self.handle
        core.core_leave_port(self._core.handle, self.handle)

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """Stop serving, once: reset all connections, forget all clients; `then` is called when none is left."""
        assert self.handle
        handle, self.handle = self.handle, 0
        self._core.remove(handle, then)


def open_icmp() -> tuple[int, int]:
    """Return raw sockets for ICMP and ICMPv6, which receive nothing; -1 without CAP_NET_RAW (raw(7))."""
    four, six = (int(core.core_open_icmp(family)) for family in (socket.AF_INET, socket.AF_INET6))
    return four, six


def confine() -> None:
    """Let this process call the kernel only for what `confine.c` lists.  OSError: the kernel cannot restrict it."""
    if core.core_confine() < 0:
        raise library.error()


class Core:
    """The library, with its threads.

    `icmp` are raw sockets of `open_icmp`, which are taken over: UDP clients are told by them that nobody listens in the
    container.  OSError: the threads cannot be started.
    """

    def __init__(self, loop: Loop, settings: Settings, log: Log, icmp: tuple[int, int] = (_NONE, _NONE)) -> None:
        asked = library.CoreSettings(
            settings.workers,
            settings.keepalive_s,
            round(settings.connect_timeout_s * 1000),
            round(settings.udp_timeout_s),
            settings.udp_clients,
            settings.udp_clients_per_port,
            *icmp,
        )
        self.handle = self._checked(core.core_start(asked))
        self._loop, self._log = loop, log
        self._shared: dict[tuple[int, int], _Shared] = {}
        """The shared sockets, by protocol and family."""
        self._removed: dict[int, Callable[[], None]] = {}
        self._notes = (library.Note * _NOTES)()
        self._notes_fd = core.core_notes_fd(self.handle)
        loop.add(self._notes_fd, self._read_notes, READABLE)

    @property
    def connections(self) -> int:
        """The number of connections; a UDP client counts as one."""
        return int(core.core_active(self.handle))

    @property
    def shared_count(self) -> int:
        """How many shared sockets there are."""
        return len(self._shared)

    def publish(self, backend: Backend, sock: socket.socket) -> Port:
        """Serve a port by a socket of its own.  OSError: it cannot be watched; it is closed."""
        return self._add(backend, PortSettings(), sock)

    def publish_shared(self, ports: PublishedRange, backend: Backend, raw: socket.socket | None = None) -> Port:
        """Serve a range by the shared sockets; clients of its first port are connected to `backend`, those of the next
        to its next port.

        `raw` is the raw socket to answer from, if another program has bound a UDP port.
        """
        settings = PortSettings(host=End.at(ports.address, ports.first), last=ports.last)
        return self._add(backend, settings, None, raw)

    def share(self, protocol: int, family: int, sock: socket.socket, binding: int | None = None) -> None:
        """Serve all shared ports of a protocol and family by a socket, in place of the one before it.

        UDP needs the map `binding` of `ebpf/steering.bpf.c`, too, to bind the sockets that answers leave from.
        InvalidRequest: its descriptor is missing.  OSError: the socket cannot be watched; it is closed.
        """
        if protocol == socket.IPPROTO_UDP and binding is None:
            raise InvalidRequest("no map came with the socket: the relay is out of file descriptors")
        own = None if binding is None else os.dup(binding)
        fd = sock.detach()
        try:
            entrance = self._checked(core.core_listen(self.handle, fd, _NONE if own is None else own))
        except OSError:
            _close(own)
            raise
        former = self._shared.get((protocol, family))
        self._shared[protocol, family] = _Shared(entrance, fd, own)
        if former is not None:
            core.core_leave_entrance(self.handle, former.entrance)
            self._close_shared(former)

    def shared(self, protocol: int, family: int) -> list[int]:
        """Return the descriptors that `share` was given, which stay this object's; none if it was not called."""
        found = self._shared.get((protocol, family))
        return [] if found is None else [fd for fd in (found.fd, found.binding) if fd is not None]

    def unshare(self) -> None:
        """Serve nobody by the shared sockets from now on."""
        for one in self._shared.values():
            self._close_shared(one)
        self._shared.clear()

    def leave(self) -> None:
        """Accept nobody at the shared sockets any more, once; connections and UDP clients go on."""
        for one in self._shared.values():
            core.core_leave_entrance(self.handle, one.entrance)

    def _close_shared(self, one: "_Shared") -> None:
        core.core_close_entrance(self.handle, one.entrance)
        _close(one.binding)

    def exclude(self, addresses: Iterable[str]) -> None:
        """Refuse new clients of these addresses at ports with a socket that is bound to all addresses; forget UDP
        clients of them."""
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

    def abort(self) -> str:
        """Go on reading notes after an unexpected error."""
        return "what the library reported was lost"

    def _add(
        self, backend: Backend, settings: PortSettings, sock: socket.socket | None, raw: socket.socket | None = None
    ) -> Port:
        admitted = [Subnet.of(one) for one in (*backend.admitted, *_LOOPBACK)] if backend.admitted else []
        settings.backend, settings.protocol = End.at(backend.address, backend.port), backend.protocol
        settings.admitted, settings.admitted_count = (Subnet * len(admitted))(*admitted), len(admitted)
        fds = [_NONE if one is None else one.detach() for one in (sock, raw)]
        handle = self._checked(core.core_add_port(self.handle, settings, *fds))
        return Port(self, handle, next((fd for fd in fds if fd != _NONE), None))

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
        reason = exhausted(error)
        match note.kind:
            case library.CANNOT_CONNECT | library.UDP_CLIENT_LOST | library.UNREACHABLE:
                self._report_unreachable(note, error)
            case library.CLIENTS_WAIT:
                self._log.lasting(f"new clients wait to be accepted: {reason or error.strerror}")
            case library.CLIENT_LOST if reason:
                self._log.lasting(f"connections are dropped: {reason}")
            case library.CLIENT_LOST:
                self._log.warning("cannot open a socket: a connection was dropped: %s", error.strerror)
            case library.NOT_SENT_UP | library.NOT_SENT_DOWN:
                receiver = "the container" if note.kind == library.NOT_SENT_UP else "a client"
                text = "cannot send a datagram to %s (%s): dropped: %s"
                self._log.warning(text, receiver, _backend_of(note), error.strerror)

    def _report_unreachable(self, note: library.Note, error: OSError) -> None:
        backend, is_udp = _backend_of(note), note.protocol == socket.IPPROTO_UDP
        reason = exhausted(error) if is_udp else ""
        if reason := reason or out_of_ports(note.error, note.protocol, backend.family == socket.AF_INET6):
            self._log.lasting(
                f"new clients of {backend} are not relayed: {reason}"
                if is_udp
                else f"cannot connect to {backend}: {reason}"
            )
        elif is_udp and note.error == errno.EADDRINUSE:
            text = "cannot reach %s: cannot answer from port %s: another program uses it"
            self._log.warning(text, backend, note.host_port)
        else:
            self._log.warning(f"cannot {'reach' if is_udp else 'connect to'} %s: %s", backend, error.strerror)


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _backend_of(note: library.Note) -> Backend:
    """Return the container's end that a note is about."""
    end: End = note.end
    address = socket.inet_ntop(end.family, bytes(end.address)[: 4 if end.family == socket.AF_INET else 16])
    zone = f"%{end.zone}" if end.zone else ""
    return Backend(note.protocol, end.family, address + zone, end.port)
