"""Ports that the relay keeps by itself, until it is told to let them go: the daemon's.

What this file knows: the messages by which such a port comes and goes.  What it must not know: connections, what is
done with a port.

How it works.  A lease ends with its holder.  The daemon may be restarted, or die, and no published port is to suffer
from it; so its ports stay with the relay, which knows each by the host address and port that it was handed over with.
A daemon that comes back asks which there are.

    daemon → relay   keep PROTO HOST-IP HOST-PORT CONTAINER-IP CONTAINER-PORT    with the port's socket (SCM_RIGHTS)
                     drop PROTO HOST-IP HOST-PORT                                answered when nothing of it is left
                     kept OFFSET                                                 which there are, from one of them on
                     hold COUNT              with so many descriptors, which stay open in place of those before
                     held                                                        answered with those descriptors
    relay → daemon   ok        or        error TEXT        to `kept`, after ok, PAGE lines at most, as after `keep`

What is held means nothing to the relay: open descriptors are how the kernel is told what is still wanted.
"""

import os
import socket
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from gangway.errors import InvalidRequest
from gangway.relay.stream import IPPROTO_SCTP, Backend

VERBS = ("keep", "drop", "kept", "hold", "held")
PAGE = 200
MOST_HELD = 32
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": IPPROTO_SCTP}

Answer = Callable[[str, Sequence[int]], None]
"""Sends a text, and descriptors."""


class Published(Protocol):
    """A port that the relay serves."""

    def close(self) -> None: ...


def parse_backend(protocol: str, address: str, port: str) -> Backend:
    """Where clients are to be taken.  ValueError: it is no such place."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.inet_pton(family, address)
    except OSError:
        raise ValueError(address) from None
    if protocol not in _PROTOCOLS or not 0 < int(port) < 65536:
        raise ValueError(protocol, port)
    return Backend(_PROTOCOLS[protocol], family, address, int(port))


class Kept:
    """The kept ports.

    `publish` makes a port of a backend and a socket; `withdraw` ends it, and calls what it is given when nothing is
    left.
    """

    def __init__(
        self,
        publish: Callable[[Backend, socket.socket], Published],
        withdraw: Callable[[Published, Callable[[], None]], None],
    ) -> None:
        self._publish = publish
        self._withdraw = withdraw
        self._ports: dict[str, tuple[str, Published]] = {}
        self._held: list[int] = []

    def __len__(self) -> int:
        return len(self._ports)

    def hear(self, message: str, fds: list[int], answer: Answer) -> None:
        """Does what a message asks for, and answers it; the descriptors that came with it are ours to close."""
        try:
            match message.split():
                case ["keep", protocol, address, port, *backend] if fds:
                    self._keep(f"{protocol} {address} {port}", parse_backend(protocol, *backend), fds)
                    answer("ok", ())
                case ["keep", *_] if not fds:
                    raise InvalidRequest("no socket came with the port: the relay has no file descriptor left")
                case ["drop", *words]:
                    self._drop(" ".join(words), answer)
                case ["kept", offset]:
                    lines = (f"{key} {backend}" for key, (backend, _) in self._ports.items())
                    answer("\n".join(("ok", *islice(lines, int(offset), int(offset) + PAGE))), ())
                case ["hold", count]:
                    if len(fds) != int(count):
                        raise InvalidRequest("not all of them came: the relay has no file descriptor left")
                    self._held, fds = fds, self._held
                    answer("ok", ())
                case ["held"]:
                    answer("ok", self._held)
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
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    def _keep(self, key: str, backend: Backend, fds: list[int]) -> None:
        if key in self._ports:
            raise InvalidRequest(f"{key} is kept already")
        sock = socket.socket(fileno=fds[-1])
        fds.pop()  # from here on it is the socket's to close
        self._ports[key] = f"{backend.address} {backend.port}", self._publish(backend, sock)

    def _drop(self, key: str, answer: Answer) -> None:
        if key not in self._ports:
            raise InvalidRequest(f"{key} is not kept")
        _, port = self._ports.pop(key)
        self._withdraw(port, lambda: answer("ok", ()))
