"""A relay's ports in the redirect: what the relay itself has no right to enter.

What this file knows: the messages of `gangway.relay.keeper`, and how to tell from a socket which port it has.  What it
must not know: how the kernel is told, what the relay does.

How it works.  Only loopback addresses are redirected, and sockets that have all of a family's addresses, which include
them: who asks another address is whoever wrote the host's rules to decide about.  The redirect is loaded with the first
port.  Where it cannot be, the connection is closed, which the relay understands.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gangway.ebpf.keys import PROTOCOLS, PortBlock, Target
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.requirements import own_netns_cookie
from gangway.errors import GangwayError
from gangway.runtime import netns_cookie

_MESSAGE_BYTES = 256
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_LOOPBACK6 = bytes(15) + b"\1"


def serve(relay: socket.socket, log: Callable[[str], None]) -> None:
    """Does what a relay asks for until it ends, or until that cannot be done, which `log` is told."""
    leases = _Leases()
    try:
        while True:
            message, fds, _flags, _address = socket.recv_fds(relay, _MESSAGE_BYTES, 1)
            socks = [socket.socket(fileno=fd) for fd in fds]
            try:
                match message.decode().split():
                    case ["enter", number, address, port] if socks:
                        leases.enter(int(number), socks[0], address, int(port))
                    case ["erase", number]:
                        leases.erase(int(number))
                        relay.send(b"erased " + number.encode())
                    case []:
                        return
            finally:
                for sock in socks:
                    sock.close()
    except GangwayError as error:
        log(f"sockets are not redirected, the relay serves all: {error}")
    except (ValueError, OSError) as error:
        log(f"the relay is not understood, its ports are not redirected: {error}")
    finally:
        leases.close()


class _Port(NamedTuple):
    """Its socket, which keeps it from anybody else for as long as clients are led past it, and its entries."""

    sock: socket.socket
    blocks: list[PortBlock]


class _NoRelay:
    """Holds nothing: the redirect ends with this process."""

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Ignore them."""

    def held(self, name: str) -> list[int]:
        """Return nothing."""
        return []

    def share(self, protocol: str, family: int, fds: Sequence[int]) -> None:
        """Ignore them."""

    def shared_count(self) -> int:
        """Return 0."""
        return 0

    def is_running(self) -> bool:
        """Return False."""
        return False


class _Leases:
    """The ports, by the numbers that the relay gives them."""

    def __init__(self) -> None:
        self._redirect: Redirect | None = None
        self._ports: dict[int, _Port] = {}

    def enter(self, number: int, sock: socket.socket, address: str, port: int) -> None:
        """One more, with its socket, which is the caller's to close.  Unsupported: nothing can be redirected here."""
        if number in self._ports:
            raise ValueError(f"port {number} is there already")
        self._redirect = self._redirect or Redirect(_NoRelay())
        found = dict(_entries(sock, address, port))
        self._ports[number] = _Port(sock.dup(), [*found])
        self._redirect.add(found)

    def erase(self, number: int) -> None:
        """One less."""
        port = self._ports.pop(number, None)
        if port is not None and self._redirect is not None:
            self._redirect.remove(port.blocks)
            port.sock.close()

    def close(self) -> None:
        """Nothing is redirected any more."""
        if self._redirect is not None:
            self._redirect.close()
        for port in self._ports.values():
            port.sock.close()


def _entries(sock: socket.socket, container: str, port: int) -> Iterator[tuple[PortBlock, Target]]:
    """What a port's socket says about it; nothing if it is not one for this redirect."""
    protocol = _NAMES.get(sock.proto)
    if protocol is None or netns_cookie(sock) != own_netns_cookie():
        return
    if protocol == "tcp" and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return  # somebody else could listen there
    host, number = sock.getsockname()[:2]
    for asked in _asked(sock, _packed(host.partition("%")[0])):
        if len(_packed(container)) <= len(asked):  # an IPv6 socket can be aimed at IPv4, not the other way round
            at = socket.inet_ntop(socket.AF_INET if len(asked) == 4 else socket.AF_INET6, asked)
            yield PortBlock(protocol, at, number, number), Target(container, port)


def _asked(sock: socket.socket, address: bytes) -> Iterator[bytes]:
    """The addresses that sockets are redirected from that a socket bound to `address` serves."""
    every = not any(address)
    if every or address[0] == 127 or address == _LOOPBACK6:
        yield address
    if every and sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        yield bytes(4)


def _packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
