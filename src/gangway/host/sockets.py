"""Host ports: taking one, and who has one that is taken.

What this file knows: sockets and processes.  What it must not know: mappings, the relay.

A port is taken by a socket that is bound to it: with SO_REUSEADDR for TCP, so that connections of an earlier listener
that are still in TIME_WAIT do not keep it away (socket(7)), and never for UDP, where it would let two have the same
port.  An IPv6 socket is for IPv6 only: `0.0.0.0` and `::` are two mappings.

Of many ports one asks the kernel which are taken (sock_diag(7), by pyroute2): by a socket of TCP that listens, or is
bound and not connected (a state of its own since Linux 6.8), or by one of UDP that is not connected.
"""

import errno
import socket
from collections.abc import Iterator

from pyroute2.netlink.diag import DiagSocket

from gangway.errors import Conflict, HostRefused, PortTaken, Unsupported
from gangway.host.links import doing
from gangway.text import in_brackets

IPPROTO_SCTP = 132
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": IPPROTO_SCTP}
_NOWHERE = {4: "192.0.0.8", 6: "100::1"}
"""Addresses that no packet has: RFC 7600 (a dummy), RFC 6666 (to be discarded)."""
_IP_FREEBIND = 15  # include/uapi/linux/in.h
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# include/net/tcp_states.h: TCP_LISTEN and TCP_BOUND_INACTIVE; TCP_CLOSE, which is UDP's state unless it is connected
_TAKING = {"tcp": 1 << 10 | 1 << 13, "udp": 1 << 7}
BACKLOG = 4096  # net.core.somaxconn's default: the kernel takes the smaller of the two


def take(protocol: str, address: str, port: int) -> socket.socket:
    """A socket bound to a host port (0: any free one), listening if that is in its nature.

    PortTaken: somebody has it (`named` knows who).  Conflict: the address is not this host's.
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


def nowhere(protocol: str, family: int) -> socket.socket:
    """A socket bound to an address that nobody can ask, and a port of the kernel's choice; listening if that is in its
    nature.  HostRefused: there is no such."""
    sock = socket.socket(_FAMILIES[family], socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM)
    try:
        if family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.bind((_NOWHERE[family], 0))
        if protocol != "udp":
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise HostRefused(f"no socket can be bound to {_NOWHERE[family]}: {error.strerror}") from None
    return sock


def has_family(family: int) -> bool:
    """Whether the kernel has sockets of a family: 4 or 6."""
    try:
        socket.socket(_FAMILIES[family], socket.SOCK_DGRAM).close()
    except OSError:
        return False
    return True


def taken(protocol: str, address: str, first: int, last: int) -> int | None:
    """A port from `first` to `last` that somebody has whom a socket at this address would be in the way of."""
    having = (port for port, at in _having(protocol, address) if first <= port <= last and _clash(at, address))
    return min(having, default=None)


def bound(protocol: str) -> frozenset[int]:
    """The ports that sockets have who are not connected.  HostRefused: the kernel does not tell."""
    return frozenset(port for address in ("0.0.0.0", "::") for port, _ in _having(protocol, address))


def _having(protocol: str, address: str) -> Iterator[tuple[int, str]]:
    """The ports that sockets have who may be in the way of one at this address, and where they have them."""
    is_four = ":" not in address
    with doing("list sockets"), DiagSocket() as diag:
        diag.bind()
        for family in (socket.AF_INET, socket.AF_INET6) if is_four else (socket.AF_INET6,):
            for one in diag.get_sock_stats(family=family, states=_TAKING[protocol], protocol=PROTOCOLS[protocol]):
                at = one["idiag_src"].removeprefix("::ffff:")
                of_both = at == "::" and not one.get_attr("INET_DIAG_SKV6ONLY")
                if at not in _NOWHERE.values() and (is_four is (":" not in at) or (is_four and of_both)):
                    yield one["idiag_sport"], at


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


def named(protocol: str, address: str, port: int) -> str:
    """That a port is taken, and by whom, for a person.  It takes a while: all descriptors of all processes are looked
    at."""
    who = _holder(protocol, address, port)
    return f"port {_at(protocol, address, port)} is taken by {who}: choose another, or end that"


def _at(protocol: str, address: str, port: int) -> str:
    return f"{in_brackets(address)}:{port}/{protocol}"


def _refusal(error: OSError, protocol: str, address: str, port: int) -> Exception:
    at = _at(protocol, address, port)
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


def _holder(protocol: str, address: str, port: int) -> str:
    import psutil  # some 10 MB that are needed only here

    if protocol == "sctp":
        return "another program"
    for connection in psutil.net_connections(protocol):
        taken = connection.laddr
        listens = protocol == "udp" or connection.status == psutil.CONN_LISTEN
        if taken and taken.port == port and listens and _clash(taken.ip, address):
            return _named(connection.pid)
    return "another program"


def _clash(at: str, address: str) -> bool:
    """Whether a socket at the one is in the way at the other; `::` may be of both families."""
    if (":" in at) is (":" in address):
        return at == address or bool({at, address} & {"0.0.0.0", "::"})
    return at == "::"


def _named(pid: int | None) -> str:
    if pid is None:
        return "a program that cannot be seen from here"
    try:
        with open(f"/proc/{pid}/comm") as file:
            return f"{file.read().strip()} (pid {pid})"
    except OSError:
        return f"pid {pid}"
