"""Host ports: taking one, and who has one that is taken.

What this file knows: sockets and processes.  What it must not know: mappings, the relay.

A port is taken by a socket that is bound to it: with SO_REUSEADDR for TCP, so that connections of an earlier listener
that are still in TIME_WAIT do not keep it away (socket(7)), and never for UDP, where it would let two have the same
port.  An IPv6 socket is for IPv6 only: `0.0.0.0` and `::` are two mappings.
"""

import errno
import socket

from gangway.errors import Conflict, HostRefused, PortTaken, Unsupported

IPPROTO_SCTP = 132
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": IPPROTO_SCTP}
BACKLOG = 4096  # net.core.somaxconn's default: the kernel takes the smaller of the two


def take(protocol: str, address: str, port: int) -> socket.socket:
    """A socket bound to a host port (0: any free one), listening if that is in its nature.

    PortTaken: somebody has it (`holder` knows who).  Conflict: the address is not this host's.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        sock = socket.socket(family, kind, PROTOCOLS[protocol])
    except OSError as error:
        raise _refusal(error, protocol, address, port) from None
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol != "udp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(_sockaddr(address, port))
        if protocol != "udp":
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _refusal(error, protocol, address, port) from None
    return sock


def has_sockets(protocol: str) -> bool:
    """Whether the kernel has sockets of a protocol."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        socket.socket(socket.AF_INET, kind, PROTOCOLS[protocol]).close()
    except OSError:
        return False
    return True


def _sockaddr(address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """IPv6 link-local addresses need their interface, `fe80::1%br0`."""
    host, _, zone = address.partition("%")
    if ":" not in host:
        return host, port
    return host, port, 0, (int(zone) if zone.isdigit() else socket.if_nametoindex(zone)) if zone else 0


def _refusal(error: OSError, protocol: str, address: str, port: int) -> Exception:
    at = f"{f'[{address}]' if ':' in address else address}:{port}/{protocol}"
    match error.errno:
        case errno.EADDRINUSE:
            return PortTaken(f"port {at} is taken")
        case errno.EADDRNOTAVAIL:
            return Conflict(f"{address} is not an address of this host")
        case errno.EACCES | errno.EPERM:
            return HostRefused(f"port {at} may not be taken: run as root")
        case errno.EPROTONOSUPPORT | errno.ESOCKTNOSUPPORT | errno.EAFNOSUPPORT:
            return Unsupported(f"port {at} cannot be had: the kernel has no {protocol} sockets of that family")
        case errno.EMFILE | errno.ENFILE:
            return HostRefused(f"port {at} cannot be taken: no file descriptor is left; raise the limit (ulimit -n)")
    return HostRefused(f"port {at} cannot be taken: {error.strerror or error}")


def holder(protocol: str, address: str, port: int) -> str:
    """Who has a port, for a person.  It takes a while: all descriptors of all processes are looked at."""
    import psutil  # some 10 MB that are needed only here

    if protocol == "sctp":
        return "another program"
    for connection in psutil.net_connections(protocol):
        taken = connection.laddr
        listens = protocol == "udp" or connection.status == psutil.CONN_LISTEN
        if taken and taken.port == port and listens and _clash(taken.ip, address):
            return _named(connection.pid)
    return "another program"


def _clash(one: str, other: str) -> bool:
    return one == other or bool({one, other} & {"0.0.0.0", "::"})


def _named(pid: int | None) -> str:
    if pid is None:
        return "a program that cannot be seen from here"
    try:
        with open(f"/proc/{pid}/comm") as file:
            return f"{file.read().strip()} (pid {pid})"
    except OSError:
        return f"pid {pid}"
