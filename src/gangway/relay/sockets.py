"""The values that all parts of the relay describe sockets by: backends, ranges of ports, peers."""

import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from gangway.inet import PROTOCOLS, format_host

_PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}


class Backend(NamedTuple):
    """The container's end of a port mapping: clients of the port are connected to it."""

    protocol: int  # socket.IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
    family: int  # socket.AF_INET or AF_INET6
    address: str
    port: int
    admitted: tuple[str, ...] = ()  # the subnets of its clients, ADDRESS/PREFIX-LENGTH, besides the host; none: all

    def __str__(self) -> str:
        return f"{_PROTOCOL_NAMES[self.protocol]} {format_host(self.address)}:{self.port}"


class PublishedRange(NamedTuple):
    """A range of ports of a host address."""

    protocol: int
    family: int
    address: str  # as inet_ntop(3) writes it; a link-local address may have a zone
    first: int
    last: int


class Counters(NamedTuple):
    """What the relay has counted of a port since it serves it; a UDP client counts as a connection."""

    connections: int = 0
    active: int = 0  # of them, now
    up_bytes: int = 0  # to the container
    down_bytes: int = 0
    failed: int = 0  # attempts to connect to the container
    timeouts: int = 0  # the same: it did not answer
    resets: int = 0  # by either side; datagrams that the container refused
    not_admitted: int = 0
    lost: int = 0  # no descriptor, epoll watch or memory was left
    evicted: int = 0  # UDP clients that were forgotten because there were too many
    dropped: int = 0  # datagrams that could not be sent


class PublishedPort(Protocol):
    """A port, or a range of them, that the relay serves until it is closed."""

    @property
    def fd(self) -> int | None: ...

    def leave(self) -> None: ...

    def close(self, then: Callable[[], None]) -> None: ...

    def counters(self) -> Counters: ...


def family_of(address: str) -> int:
    """Return socket.AF_INET or AF_INET6, after the form of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def unlink_socket(path: Path) -> None:
    """Remove a socket's file; any other kind of file is left alone."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
