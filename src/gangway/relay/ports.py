"""The ports that a relay process serves, and the descriptors that it keeps open for the daemon.

What this file must not know: connections to the daemon, how clients are served.

Ports stay with the relay until a daemon removes them; one that was restarted lists them.  A leased port also ends with
the launcher's process (pidfd_open(2)).  If no daemon is connected at that moment, the loopback redirect ends with it:
its entries may be changed by root only, and one that is left would lead clients of the port's next owner to the
container.
"""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

from gangway.errors import InvalidRequest
from gangway.inet import FAMILIES, PROTOCOLS
from gangway.log import Log
from gangway.relay import protocol
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.protocol import (
    Count,
    CountShared,
    Exclude,
    GetHeld,
    GetPort,
    GetShared,
    Hold,
    HostPorts,
    List,
    ListExcluded,
    ListHeld,
    Mode,
    Remove,
    Retire,
    Serve,
    Share,
)
from gangway.relay.sockets import Backend, PublishedPort, PublishedRange, family_of

Answer = Callable[[str, Sequence[int]], None]
"""Send the answer to a request that was carried out: its text and descriptors."""


class Server(Protocol):
    """Serves clients in this process: `core.serving.Core`."""

    @property
    def shared_count(self) -> int: ...

    def publish(self, backend: Backend, sock: socket.socket) -> PublishedPort: ...

    def publish_shared(
        self, ports: PublishedRange, backend: Backend, raw: socket.socket | None = None
    ) -> PublishedPort: ...

    def share(self, protocol: int, family: int, sock: socket.socket, binding: int | None = None) -> None: ...

    def shared(self, protocol: int, family: int) -> list[int]: ...

    def unshare(self) -> None: ...

    def leave(self) -> None: ...

    def exclude(self, addresses: Sequence[str]) -> None: ...


class _Port(NamedTuple):
    served: Serve
    published: PublishedPort
    owner: int | None  # the pidfd of the launcher


class ServedPorts:
    """The served ports; `is_attended` says whether a daemon is connected, `emptied` is called when none is left.

    `retired` is called with the number of seconds that connections may last, once another relay serves the ports.
    """

    def __init__(
        self,
        loop: Loop,
        server: Server,
        log: Log,
        is_attended: Callable[[], bool],
        emptied: Callable[[], None],
        retired: Callable[[int], None],
    ) -> None:
        self._loop, self._server, self._log, self._is_attended, self._emptied = loop, server, log, is_attended, emptied
        self._retired, self._is_retired = retired, False
        self._ports: dict[HostPorts, _Port] = {}
        self._held: dict[str, list[int]] = {}
        self._excluded: list[str] = []
        self._ownerless: set[HostPorts] = set()
        """Leased ports whose launcher has exited, and that the connected daemon has to remove."""

    def __len__(self) -> int:
        return len(self._ports)

    def carry_out(self, request: protocol.Request, fds: list[int], answer: Answer) -> None:
        """Carry out a request and answer it.  Take the descriptors that are used out of `fds`.

        InvalidRequest, OSError, ValueError: the request was refused, and nothing was changed.
        """
        text, sent = "", list[int]()
        match request:
            case Serve():
                self._serve(request, fds)
            case Remove(ports):
                return self._remove(ports, lambda: answer("", ()))
            case Share():
                self._share(request, fds)
            case Hold(name, count):
                if len(fds) != count:
                    raise InvalidRequest(f"wrong number of descriptors with {name}: {len(fds)}, not {count}")
                if name == protocol.LOG and fds:
                    self._log.use(fds[0])
                else:
                    self._held[name], fds[:] = list(fds), self._held.get(name, [])
            case Exclude(offset, addresses):
                self._excluded[offset:] = addresses
                self._server.exclude(self._excluded)
            case Retire(limit_s):
                self._retire(limit_s)
            case _:
                text, sent = self._look_up(request)
        return answer(text, sent)

    def _look_up(self, request: protocol.Request) -> tuple[str, list[int]]:
        """Return the answer to a question."""
        match request:
            case List(offset):
                return self._page(offset, lambda port: protocol.encode_served(self._listed(port))), []
            case Count(offset):
                return self._page(offset, _counted), []
            case CountShared():
                return str(self._server.shared_count), []
            case ListHeld():
                return " ".join(self._held), []
            case GetHeld(name):
                return "", self._held.get(name, [])
            case ListExcluded():
                return " ".join(self._excluded), []
            case GetPort(ports) if ports in self._ports:
                _, published, owner = self._ports[ports]
                return "", [fd for fd in (published.fd, owner) if fd is not None]
            case GetPort(ports):
                raise InvalidRequest(f"{_name(ports)} is not served")
            case GetShared(kind, family):
                return "", self._server.shared(PROTOCOLS[kind], FAMILIES[family])
        raise InvalidRequest(f"the relay does not serve {type(request).__name__}")

    def _page(self, offset: int, line_of: Callable[[_Port], str]) -> str:
        """Return lines about the ports from one of them on: as many as fit an answer."""
        lines, size = [], 0
        for port in islice(self._ports.values(), offset, offset + protocol.PAGE):
            lines.append(line := line_of(port))
            size += len(line) + 1
            if size > protocol.PAGE_BYTES:
                return "\n".join(lines[:-1])
        return "\n".join(lines)

    def _listed(self, port: _Port) -> Serve:
        served = port.served
        return served._replace(mode=Mode.ENDED) if served.ports in self._ownerless else served

    def _serve(self, served: Serve, fds: list[int]) -> None:
        ports, is_leased = served.ports, served.mode is Mode.LEASED
        known = self._ports.get(ports)
        # Served already: a new daemon grants the lease again, and connections go on.
        if known is not None and not (is_leased and known.served == served):
            raise InvalidRequest(f"{_name(ports)} is served already")
        backend = Backend(PROTOCOLS[ports.protocol], family_of(served.to.address), *served.to, served.admitted)
        if served.mode in (Mode.SHARED, Mode.HELD):
            return self._serve_shared(served, backend, fds)
        if not 1 <= len(fds) <= 1 + is_leased:
            raise InvalidRequest(f"wrong number of descriptors with {_name(ports)}: {len(fds)}")
        owner = fds[1] if len(fds) == 2 else None
        with ExitStack() as undo:
            if owner is not None:
                self._loop.add(owner, lambda _events: self._owner_ended(ports, owner), READABLE)
                undo.callback(self._loop.forget, owner)
            if known is None:
                published = self._server.publish(backend, undo.enter_context(_first_socket(fds)))
            else:
                published = known.published
            undo.pop_all()
        if known is not None:
            self._disown(known)
        if owner is not None:
            fds.remove(owner)
        self._ports[ports] = _Port(served, published, owner)
        self._ownerless.discard(ports)

    def _serve_shared(self, served: Serve, backend: Backend, fds: list[int]) -> None:
        ports, at = served.ports, protocol.canonical(served.ports.address)
        needs_raw = served.mode is Mode.HELD and ports.protocol == "udp"
        if needs_raw and len(fds) != 1:
            raise InvalidRequest(f"wrong number of descriptors with {_name(ports)}: {len(fds)}")
        reached = PublishedRange(PROTOCOLS[ports.protocol], family_of(at), at, ports.first, ports.last)
        with ExitStack() as undo:
            raw = undo.enter_context(_first_socket(fds)) if needs_raw else None
            self._ports[ports] = _Port(served, self._server.publish_shared(reached, backend, raw), None)
            undo.pop_all()

    def _disown(self, port: _Port) -> None:
        if port.owner is not None:
            self._loop.close_later(port.owner, partial(os.close, port.owner))

    def _remove(self, ports: HostPorts, then: Callable[[], None]) -> None:
        port = self._ports.pop(ports, None)
        self._ownerless.discard(ports)
        if port is None:
            return then()
        self._disown(port)

        def removed() -> None:
            then()
            if not self._ports:
                self._emptied()

        return port.published.close(removed)

    def _retire(self, limit_s: int) -> None:
        """Accept no client any more; the ports are still removed on request, and so end their connections."""
        if not self._is_retired:
            self._is_retired = True
            self._server.leave()
            for port in self._ports.values():
                port.published.leave()
            for name in tuple(self._held):
                self._close_held(name)
            self._retired(limit_s)

    def daemon_left(self) -> None:
        """Remove the ports that the last daemon had yet to remove: no daemon is connected now.

        If none is left this process is going to end, and clients of the shared sockets are the next relay's.
        """
        for ports in tuple(self._ownerless):
            self._remove_ownerless(ports)
        if not self._ports:
            self._server.unshare()

    def _owner_ended(self, ports: HostPorts, owner: int) -> None:
        self._loop.forget(owner)
        self._ownerless.add(ports)
        if not self._is_attended():
            self._remove_ownerless(ports)

    def _remove_ownerless(self, ports: HostPorts) -> None:
        self._log.warning("%s: launcher exited while no daemon is running: loopback redirect ended", _name(ports))
        self._close_held(protocol.REDIRECT)
        self._remove(ports, lambda: None)

    def _close_held(self, name: str) -> None:
        for fd in self._held.pop(name, ()):
            os.close(fd)

    def _share(self, share: Share, fds: list[int]) -> None:
        if not fds:
            raise InvalidRequest("no socket came with the request")
        with ExitStack() as undo:
            sock = undo.enter_context(_first_socket(fds))
            binding_fd = fds[0] if fds else None
            self._server.share(PROTOCOLS[share.protocol], FAMILIES[share.family], sock, binding_fd)
            undo.pop_all()


def _counted(port: _Port) -> str:
    return protocol.encode_counted(port.served.ports, port.published.counters())


def _first_socket(fds: list[int]) -> socket.socket:
    """Take the first descriptor out of `fds`.  OSError: it is not a socket's."""
    sock = socket.socket(fileno=fds[0])
    del fds[0]
    return sock


def _name(ports: HostPorts) -> str:
    return " ".join(map(str, ports))
