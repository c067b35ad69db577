"""Host ports: binding them, and finding out which program uses one.

A port is reserved by a socket bound to it: with SO_REUSEADDR for TCP, so that connections of an earlier listener in
TIME_WAIT do not block it (socket(7)), and never for UDP, where it would let two sockets share the port.  An IPv6 socket
is for IPv6 only: `0.0.0.0` and `::` are two mappings.

Which of many ports are in use the kernel lists by sock_diag(7) (pyroute2): those of TCP sockets that listen, or are
bound and not connected (a state of its own since Linux 6.8), and of UDP sockets that are not connected.
"""

import ctypes
import errno
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from gangway.errors import Conflict, HostRefused, InvalidRequest, PortInUse, Unsupported
from gangway.host.links import attempting
from gangway.inet import FAMILIES, PROTOCOLS, format_host

BACKLOG = 4096  # net.core.somaxconn's default: the kernel uses the smaller of the two
UNREACHABLE = {4: "192.0.0.8", 6: "100::1"}
"""Addresses that no packet has: RFC 7600 (a dummy), RFC 6666 (to be discarded)."""
_NO_SUCH_SOCKETS = errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT
_REUSE, _V6ONLY = (socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
_FREEBIND = (socket.IPPROTO_IP, 15)  # include/uapi/linux/in.h: IP_FREEBIND
# include/uapi/linux/in6.h: IPV6_FREEBIND; linux/icmpv6.h and ipv6(7): IPV6_CHECKSUM, with the offset in a UDP header
_RAW_OPTIONS = {4: [(*_FREEBIND, 1)], 6: [(socket.IPPROTO_IPV6, 78, 1), (255, socket.IPV6_CHECKSUM, 6)]}
# include/uapi/asm-generic/socket.h; linux/filter.h: struct sock_fprog, and an instruction that accepts 0 bytes
_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_FILTER_PROGRAM, _BPF_RETURN_0 = struct.Struct("@HP"), struct.pack("=HBBI", 0x06, 0, 0, 0)
# include/net/tcp_states.h: TCP_LISTEN and TCP_BOUND_INACTIVE; TCP_CLOSE, which is UDP's state unless it is connected
_BOUND_STATES = {"tcp": 1 << 10 | 1 << 13, "udp": 1 << 7}


def bind_port(protocol: str, address: str, port: int) -> socket.socket:
    """Return a socket bound to a host port (0: any free one), listening unless it is UDP's.

    PortInUse: another program has it (`describe_holder` says which).  Conflict: the address is not the host's.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return _bind(protocol, family, _sockaddr(address, port), *([_REUSE] if protocol != "udp" else []))
    except OSError as error:
        raise _refusal(error, protocol, address, port) from None


def bind_unreachable(protocol: str, family: int) -> socket.socket:
    """Return a socket bound to an address that no client can reach, at a port of the kernel's choice.

    It listens unless it is UDP's; `family` is 4 or 6.  HostRefused: the kernel cannot bind it.
    """
    try:
        return _bind(protocol, FAMILIES[family], (UNREACHABLE[family], 0), _REUSE, _FREEBIND)
    except OSError as error:
        raise HostRefused(f"cannot bind a socket to {UNREACHABLE[family]}: {error.strerror}") from None


def open_raw(family: int) -> socket.socket:
    """Return a raw socket that sends UDP datagrams from any of the host's addresses and ports, bound or not.

    The sender writes their headers, for IPv6 (`family` 6) without the checksum.  The socket receives nothing: it is
    bound to an address that no packet has, and should a process without privileges bind it again, a filter that it
    cannot remove drops everything.  HostRefused: the kernel refused it.
    """
    try:
        sock = socket.socket(FAMILIES[family], socket.SOCK_RAW, socket.IPPROTO_UDP)
        try:
            for option in _RAW_OPTIONS[family]:
                sock.setsockopt(*option)
            drop_all = ctypes.create_string_buffer(_BPF_RETURN_0)
            program = _FILTER_PROGRAM.pack(1, ctypes.addressof(drop_all))
            sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
            sock.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
            sock.bind((UNREACHABLE[family], 0))
            with suppress(BlockingIOError):  # what had arrived before the filter
                while True:
                    sock.recv(1, socket.MSG_DONTWAIT)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise HostRefused(f"cannot open a raw socket, which takes CAP_NET_RAW: {error.strerror}") from None
    return sock


@cache
def no_raw() -> str:
    """Return why `open_raw` fails; empty if it does not."""
    try:
        open_raw(4).close()
    except HostRefused as error:
        return str(error)
    return ""


def has_sockets(protocol: str, family: int = 4) -> bool:
    """True if the kernel has sockets of a protocol in a family: 4 or 6."""
    try:
        socket.socket(FAMILIES[family], _kind(protocol), PROTOCOLS[protocol]).close()
    except OSError as error:
        return error.errno not in _NO_SUCH_SOCKETS
    return True


def require_no_broadcast(address: str) -> None:
    """InvalidRequest: packets to an address are broadcast, by its route.

    The kernel refuses to connect a socket to such an address, unless SO_BROADCAST is set (net/ipv4/datagram.c,
    __ip4_datagram_connect).  Connecting a UDP socket sends nothing.
    """
    if ":" in address:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if sock.connect_ex((address, 9)) == errno.EACCES:
            raise InvalidRequest(f"{address} is a broadcast address: publish on an address of this host")


def first_port_in_use(
    protocol: str, address: str, first: int, last: int, excluded: Collection[str] | None = None
) -> int | None:
    """Return the first port of a range with a socket that conflicts with one at `address`; None if there is none.

    Sockets at `excluded` addresses do not.
    """
    found = ((port, at) for port, at in _bound(protocol, address) if at not in (excluded or ()))
    return min((port for port, at in found if first <= port <= last and _conflict(at, address)), default=None)


def bound_ports(protocol: str) -> frozenset[int]:
    """Return the ports of all sockets that are bound and not connected.  HostRefused: the kernel does not list them."""
    return frozenset(
        found["idiag_sport"]
        for found in _listed(protocol, FAMILIES.values())
        if found["idiag_src"] not in UNREACHABLE.values()
    )


def describe_holder(protocol: str, address: str, port: int) -> str:
    """Return an error message for a port in use: it names the program that uses it, and what to do.

    This is slow: it reads all file descriptors of all processes.
    """
    holder = _holder(protocol, address, port)
    return f"port {format_host(address)}:{port}/{protocol} is in use: choose another port, or stop {holder}"


def _bound(protocol: str, address: str) -> Iterator[tuple[int, str]]:
    """Yield port and address of each socket that is bound, not connected, and could conflict with one at `address`.

    One at `::` serves IPv4, too, unless it is for IPv6 only.
    """
    is_ipv4 = ":" not in address
    for found in _listed(protocol, FAMILIES.values() if is_ipv4 else (socket.AF_INET6,)):
        at = found["idiag_src"].removeprefix("::ffff:")
        is_dual = at == "::" and not found.get_attr("INET_DIAG_SKV6ONLY")
        if at not in UNREACHABLE.values() and (is_ipv4 is (":" not in at) or (is_ipv4 and is_dual)):
            yield found["idiag_sport"], at


def _listed(protocol: str, families: Iterable[int]) -> Iterator[Any]:
    """Yield the kernel's record of each socket that is bound and not connected.

    A list takes milliseconds for TCP however few there are: the kernel walks through its whole hash table.
    """
    from pyroute2.netlink.diag import DiagSocket  # it takes megabytes, and a daemon with leases only needs none of it

    with attempting("list sockets"), DiagSocket() as diag:
        diag.bind()
        for family in families:
            yield from diag.get_sock_stats(family=family, states=_BOUND_STATES[protocol], protocol=PROTOCOLS[protocol])


def _conflict(at: str, address: str) -> bool:
    """True if sockets at both addresses conflict; one at `::` may serve both families."""
    if (":" in at) is (":" in address):
        return at == address or bool({at, address} & {"0.0.0.0", "::"})
    return at == "::"


def _holder(protocol: str, address: str, port: int) -> str:
    import psutil  # some 10 MB that are needed only here

    for connection in psutil.net_connections(protocol) if protocol != "sctp" else ():
        at = connection.laddr
        listens = protocol == "udp" or connection.status == psutil.CONN_LISTEN
        if at and at.port == port and listens and _conflict(at.ip, address) and connection.pid is not None:
            where = "it" if at.ip == address else f"{format_host(at.ip)}:{port}"
            with suppress(psutil.Error):  # it has just ended
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid}), which listens on {where}"
    return "the program that listens on it (gangway cannot see which)"


def _kind(protocol: str) -> socket.SocketKind:
    return socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM


def _bind(protocol: str, family: int, address: tuple[Any, ...], *options: tuple[int, int]) -> socket.socket:
    sock = socket.socket(family, _kind(protocol), PROTOCOLS[protocol])
    try:
        for option in (*options, *([_V6ONLY] if family == socket.AF_INET6 else [])):
            sock.setsockopt(*option, 1)
        sock.bind(address)
        if protocol != "udp":
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _sockaddr(address: str, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return the socket address; an IPv6 link-local one needs its interface: `fe80::1%br0`."""
    host, _, zone = address.partition("%")
    if ":" not in host:
        return host, port
    return host, port, 0, (int(zone) if zone.isdigit() else socket.if_nametoindex(zone)) if zone else 0


def _refusal(error: OSError, protocol: str, address: str, port: int) -> Exception:
    at = f"{format_host(address)}:{port}/{protocol}"
    match error.errno:
        case errno.EADDRINUSE:
            return PortInUse(f"port {at} is in use")
        case errno.EADDRNOTAVAIL:
            return Conflict(f"{address} is not an address of this host")
        case number if number in _NO_SUCH_SOCKETS:
            return Unsupported(f"cannot bind port {at}: the kernel has no {protocol} sockets of that family")
        case errno.EACCES | errno.EPERM:
            reason = "permission denied; run as root"
        case errno.EMFILE | errno.ENFILE:
            reason = "no file descriptor is left; raise the limit (ulimit -n)"
        case _:
            reason = error.strerror or str(error)
    return HostRefused(f"cannot bind port {at}: {reason}")
