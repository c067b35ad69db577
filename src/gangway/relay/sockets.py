"""The values that all parts of the relay describe sockets by: backends, ranges of ports, peers."""

import errno
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from gangway.inet import PROTOCOLS, format_host
from gangway.relay.admission import Admission

_PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
"""The errors that a call for a new descriptor fails with when the process or the kernel has reached a limit."""


class Backend(NamedTuple):
    """The container's end of a port mapping: clients of the port are connected to it."""

    protocol: int  # socket.IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
    family: int  # socket.AF_INET or AF_INET6
    address: str
    port: int
    admission: Admission | None = None  # which clients are connected; None: all

    def __str__(self) -> str:
        return f"{_PROTOCOL_NAMES[self.protocol]} {format_host(self.address)}:{self.port}"


class PublishedRange(NamedTuple):
    """A range of ports of a host address."""

    protocol: int
    family: int
    address: str  # as inet_ntop(3) writes it; a link-local address may have a zone
    first: int
    last: int


class PublishedPort(Protocol):
    """A port, or a range of them, that the relay serves until it is closed."""

    def close(self) -> None: ...


def family_of(address: str) -> int:
    """Return socket.AF_INET or AF_INET6, after the form of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def is_unspecified(sock: socket.socket) -> bool:
    """True if a socket is bound to all addresses."""
    return sock.getsockname()[0] in ("0.0.0.0", "::")


def unlink_socket(path: Path) -> None:
    """Remove a socket's file; any other kind of file is left alone."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
