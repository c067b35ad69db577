"""Datagrams by the batch: recvmmsg(2) and sendmmsg(2), which Python's socket module does not have.

What this file knows: how the kernel lays out a datagram's header, its sender and its ancillary data.  What it must
not know: clients, ports.

How it works.  An `Inbox` and an `Outbox` have room for `BATCH` datagrams each, and serve the whole process.  Where a
datagram comes from and what the kernel says about it is its *label*: the sender's struct sockaddr, and behind it the
ancillary data (cmsg(3)), as the kernel wrote them.  Labels are compared as bytes; only one that was never seen
before has to be taken apart.  Looking for a datagram in vain costs as much as receiving one, so an `Inbox` asks for
`BATCH` at once, and epoll says if there are more.

Facts that it leans on:

* recvmmsg(2) writes msg_namelen, msg_controllen, msg_flags and msg_len, and no other field; what it leaves of a label
  stays as it was, so labels and headers are laid out anew after each batch.
* sendmmsg(2) ends at the first datagram that cannot be sent, and says how many went; the error is told only if that
  was the first one.
* A datagram is not larger than 65,507 bytes of IPv4 and 65,527 of IPv6.  The memory for one is had when a datagram of
  its size comes (an anonymous mapping has no pages before), and kept: 4 MiB at most, if all were of the largest size.
"""

import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

BATCH = 32
_DATAGRAM_BYTES = 65536
_CMSGHDR = struct.Struct("@Nii")
_FAMILY = struct.Struct("@H")
# struct sockaddr_in6 (28 bytes) with padding; in6_pktinfo, and beside it either in_pktinfo (dual-stack sockets) or a
# struct sockaddr_in6 (sockets that serve many ports), each with its header.
_NAME_BYTES = 32
_CONTROL_BYTES = socket.CMSG_SPACE(20) + max(socket.CMSG_SPACE(12), socket.CMSG_SPACE(28))
_LABEL_BYTES = _NAME_BYTES + _CONTROL_BYTES
_SOCKADDR_BYTES: dict[int, int] = {socket.AF_INET: 16, socket.AF_INET6: 28}

Ancillary = list[tuple[int, int, bytes]]


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
    """struct mmsghdr: a struct msghdr, and behind it how long the datagram was that was received or sent."""

    _fields_: ClassVar[Sequence[tuple[str, type]]] = (("length", ctypes.c_uint),)


class Label(NamedTuple):
    """Where a datagram is to go, and from which address."""

    text: bytes
    name_bytes: int
    control_bytes: int


def read_label(text: bytes) -> tuple[bytes, Ancillary]:
    """A label of an `Inbox` taken apart: the sender's struct sockaddr, and the ancillary data."""
    found: Ancillary = []
    at = _NAME_BYTES
    while at + _CMSGHDR.size <= len(text):
        size, level, kind = _CMSGHDR.unpack_from(text, at)
        if size < _CMSGHDR.size:
            break
        found.append((level, kind, text[at + _CMSGHDR.size : at + size]))
        at += socket.CMSG_SPACE(size - _CMSGHDR.size)
    (family,) = _FAMILY.unpack_from(text)
    return text[: _SOCKADDR_BYTES[family]], found


def write_label(sockaddr: bytes, ancillary: Ancillary) -> Label:
    """The label for an `Outbox`: to `sockaddr` (struct sockaddr), with `ancillary`."""
    control = b"".join(
        (_CMSGHDR.pack(socket.CMSG_LEN(len(data)), level, kind) + data).ljust(socket.CMSG_SPACE(len(data)), b"\0")
        for level, kind, data in ancillary
    )
    text = sockaddr.ljust(_NAME_BYTES, b"\0") + control.ljust(_CONTROL_BYTES, b"\0")
    return Label(text, len(sockaddr), len(control))


class _Room:
    """Memory for a batch: headers and, for each, a label and a datagram."""

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


class Inbox(_Room):
    """What a socket has received."""

    def __init__(self) -> None:
        super().__init__()
        self._lengths = _fields(self._headers, "length")
        self._bytes = memoryview(self._headers).cast("B")
        self._blank = bytes(self._bytes)

    def receive(self, fd: int) -> Iterator[tuple[bytes, memoryview]]:
        """The datagrams that wait at the socket `fd`, `BATCH` at most: each one's label, and its bytes until the next
        call.  Never waits."""
        labels, lengths = self._labels, self._lengths
        count = _recvmmsg(fd, self._first, BATCH, socket.MSG_DONTWAIT, None)
        for number in range(count):
            at = number * _LABEL_BYTES
            yield bytes(labels[at : at + _LABEL_BYTES]), self.datagrams[number][: lengths[number]]
        if count > 0:
            self._bytes[:] = self._blank
            labels[:] = bytes(len(labels))


class Outbox(_Room):
    """What is to be sent from one socket; `lost` is told of each datagram that could not be."""

    def __init__(self) -> None:
        super().__init__()
        self._name_bytes = _fields(self._headers, "name_bytes")
        self._control_bytes = _fields(self._headers, "control_bytes")
        self._part_bytes = _fields(self._parts, "bytes")
        self.count = 0

    def room(self) -> memoryview:
        """Where the next datagram is to be written, before `add`."""
        return self.datagrams[self.count]

    def add(self, size: int, label: Label) -> None:
        """The first `size` bytes of `room` are a datagram with this label.  At `BATCH` of them it must be sent."""
        number, self.count = self.count, self.count + 1
        at = number * _LABEL_BYTES
        self._labels[at : at + _LABEL_BYTES] = label.text
        self._name_bytes[number] = label.name_bytes
        self._control_bytes[number] = label.control_bytes
        self._part_bytes[number] = size

    def send(self, fd: int, lost: Callable[[OSError], None]) -> None:
        """Sends all from the socket `fd`, in order; `lost` is told why one could not be.  Never waits."""
        done, count, self.count = 0, self.count, 0
        while done < count:
            header = self._first + done * ctypes.sizeof(_Header)
            sent = _sendmmsg(fd, header, count - done, socket.MSG_DONTWAIT)
            if sent < 0:
                error = ctypes.get_errno()
                lost(OSError(error, os.strerror(error)))
            done += max(sent, 1)


def _address(memory: bytearray | mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _fields(array: "ctypes.Array[_Header] | ctypes.Array[_Part]", name: str) -> memoryview:
    """One field of all of an array's structures, as a sequence that can be written."""
    structure = array._type_
    field = getattr(structure, name)
    whole = memoryview(array).cast("B")
    words = whole.cast("I") if field.size == 4 else whole.cast("Q")
    return words[field.offset // field.size :: ctypes.sizeof(structure) // field.size]


_libc = ctypes.CDLL(None, use_errno=True)
_recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)
