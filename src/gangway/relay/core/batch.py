"""Receives and sends datagrams in batches: recvmmsg(2) and sendmmsg(2), which Python's socket module does not have.

Ancillary data (cmsg(3)) says which host address and port a datagram was sent to, and where an answer leaves from.  A
*destination* is a host address as `destination4` and `destination6` return it.

How it works.  An `Inbox` and an `Outbox` have room for `BATCH` datagrams each, and serve the whole process.  A *label*
is a datagram's sender (a struct sockaddr) followed by its ancillary data, as the kernel wrote them.  Labels
are compared as bytes; only a new one has to be parsed.  A receive that finds nothing costs as much as one datagram, so
an `Inbox` asks for `BATCH` at once, and epoll reports if there are more.

Kernel facts:

* recvmmsg(2) writes msg_namelen, msg_controllen, msg_flags and msg_len, and no other field.  Bytes of a label that it
  does not write stay as they were, so labels and headers are reset after each batch.
* sendmmsg(2) stops at the first datagram that cannot be sent, and returns how many were sent; it reports the error only
  if that was the first one.
* A datagram has at most 65,507 bytes over IPv4 and 65,527 over IPv6.  Memory for one is allocated when a datagram of
  its size arrives (an anonymous mapping has no pages before), and stays: 4 MiB at most, if all had the largest size.
* ip(7), struct in_pktinfo: `ipi_spec_dst` is the local address of the datagram: its destination or, for a broadcast,
  the address of the interface.  Given to sendmsg it is the source of the answer.  With `ipi_ifindex` 0 routing chooses
  the interface.
* ipv6(7), struct in6_pktinfo: address and interface; the interface matters for link-local addresses only.  A multicast
  address cannot be a source: the kernel chooses one.
* A dual-stack socket also reports IPv4's struct (IP_PKTINFO) on request; only that has the interface's address for a
  broadcast (net/ipv6/udp.c, udpv6_recvmsg and udpv6_sendmsg support both).
* IP_RECVORIGDSTADDR and IPV6_RECVORIGDSTADDR report the address and port that a datagram was sent to, as a struct
  sockaddr (net/ipv4/ip_sockglue.c, net/ipv6/datagram.c): a socket that serves many ports needs the port.
"""

import ctypes
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

BATCH = 32
_DATAGRAM_BYTES = 65536
_CMSGHDR = struct.Struct("@Nii")
# struct sockaddr_in6 (28 bytes) with padding; then in6_pktinfo and either in_pktinfo (dual-stack sockets) or struct
# sockaddr_in6 (sockets that serve many ports), each with its header.
_NAME_BYTES = 32
_CONTROL_BYTES = socket.CMSG_SPACE(20) + max(socket.CMSG_SPACE(12), socket.CMSG_SPACE(28))
_LABEL_BYTES = _NAME_BYTES + _CONTROL_BYTES
_SOCKADDR_BYTES: dict[int, int] = {socket.AF_INET: 16, socket.AF_INET6: 28}
IP_PKTINFO = 8  # include/uapi/linux/in.h; Python 3.11 does not name it
_PKTINFO4 = socket.IPPROTO_IP, IP_PKTINFO
_PKTINFO6 = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO
_ORIGDSTADDR4 = socket.IPPROTO_IP, 20
_ORIGDSTADDR6 = socket.IPPROTO_IPV6, 74  # include/uapi/linux/in6.h
_LINK_LOCAL = 0xFE80 >> 6
_MULTICAST = 0xFF

Ancillary = list[tuple[int, int, bytes]]
"""Control messages: level, type, data."""


class _Part(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint),
        ("parts", ctypes.c_void_p),
        ("part_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(_Message):
    """struct mmsghdr: a struct msghdr, then the length of the datagram that was received or sent."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (("length", ctypes.c_uint),)


class Label(NamedTuple):
    """The label of a datagram to be sent: its receiver, and the address to send it from."""

    text: bytes
    name_bytes: int
    control_bytes: int


def read_label(text: bytes) -> tuple[bytes, Ancillary]:
    """Parse a label of an `Inbox`; return the sender's struct sockaddr and the ancillary data."""
    found: Ancillary = []
    at = _NAME_BYTES
    while at + _CMSGHDR.size <= len(text):
        size, level, kind = _CMSGHDR.unpack_from(text, at)
        if size < _CMSGHDR.size:
            break
        found.append((level, kind, text[at + _CMSGHDR.size : at + size]))
        at += socket.CMSG_SPACE(size - _CMSGHDR.size)
    return text[: _SOCKADDR_BYTES[int.from_bytes(text[:2], sys.byteorder)]], found


def write_label(sockaddr: bytes, ancillary: Ancillary) -> Label:
    """Return the label for an `Outbox` that sends to `sockaddr` (a struct sockaddr) with `ancillary`."""
    control = b"".join(
        (_CMSGHDR.pack(socket.CMSG_LEN(len(data)), level, kind) + data).ljust(socket.CMSG_SPACE(len(data)), b"\0")
        for level, kind, data in ancillary
    )
    text = sockaddr.ljust(_NAME_BYTES, b"\0") + control.ljust(_CONTROL_BYTES, b"\0")
    return Label(text, len(sockaddr), len(control))


def address_of(sockaddr: bytes) -> str:
    """Return the address in a struct sockaddr_in or sockaddr_in6, without a zone."""
    family = int.from_bytes(sockaddr[:2], sys.byteorder)
    return socket.inet_ntop(family, sockaddr[8:24] if family == socket.AF_INET6 else sockaddr[4:8])


def request_address(sock: socket.socket) -> None:
    """Have the kernel report each datagram's destination address."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def request_port(sock: socket.socket) -> None:
    """Have the kernel report each datagram's destination port."""
    sock.setsockopt(*(_ORIGDSTADDR6 if sock.family == socket.AF_INET6 else _ORIGDSTADDR4), 1)


def destination_port(ancillary: Ancillary) -> int:
    """Return the destination port, or 0 if it was not requested.  (sockaddr_in and sockaddr_in6 begin alike.)"""
    return int.from_bytes(_find(ancillary, _ORIGDSTADDR4, _ORIGDSTADDR6)[2:4])


def destination4(ancillary: Ancillary) -> bytes:
    """Return the destination address of a datagram of an IPv4 socket (ipi_spec_dst): 4 bytes."""
    return _find(ancillary, _PKTINFO4)[4:8]


def destination6(ancillary: Ancillary) -> bytes:
    """Return the destination address of a datagram of an IPv6 socket.

    16 bytes and, for a link-local address, the interface's index (4 bytes); 4 bytes from an IPv4 client.
    """
    info = _find(ancillary, _PKTINFO6)
    return destination4(ancillary) or (info if int.from_bytes(info[:2]) >> 6 == _LINK_LOCAL else info[:16])


def reply_ancillary(destination: bytes) -> Ancillary:
    """Return the ancillary data that sends an answer from the address that a datagram was sent to."""
    if len(destination) == 4:
        return [(*_PKTINFO4, struct.pack("=i4s4s", 0, destination, b"\0\0\0\0"))]
    if not destination or destination[0] == _MULTICAST:
        return []
    return [(*_PKTINFO6, destination.ljust(20, b"\0"))]


def _find(ancillary: Ancillary, *kinds: tuple[int, int]) -> bytes:
    return next((data for level, kind, data in ancillary if (level, kind) in kinds), b"")


class _Buffers:
    """`BATCH` datagrams with their labels and headers, in memory that the kernel reads and writes."""

    def __init__(self) -> None:
        self._headers = (_Header * BATCH)()
        self._parts = (_Part * BATCH)()
        self._labels = bytearray(BATCH * _LABEL_BYTES)
        datagrams = mmap.mmap(-1, BATCH * _DATAGRAM_BYTES)
        label, datagram = _address(self._labels), _address(datagrams)
        for number, (header, part) in enumerate(zip(self._headers, self._parts, strict=True)):
            part.base, part.bytes = datagram + number * _DATAGRAM_BYTES, _DATAGRAM_BYTES
            header.parts, header.part_count = ctypes.addressof(part), 1
            header.name, header.name_bytes = label + number * _LABEL_BYTES, _NAME_BYTES
            header.control, header.control_bytes = header.name + _NAME_BYTES, _CONTROL_BYTES
        self._first = ctypes.addressof(self._headers)
        whole = memoryview(datagrams)
        self.datagrams = [whole[at : at + _DATAGRAM_BYTES] for at in range(0, len(whole), _DATAGRAM_BYTES)]


class Inbox(_Buffers):
    """Received datagrams."""

    def __init__(self) -> None:
        super().__init__()
        self._lengths = _fields(self._headers, "length")
        self._bytes = memoryview(self._headers).cast("B")
        self._blank = bytes(self._bytes)

    def receive(self, fd: int) -> Iterator[tuple[bytes, memoryview]]:
        """Yield the label and the data of each datagram that waits at the socket `fd`, `BATCH` at most.

        The data is valid until the next call.  Never waits.
        """
        labels, lengths = self._labels, self._lengths
        count = _recvmmsg(fd, self._first, BATCH, socket.MSG_DONTWAIT, None)
        for number in range(count):
            at = number * _LABEL_BYTES
            yield bytes(labels[at : at + _LABEL_BYTES]), self.datagrams[number][: lengths[number]]
        if count > 0:
            self._bytes[:] = self._blank
            labels[:] = bytes(len(labels))


class Outbox(_Buffers):
    """Datagrams to be sent from one socket."""

    def __init__(self) -> None:
        super().__init__()
        self._name_bytes = _fields(self._headers, "name_bytes")
        self._control_bytes = _fields(self._headers, "control_bytes")
        self._part_bytes = _fields(self._parts, "bytes")
        self.count = 0

    def room(self) -> memoryview:
        """Return the buffer to write the next datagram to, before `add`."""
        return self.datagrams[self.count]

    def add(self, size: int, label: Label) -> None:
        """Add the first `size` bytes of `room` as a datagram with this label.  After `BATCH` of them call `send`."""
        number, self.count = self.count, self.count + 1
        at = number * _LABEL_BYTES
        self._labels[at : at + _LABEL_BYTES] = label.text
        self._name_bytes[number] = label.name_bytes
        self._control_bytes[number] = label.control_bytes
        self._part_bytes[number] = size

    def send(self, fd: int, on_error: Callable[[OSError], None]) -> None:
        """Send all datagrams from the socket `fd`, in order; call `on_error` for each that fails.  Never waits."""
        done, count, self.count = 0, self.count, 0
        while done < count:
            header = self._first + done * ctypes.sizeof(_Header)
            sent = _sendmmsg(fd, header, count - done, socket.MSG_DONTWAIT)
            if sent < 0:
                error = ctypes.get_errno()
                on_error(OSError(error, os.strerror(error)))
            done += max(sent, 1)


def _address(memory: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _fields(array: "ctypes.Array[_Header] | ctypes.Array[_Part]", name: str) -> memoryview:
    """Return one field of all structures of an array, as a writable sequence."""
    structure = array._type_
    field = getattr(structure, name)
    whole = memoryview(array).cast("B")
    words = whole.cast("I") if field.size == 4 else whole.cast("Q")
    return words[field.offset // field.size :: ctypes.sizeof(structure) // field.size]


_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
