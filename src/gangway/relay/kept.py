"""Ports that the relay keeps by itself, until it is told to let them go: the daemon's.

What this file knows: the messages by which such a port comes and goes.  What it must not know: connections, what is
done with a port.

How it works.  A lease ends with its holder.  The daemon may be restarted, or die, and no published port is to suffer
from it; so its ports stay with the relay, which knows each range by the host address and ports that it was handed over
with.  A daemon that comes back asks which there are.  Most have no socket of their own: they share one of each protocol
and family, to which the kernel steers what arrives for them (`shared.py`).

    daemon → relay   keep PROTO HOST-IP FIRST LAST CONTAINER-IP FIRST own       with the port's socket (SCM_RIGHTS)
                     keep PROTO HOST-IP FIRST LAST CONTAINER-IP FIRST shared
                     drop PROTO HOST-IP FIRST LAST           answered when nothing of it is left
                     kept OFFSET                             which there are, from one of them on
                     share PROTO FAMILY COUNT    with the socket that serves those without one; with UDP's, `binding`
                     shared                                  whether it has been given any
                     hold NAME COUNT             with so many descriptors, which stay open in place of those before
                     held NAME                   answered with those descriptors
    relay → daemon   ok        or        error TEXT
                     to `kept`, after ok, PAGE lines at most, as after `keep`; to `shared`, after ok, how many

What is held means nothing to the relay: open descriptors are how the kernel is told what is still wanted.
"""

import os
import socket
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from gangway.errors import InvalidRequest
from gangway.relay.sockets import PROTOCOLS, Backend, PublishedRange

VERBS = ("keep", "drop", "kept", "share", "shared", "hold", "held")
PAGE = 200
MOST_HELD = 32
OWN, SHARED = "own", "shared"
_PROTOCOLS = PROTOCOLS
_LAST_PORT = 65535
_FAMILIES = {"4": socket.AF_INET, "6": socket.AF_INET6}

Answer = Callable[[str, Sequence[int]], None]
"""Sends a text, and descriptors."""


Range = PublishedRange


class Published(Protocol):
    """A port that the relay serves."""

    def close(self) -> None: ...


class Shared(Protocol):
    """Who serves the ports that have no socket of their own; its length tells by how many."""

    def __len__(self) -> int: ...

    def use(self, protocol: int, family: int, sock: socket.socket, binding_fd: int | None) -> None:
        """By this socket from now on."""

    def publish(self, ports: Range, backend: Backend) -> Published:
        """A range, and where clients of its first port are to be taken."""


def parse_backend(protocol: str, address: str, port: str) -> Backend:
    """Where clients are to be taken.  ValueError: it is no such place."""
    if protocol not in _PROTOCOLS:
        raise ValueError(protocol)
    family, _ = _parse_address(address)
    return Backend(_PROTOCOLS[protocol], family, address, _parse_port(port))


def parse_range(protocol: str, address: str, first: str, last: str) -> Range:
    """Ports of the host.  ValueError: there are no such."""
    bare, _, zone = address.partition("%")
    family, plain = _parse_address(bare)
    numbers = _parse_port(first), _parse_port(last)
    if protocol not in _PROTOCOLS or numbers[0] > numbers[1]:
        raise ValueError(protocol, first, last)
    return Range(_PROTOCOLS[protocol], family, f"{plain}%{zone}" if zone else plain, *numbers)


def _parse_address(text: str) -> tuple[int, str]:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return family, socket.inet_ntop(family, socket.inet_pton(family, text))
    except OSError:
        raise ValueError(text) from None


def _parse_port(text: str) -> int:
    if not 0 < int(text) <= _LAST_PORT:
        raise ValueError(text)
    return int(text)


class _Port(NamedTuple):
    """A range that is served; `backend` and `how` as a daemon is told."""

    backend: str
    how: str
    published: Published


class Kept:
    """The kept ports.

    `publish` makes a port of a backend and a socket of its own; `withdraw` ends one, and calls what it is given when
    nothing is left.
    """

    def __init__(
        self,
        publish: Callable[[Backend, socket.socket], Published],
        withdraw: Callable[[Published, Callable[[], None]], None],
        shared: Shared,
    ) -> None:
        self._publish = publish
        self._withdraw = withdraw
        self._shared = shared
        self._ports: dict[str, _Port] = {}
        self._held: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._ports)

    def hear(self, message: str, fds: list[int], answer: Answer) -> None:
        """Does what a message asks for, and answers it; the descriptors that came with it are ours to close."""
        try:
            match message.split():
                case ["keep", protocol, address, first, last, to, to_first, how]:
                    ports, backend = parse_range(protocol, address, first, last), parse_backend(protocol, to, to_first)
                    self._keep(" ".join((protocol, address, first, last)), ports, backend, how, fds)
                    answer("ok", ())
                case ["drop", *words]:
                    self._drop(" ".join(words), answer)
                case ["kept", offset]:
                    lines = (f"{key} {port.backend} {port.how}" for key, port in self._ports.items())
                    answer("\n".join(("ok", *islice(lines, int(offset), int(offset) + PAGE))), ())
                case ["share", protocol, family, count]:
                    _check_came(fds, count)
                    self._share(protocol, family, fds)
                    answer("ok", ())
                case ["shared"]:
                    answer(f"ok {len(self._shared)}", ())
                case ["hold", name, count]:
                    _check_came(fds, count)
                    self._held[name], fds = fds, self._held.get(name, [])
                    answer("ok", ())
                case ["held", name]:
                    answer("ok", self._held.get(name, ()))
                case _:
                    raise ValueError(message)
        except (ValueError, TypeError):
            answer(f"error not understood: {message!r}", ())
        except (InvalidRequest, OSError) as error:
            answer(f"error {error}", ())
        finally:
            for fd in fds:
                os.close(fd)

    def let_go(self) -> None:
        """In a worker process: what is held is the relay's own."""
        for fds in self._held.values():
            for fd in fds:
                os.close(fd)
        self._held.clear()

    def _keep(self, key: str, ports: Range, backend: Backend, how: str, fds: list[int]) -> None:
        if key in self._ports:
            raise InvalidRequest(f"{key} is kept already")
        if how not in (OWN, SHARED) or backend.port + ports.last - ports.first > _LAST_PORT:
            raise ValueError(how, backend)
        published = self._shared.publish(ports, backend) if how == SHARED else self._serve(ports, backend, fds)
        self._ports[key] = _Port(f"{backend.address} {backend.port}", how, published)

    def _serve(self, ports: Range, backend: Backend, fds: list[int]) -> Published:
        if ports.first != ports.last:
            raise ValueError(ports)
        if not fds:
            raise InvalidRequest("no socket came with the port: the relay has no file descriptor left")
        sock = socket.socket(fileno=fds[-1])
        fds.pop()  # from here on it is the socket's to close
        return self._publish(backend, sock)

    def _drop(self, key: str, answer: Answer) -> None:
        if key not in self._ports:
            raise InvalidRequest(f"{key} is not kept")
        self._withdraw(self._ports.pop(key).published, lambda: answer("ok", ()))

    def _share(self, protocol: str, family: str, fds: list[int]) -> None:
        if protocol not in _PROTOCOLS or family not in _FAMILIES or not fds:
            raise ValueError(protocol, family)
        sock = socket.socket(fileno=fds[0])
        fds.pop(0)
        try:
            self._shared.use(_PROTOCOLS[protocol], _FAMILIES[family], sock, fds[0] if fds else None)
        except BaseException:
            sock.close()
            raise


def _check_came(fds: Sequence[int], count: str) -> None:
    if len(fds) != int(count):
        raise InvalidRequest("not all of them came: the relay has no file descriptor left")
