"""Messages of netlink(7): how they and their attributes are packed and unpacked (include/uapi/linux/netlink.h).

pyroute2 decodes every attribute of every message.  That takes milliseconds where gangway needs a few bytes of many.
"""

import os
import socket
import struct
from collections.abc import Iterator

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
SOL_NETLINK, CAP_ACK = 270, 10
"""An option of the socket, NETLINK_CAP_ACK: an error repeats the header of its request, and not the rest of it."""

_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_LAST = 1  # the sequence number of a request that is acknowledged
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF  # NLA_F_NESTED, NLA_TYPE_MASK
_CODE = struct.Struct("=i")  # the first field of an error, and of the end of a dump


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


def each_attribute(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute."""
    while start < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        yield kind & _TYPE_MASK, data[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3


def attributes(data: bytes, start: int = 0) -> dict[int, bytes]:
    """Return the values of attributes, of which none comes twice, by type."""
    return dict(each_attribute(data, start))


def messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield where each message of a datagram begins, its type and its sequence number."""
    start = 0
    while start < len(data):
        length, kind, _, sequence, _ = MESSAGE.unpack_from(data, start)
        yield start, kind, sequence
        start += (length + 3) & ~3


def error_code(data: bytes, start: int) -> int:
    """Return the errno of the message of type ERROR or DONE that begins there; 0: success."""
    return -int(_CODE.unpack_from(data, start + MESSAGE.size)[0])


def errors(sock: socket.socket) -> Iterator[int]:
    """Yield the errno of each request that failed, after requests were sent of which the last one has the flag ACK."""
    while True:
        data = sock.recv(BUFFER_BYTES)
        for start, kind, sequence in messages(data):
            if kind == ERROR:
                if code := error_code(data, start):
                    yield code
                if sequence == _LAST:
                    return


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
