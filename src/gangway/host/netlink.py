"""Messages of netlink(7): how they and their attributes are packed and unpacked (include/uapi/linux/netlink.h).

pyroute2 decodes every attribute of every message.  That takes milliseconds where gangway needs a few bytes of many.
"""

import os
import socket
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

NETFILTER = 12
"""The netfilter subsystems' part of the kernel, NETLINK_NETFILTER."""
NFTABLES = 10
"""The subsystem of nftables, NFNL_SUBSYS_NFTABLES: the upper byte of a message's type."""
NETFILTER_HEADER = struct.Struct("!BBH")
"""struct nfgenmsg, with which a message's body begins: family, version, resource."""
TABLE_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
"""The families of nftables' tables, NFPROTO_…, as nft names them."""
MESSAGE = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port."""
REQUEST, ACK, DUMP = 0x01, 0x04, 0x100 | 0x200
"""Flags of a request: NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP."""
INTERRUPTED = 0x10
"""A flag of a message of a dump, NLM_F_DUMP_INTR: what is listed has changed meanwhile."""
ERROR, DONE = 2, 3
"""Types of messages: an error or, with the code 0, an acknowledgement; and the end of a dump."""
BUFFER_BYTES = 1 << 16
"""Enough for any datagram of a dump: it has 32 KiB at most (af_netlink.c, netlink_recvmsg)."""
SOL_NETLINK, ADD_MEMBERSHIP, CAP_ACK = 270, 1, 10
"""Options of the socket.  NETLINK_CAP_ACK: an error repeats the header of its request, and not the rest of it."""

_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_LAST = 1  # the sequence number of a request that is acknowledged
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF  # NLA_F_NESTED, NLA_TYPE_MASK
_CODE = struct.Struct("=i")  # the first field of an error, and of the end of a dump
_ATTEMPTS = 10


class Message(NamedTuple):
    """A message of a datagram: where it begins and ends there, and its header."""

    start: int
    end: int
    kind: int
    flags: int
    sequence: int
    port: int  # of whose request it is about


def connect(protocol: int) -> socket.socket:
    """Return a socket to a part of the kernel: NETLINK_….  OSError: this kernel does not have it."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)


def pack_message(kind: int, flags: int, body: bytes) -> bytes:
    """Pack a request.  Several can be sent at once, if only the last one is to be acknowledged (the flag ACK)."""
    return MESSAGE.pack(MESSAGE.size + len(body), kind, flags, _LAST if flags & ACK else 0, 0) + body


def pack_attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(-length % 4)


def pack_nested(kind: int, *attributes: bytes) -> bytes:
    """Pack an attribute that has attributes."""
    return pack_attribute(kind | _NESTED, b"".join(attributes))


def subscribe(sock: socket.socket, *groups: int) -> None:
    """Receive the notices of these groups.  OSError: the kernel refuses."""
    sock.bind((0, 0))
    for group in groups:
        sock.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, group)


def each_attribute(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute."""
    while start < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        yield kind & _TYPE_MASK, data[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """Return the values of attributes, of which none comes twice, by type."""
    return dict(each_attribute(data, start))


def text_of(value: bytes | memoryview) -> str:
    """Return the text that an attribute has, without the zero at its end."""
    return bytes(value).rstrip(b"\0").decode(errors="replace")


def attributes_among(data: memoryview, start: int, wanted: Collection[int]) -> dict[int, memoryview]:
    """Return the values of the wanted attributes that are present: of many, the few that are needed."""
    found, end, unpack = {}, len(data), _ATTRIBUTE.unpack_from
    while start < end:
        length, kind = unpack(data, start)
        kind &= _TYPE_MASK
        if kind in wanted:
            found[kind] = data[start + _ATTRIBUTE.size : start + length]
            if len(found) == len(wanted):
                break
        start += (length + 3) & ~3
    return found


def messages(data: bytes) -> Iterator[Message]:
    """Yield the messages of a datagram."""
    start = 0
    while start < len(data):
        length, kind, flags, sequence, port = MESSAGE.unpack_from(data, start)
        yield Message(start, start + length, kind, flags, sequence, port)
        start += (length + 3) & ~3


def replies(sock: socket.socket, requests: Collection[bytes]) -> list[memoryview | None]:
    """Send requests that are answered by one message each, and return these without headers; None: it was refused."""
    if requests:
        sock.send(b"".join(requests))
    found = (sock.recv(BUFFER_BYTES) for _ in requests)
    return [None if MESSAGE.unpack_from(data)[1] == ERROR else memoryview(data)[MESSAGE.size :] for data in found]


def error_code(data: bytes, start: int) -> int:
    """Return the errno of the message of type ERROR or DONE that begins there; 0: success."""
    return -int(_CODE.unpack_from(data, start + MESSAGE.size)[0])


def errors(sock: socket.socket) -> Iterator[int]:
    """Yield the errno of each request that failed, after requests were sent of which the last one has the flag ACK."""
    while True:
        data = sock.recv(BUFFER_BYTES)
        for message in messages(data):
            if message.kind == ERROR:
                if code := error_code(data, message.start):
                    yield code
                if message.sequence == _LAST:
                    return


def listed(sock: socket.socket, request: bytes) -> list[memoryview]:
    """Send a request for a dump, and return its messages without their headers.  OSError: it is refused.

    An interrupted dump may lack objects, or have some twice: it is repeated; if changes never stop, the last one is
    returned.
    """
    for _ in range(_ATTEMPTS):
        sock.send(request)
        bodies, is_complete = answer(sock)
        if is_complete:
            break
    return bodies


def answer(sock: socket.socket) -> tuple[list[memoryview], bool]:
    """Receive an answer that ends with DONE, or with an acknowledgement.  OSError: the request failed.

    Return its messages without their headers, and whether it is complete: a dump that was not interrupted.
    """
    bodies: list[memoryview] = []
    is_complete = True
    while True:
        data, start = sock.recv(BUFFER_BYTES), 0
        view = memoryview(data)
        while start < len(data):
            length, kind, flags, _, _ = MESSAGE.unpack_from(data, start)
            is_complete = is_complete and not flags & INTERRUPTED
            if kind in (ERROR, DONE):
                if code := error_code(data, start):
                    raise OSError(code, os.strerror(code))
                return bodies, is_complete
            bodies.append(view[start + MESSAGE.size : start + length])
            start += (length + 3) & ~3


def dump(sock: socket.socket, request: bytes) -> Iterator[bytes]:
    """Send a request for a dump, and yield its datagrams.  OSError: it is refused.

    Only for dumps whose end is a datagram of its own, as it is if the kernel's function returns `skb->len`
    (af_netlink.c, netlink_dump).
    """
    sock.send(request)
    while True:
        data = sock.recv(BUFFER_BYTES)
        if MESSAGE.unpack_from(data)[1] in (ERROR, DONE):
            if code := error_code(data, 0):
                raise OSError(code, os.strerror(code))
            return
        yield data
