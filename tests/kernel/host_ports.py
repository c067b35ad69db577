"""Published ports as the host's programs see them: whether a port can be bound, and whether the relay serves it."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.netns import Namespace
from tests.kernel.street import Street

PROTOCOLS = ("tcp", "udp")
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROGRAMS = Path(__file__).parents[2] / "src/gangway/ebpf/steering.bpf.o"
WITHOUT_STEERING = (
    "unshare",
    "--mount",
    "--propagation",
    "slave",
    "sh",
    "-c",
    f'mount --bind /dev/null {_PROGRAMS} && exec "$0" "$@"',
)
EVERY = ("1024-65000:1024-65000/tcp", "1024-65000:1024-65000/udp")


def is_steered(street: Street) -> bool:
    """True if the daemon's steering is attached."""
    (found,) = (one["holds"] for one in street.gangway.json("doctor") if one["check"] == "steering: attached")
    return bool(found)


def relayed(street: Street, protocol: str, port: int, at: socket.socket, address: str = "127.0.0.1") -> bool:
    """True if a client reaches `at` by the relay: sockets that are bound to an address are not redirected."""
    with street.host.entered():
        client = socket.socket(FAMILIES[6 if ":" in address else 4], KINDS[protocol])
    with client:
        client.settimeout(3)
        client.bind((address, 0))
        client.connect((address, port))
        client.sendall(b"question")
        if protocol == "udp":
            _, peer = at.recvfrom(100)
            at.sendto(b"answer", peer)
        else:
            served, _ = at.accept()
            with served:
                served.sendall(b"answer")
        return client.recv(100) == b"answer"


@contextmanager
def bound(space: Namespace, protocol: str, address: str, port: int, v6only: bool = False) -> Iterator[socket.socket]:
    """Yield a socket that is bound in a namespace."""
    with space.entered():
        sock = socket.socket(FAMILIES[6 if ":" in address else 4], KINDS[protocol])
    with sock:
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind((address, port))
        yield sock


def is_refused(space: Namespace, protocol: str, address: str, port: int, v6only: bool = False) -> bool:
    """True if bind() fails because the port is in use."""
    try:
        with bound(space, protocol, address, port, v6only):
            return False
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return True
