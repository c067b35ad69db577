"""Connected sockets of any process: they are found by sock_diag(7), and connected again, or ended.

Facts that this file leans on:

* A process with CAP_SYS_PTRACE gets a duplicate of another process's descriptor (pidfd_getfd(2), Linux 5.6).  What is
  done to the duplicate is done to the socket.
* connect() to AF_UNSPEC dissolves the association.  A TCP connection is reset at both ends (net/ipv4/tcp.c,
  tcp_disconnect); a thread that waits for data gets EPIPE, or on some kernels prevents it (EBUSY).  A UDP socket may be
  connected again.
* SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY) needs no descriptor.  The process gets ECONNABORTED, and a UDP socket is not
  connected any more: a program that ignores errors would never reach anybody again.
* A socket has a number for life, its cookie, which is the same for eBPF programs and for sock_diag.
"""

import ctypes
import errno
import os
import re
import socket
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from ctypes import c_long
from ipaddress import IPv6Address
from typing import NamedTuple

from gangway.errors import HostRefused
from gangway.host import netlink
from gangway.inet import FAMILIES, PROTOCOLS

_SOCK_DIAG = 4  # include/uapi/linux/netlink.h: NETLINK_SOCK_DIAG
_BY_FAMILY, _DESTROY = 20, 21  # include/uapi/linux/sock_diag.h: SOCK_DIAG_BY_FAMILY, SOCK_DESTROY
# include/uapi/linux/inet_diag.h: struct inet_diag_req_v2 before its socket ID; struct inet_diag_sockid: ports,
# addresses, interface, cookie; struct inet_diag_msg
_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states
_ID = struct.Struct("=2s2s16s16sIII")
_FOUND = struct.Struct("=16x4x2s2s16s16sIII16xI")  # after the header and four bytes a socket ID, later an inode
_ID_AT = 20
_ANY_COOKIE = (0xFFFFFFFF, 0xFFFFFFFF)  # INET_DIAG_NOCOOKIE
# include/net/tcp_states.h: ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING
_CONNECTED = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))
_SYS_PIDFD_GETFD = 438  # include/uapi/asm-generic/unistd.h: the same on all architectures
_UNSPECIFIED = bytes(16)  # struct sockaddr of the family AF_UNSPEC
_CONNECTING_S = 0.01  # how long a socket that is redirected may take until the kernel lists it
_NO_DESTROY = "this kernel cannot end another program's socket (CONFIG_INET_DIAG_DESTROY)"
_SOCKET = re.compile(r"socket:\[(\d+)\]")

_libc = ctypes.CDLL(None, use_errno=True)
_Name = tuple[str, int]
"""An address and a port."""


class Redirected(NamedTuple):
    """A socket that was led `to` an address and port, where its process had requested another."""

    protocol: str
    cookie: int
    to: _Name
    requested: _Name


class _Connected(NamedTuple):
    """A redirected socket that is connected: its family (AF_…), its ID for the kernel, its peer's port, its inode."""

    redirected: Redirected
    family: int
    packed_id: bytes
    port: int
    inode: int


def end(sockets: Collection[Redirected]) -> None:
    """Reset TCP connections, and connect UDP sockets to the requested address again: it may lead elsewhere now.

    Sockets that are not connected, or to other addresses, are left alone.  HostRefused: the kernel refused.
    """
    try:
        with netlink.connect(_SOCK_DIAG) as diag:
            missing = {*sockets} - _end_connected(diag, sockets)
            if missing:
                time.sleep(_CONNECTING_S)
                _end_connected(diag, missing)
    except OSError as error:
        raise HostRefused(f"cannot end redirected connections: {error.strerror}: unpublish again") from None


def unavailable() -> str:
    """Return why the kernel cannot end sockets by itself; empty if it can."""
    try:
        with netlink.connect(_SOCK_DIAG) as diag:
            return "" if all(_can_destroy(diag, protocol) for protocol in ("tcp", "udp")) else _NO_DESTROY
    except OSError as error:
        return error.strerror or str(error)


def _end_connected(diag: socket.socket, sockets: Collection[Redirected]) -> set[Redirected]:
    """End those that are connected, and return them."""
    left = {one.inode: one for one in _find(diag, sockets)}
    found = {one.redirected for one in left.values()}
    for inode, duplicate in _duplicates(left.keys()):
        with duplicate:
            if _disconnect(duplicate, left[inode]):
                del left[inode]
    for one in left.values():
        _destroy(diag, one.redirected.protocol, one.family, one.packed_id)
    return found


def _find(diag: socket.socket, sockets: Collection[Redirected]) -> Iterator[_Connected]:
    """Yield those that are connected: there is one list for each protocol and family, however many are wanted."""
    wanted = {(one.cookie, one.to[0]): one for one in sockets}
    cookies = {one.cookie for one in sockets}
    for protocol in {one.protocol for one in sockets}:
        for family in FAMILIES.values():
            body = _REQUEST.pack(family, PROTOCOLS[protocol], 0, _CONNECTED) + bytes(_ID.size)
            for data in netlink.dump(diag, netlink.pack_message(_BY_FAMILY, netlink.REQUEST | netlink.DUMP, body)):
                for message in netlink.messages(data):
                    at = message.start
                    _, port, _, address, _, low, high, inode = _FOUND.unpack_from(data, at)
                    cookie = low | high << 32
                    if cookie not in cookies or not inode:
                        continue
                    one = wanted.get((cookie, _text(family, address)))
                    if one is not None:
                        packed_id = data[at + _ID_AT : at + _ID_AT + _ID.size]
                        yield _Connected(one, family, packed_id, int.from_bytes(port, "big"), inode)


def _text(family: int, address: bytes) -> str:
    """Return an address as it is in `Redirected`: an IPv4 address also for a socket of IPv6."""
    if family == socket.AF_INET:
        return socket.inet_ntop(family, address[:4])
    mapped = IPv6Address(address).ipv4_mapped
    return str(IPv6Address(address) if mapped is None else mapped)


def _duplicates(inodes: Collection[int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield a duplicate of each of these sockets that a process has, where it can be had."""
    left = set(inodes)
    for pid in _numbers("/proc") if left else ():
        for fd in _numbers(f"/proc/{pid}/fd") if left else ():
            inode = _inode(pid, fd)
            if inode in left and (duplicate := _duplicate(pid, fd)) is not None:
                if os.fstat(duplicate.fileno()).st_ino == inode:
                    left.discard(inode)
                    yield inode, duplicate
                else:
                    duplicate.close()


def _numbers(folder: str) -> list[int]:
    """Return the entries of a folder that are numbers; none if it does not exist any more."""
    try:
        return [int(name) for name in os.listdir(folder) if name.isdigit()]
    except OSError:
        return []


def _inode(pid: int, fd: int) -> int | None:
    """Return the inode of a process's socket; None if the descriptor is of something else, or closed."""
    try:
        found = _SOCKET.fullmatch(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except OSError:
        return None
    return None if found is None else int(found[1])


def _duplicate(pid: int, fd: int) -> socket.socket | None:
    """Return a duplicate of a process's socket; None if it has ended, or we may not."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        own = _libc.syscall(c_long(_SYS_PIDFD_GETFD), pidfd, fd, 0)
        return None if own < 0 else socket.socket(fileno=own)
    except OSError:  # another file has the number now
        os.close(own)
        return None
    finally:
        os.close(pidfd)


def _disconnect(duplicate: socket.socket, one: _Connected) -> bool:
    """Dissolve a socket's association, and connect it again if it is UDP's; False if that is not possible."""
    if _libc.connect(duplicate.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)):
        return False
    if one.redirected.protocol == "udp":
        address, port = one.redirected.requested
        # It may be connected to another port of the container, from which an answer came.
        port = port if one.port == one.redirected.to[1] else one.port
        mapped = f"::ffff:{address}" if one.family == socket.AF_INET6 and ":" not in address else address
        with suppress(OSError):  # the process finds that it is not connected
            duplicate.connect((mapped, port))
    return True


def _destroy(diag: socket.socket, protocol: str, family: int, packed_id: bytes) -> int:
    """Have the kernel end a socket; return 0, or the errno if there is none, or the kernel has no such request."""
    body = _REQUEST.pack(family, PROTOCOLS[protocol], 0, 0) + packed_id
    diag.send(netlink.pack_message(_DESTROY, netlink.REQUEST | netlink.ACK, body))
    code = next(iter([*netlink.errors(diag)]), 0)
    if code not in (0, errno.ENOENT, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code))
    return code


def _can_destroy(diag: socket.socket, protocol: str) -> bool:
    """Try it with a socket of our own, as there is no other way to find out."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as victim:
        victim.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            victim.listen()
        address, port = victim.getsockname()
        packed = _ID.pack(port.to_bytes(2, "big"), bytes(2), socket.inet_aton(address), bytes(16), 0, *_ANY_COOKIE)
        return _destroy(diag, protocol, socket.AF_INET, packed) == 0
