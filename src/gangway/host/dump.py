"""What rtnetlink lists: links, addresses, routes.

What this file knows: the messages of a dump (rtnetlink(7)), and the few attributes that somebody here asks for.  What
it must not know: what they are for; how anything is changed.

It is not pyroute2, which reads all of what comes: of a link that is over a hundred values, one millisecond.  With a
thousand containers a look at the host would take a second, and one looks often.
"""

import os
import socket
import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

# include/uapi/linux/netlink.h
_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
_NUMBER = struct.Struct("=I")
_CODE = struct.Struct("=i")  # what an error, and the end of a dump, begin with
_ERROR, _DONE = 2, 3
_REQUEST_DUMP = 0x01 | 0x100 | 0x200
_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR: what is listed has changed meanwhile
_TYPE_MASK = 0x3FFF  # NLA_TYPE_MASK
_BUFFER_BYTES = 1 << 16  # af_netlink.c, netlink_recvmsg: a dump comes in pieces of 32 KiB at most
_TRIES = 10
# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
_GET_LINK, _GET_ADDRESS, _GET_ROUTE = 18, 22, 26
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, bits, source's, tos, table, protocol, scope, type, flags
_EXT_MASK, _WITHOUT_STATISTICS = 29, 1 << 3
_IFNAME, _MASTER, _LINKINFO, _IFALIAS = 3, 10, 18, 20
_INFO_KIND, _INFO_SLAVE_DATA, _BRPORT_ISOLATED = 1, 5, 33
_IFA_ADDRESS = 1
_RTA_DST, _RTA_OIF = 1, 4

FAMILIES = (socket.AF_INET, socket.AF_INET6)
"""Those of addresses and routes; where the kernel has not one of them, it may list another's instead."""


class Link(NamedTuple):
    """An interface; `alias` is empty if it has none, `master` 0."""

    number: int
    name: str
    kind: str
    alias: str
    master: int
    isolated: bool


class Route(NamedTuple):
    """A route by one interface; `to` is empty if it is a default route, `out` 0 if it is by none or several."""

    to: str
    bits: int
    out: int
    table: int
    """255 at most: a route of another table has none of these."""
    protocol: int


class Dumps:
    """Lists of the namespace in which this object was made.  OSError: the kernel gives none."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._last = 0

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()

    def links(self, kind: str = "") -> list[Link]:
        """Every link, or those of a kind."""
        asked = _LINK.pack(0, 0, 0, 0, 0) + _attribute(_EXT_MASK, _NUMBER.pack(_WITHOUT_STATISTICS))
        if kind:
            asked += _attribute(_LINKINFO, _attribute(_INFO_KIND, kind.encode() + b"\0"))
        found = map(link_of, self._dump(_GET_LINK, asked))
        # A kernel that has no such kind lists them all.
        return [link for link in found if kind in ("", link.kind)]

    def addresses(self) -> frozenset[str]:
        """All addresses."""
        return frozenset(
            address_of(body)
            for family in FAMILIES
            for body in self._dump(_GET_ADDRESS, _ADDRESS.pack(family, 0, 0, 0, 0))
            if body[0] == family
        )

    def routes(self, family: int) -> list[Route]:
        """The routes of one of the FAMILIES."""
        asked = _ROUTE.pack(family, *(0,) * 8)
        return [route_of(body) for body in self._dump(_GET_ROUTE, asked) if body[0] == family]

    def _dump(self, kind: int, asked: bytes) -> list[memoryview]:
        """The messages of a dump, each without its header.  One that was interrupted may lack something, or have it
        twice: it is asked for anew; where all the time something changes, the last will do."""
        found: list[memoryview] = []
        whole, tries = False, _TRIES
        while not whole and tries:
            self._last, tries = self._last + 1, tries - 1
            length = _MESSAGE.size + len(asked)
            self._socket.send(_MESSAGE.pack(length, kind, _REQUEST_DUMP, self._last, 0) + asked)
            found, whole = self._received()
        return found

    def _received(self) -> tuple[list[memoryview], bool]:
        """The messages that come, and whether nothing has interrupted them."""
        found: list[memoryview] = []
        whole = True
        while True:
            for kind, flags, number, body in messages(self._socket.recv(_BUFFER_BYTES)):
                if number != self._last:
                    continue  # of an earlier dump, that failed half-way
                whole = whole and not flags & _INTERRUPTED
                if kind in (_ERROR, _DONE):
                    code = -_CODE.unpack_from(body)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return found, whole
                found.append(body)


def messages(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """The messages in what was received: of each its type, flags, number, and what is after its header."""
    start, view = 0, memoryview(data)
    while start < len(data):
        length, kind, flags, number, _ = _MESSAGE.unpack_from(data, start)
        yield kind, flags, number, view[start + _MESSAGE.size : start + length]
        start += _aligned(length)


def attributes(data: memoryview, start: int, wanted: Collection[int]) -> dict[int, memoryview]:
    """The values of some attributes, of those that are there."""
    found, end, unpack = {}, len(data), _ATTRIBUTE.unpack_from
    while start < end:
        length, kind = unpack(data, start)
        kind &= _TYPE_MASK
        if kind in wanted:
            found[kind] = data[start + 4 : start + length]
            if len(found) == len(wanted):
                break
        start += _aligned(length)
    return found


def link_of(body: memoryview) -> Link:
    """A link as RTM_NEWLINK tells it."""
    found = attributes(body, _LINK.size, (_IFNAME, _MASTER, _LINKINFO, _IFALIAS))
    info = attributes(found.get(_LINKINFO, _NOTHING), 0, (_INFO_KIND, _INFO_SLAVE_DATA))
    port = attributes(info.get(_INFO_SLAVE_DATA, _NOTHING), 0, (_BRPORT_ISOLATED,))
    return Link(
        number=_LINK.unpack_from(body)[2],
        name=_text(found[_IFNAME]),
        kind=_text(info.get(_INFO_KIND, _NOTHING)),
        alias=_text(found.get(_IFALIAS, _NOTHING)),
        master=_number(found.get(_MASTER)),
        isolated=any(port.get(_BRPORT_ISOLATED, _NOTHING)),
    )


def address_of(body: memoryview) -> str:
    """An address as RTM_NEWADDR tells it."""
    return socket.inet_ntop(body[0], attributes(body, _ADDRESS.size, (_IFA_ADDRESS,))[_IFA_ADDRESS])


def route_of(body: memoryview) -> Route:
    """A route as RTM_NEWROUTE tells it."""
    family, bits, _, _, table, protocol, *_ = _ROUTE.unpack_from(body)
    found = attributes(body, _ROUTE.size, (_RTA_DST, _RTA_OIF))
    to = socket.inet_ntop(family, found[_RTA_DST]) if _RTA_DST in found else ""
    return Route(to, bits, _number(found.get(_RTA_OIF)), table, protocol)


_NOTHING = memoryview(b"")


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _text(value: memoryview) -> str:
    return bytes(value).rstrip(b"\0").decode(errors="replace")


def _number(value: memoryview | None) -> int:
    return 0 if value is None else int(_NUMBER.unpack(value)[0])


def _aligned(length: int) -> int:
    return (length + 3) & ~3
