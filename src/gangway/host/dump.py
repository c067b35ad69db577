"""The calling thread's links, addresses, routes and policy rules, read by rtnetlink(7): only what gangway uses of them.

pyroute2 decodes everything: a link has over a hundred values, which takes it one millisecond.  With a thousand
containers one look at the host would take a second, and gangway looks often.
"""

import errno
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from gangway.host import netlink
from gangway.host.netlink import attributes_among, pack_attribute, text_of

_NUMBER = struct.Struct("=I")
# include/uapi/linux/rtnetlink.h, if_link.h, if_addr.h
_GET_LINK, _GET_ADDRESS, _GET_ROUTE = 18, 22, 26
_LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, lengths, tos, table, protocol, scope, type, flags
_NO_STATISTICS = pack_attribute(29, _NUMBER.pack(1 << 3))  # IFLA_EXT_MASK: RTEXT_FILTER_SKIP_STATS
_MAC, _IFNAME, _MTU, _LINK_PEER, _MASTER, _LINKINFO, _IFALIAS, _LINK_NETNSID = 1, 3, 4, 5, 10, 18, 20, 37
_LINK_ATTRIBUTES = (_MAC, _IFNAME, _MTU, _LINK_PEER, _MASTER, _LINKINFO, _IFALIAS, _LINK_NETNSID)
_INFO_KIND, _INFO_SLAVE_DATA, _BRPORT_MODE, _BRPORT_ISOLATED = 1, 5, 4, 33
_IFF_UP = 1  # include/uapi/linux/if.h
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 2, 4, 5, 7
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_TABLE_AT, _LOCAL_TABLE = 4, 255  # in struct rtmsg; RT_TABLE_LOCAL
# include/uapi/linux/fib_rules.h, netconf.h
_GET_RULE, _GET_NETCONF = 34, 82
_RULE = struct.Struct("=8BI")  # struct fib_rule_hdr: family, lengths, tos, table, two unused, action, flags
_FRA_SRC, _FRA_TABLE = 2, 15
_NETCONF = struct.Struct("=Bxxx")  # struct netconfmsg: family
_NETCONFA_IFINDEX, _NETCONFA_FORWARDING = 1, 2
_STRICT_CHECK = 12  # NETLINK_GET_STRICT_CHK: without it, a request for some routes lists all

LOOPBACK_IFINDEX = 1
"""The number of each network namespace's `lo` (net/core/dev.c, LOOPBACK_IFINDEX)."""

_EMPTY = memoryview(b"")

FAMILIES = (socket.AF_INET, socket.AF_INET6)
"""The families of addresses and routes.  A kernel without one of them may list the other's instead."""


class Link(NamedTuple):
    """An interface; without an alias `alias` is empty, without a master `master` is 0.  `mac` is as in ip(8).

    `peer` is the index of a veth's other end; `peer_namespace` the number of its network namespace in this one, None if
    it is in this one, too.
    """

    ifindex: int
    name: str
    kind: str
    alias: str
    master: int
    isolated: bool
    mac: str
    is_up: bool
    mtu: int
    hairpin: bool
    peer: int
    peer_namespace: int | None


class InterfaceAddress(NamedTuple):
    """An address of an interface."""

    ifindex: int
    address: str
    prefix_length: int


class Route(NamedTuple):
    """A route.  A default route's `destination` is empty; without an interface, or with several, `ifindex` is 0.  A
    `table` above 255 shows as another number."""

    destination: str
    prefix_length: int
    ifindex: int
    table: int
    protocol: int


class Rule(NamedTuple):
    """A policy rule (ip-rule(8)) that holds for packets from a subnet only, and the number of the table it looks up."""

    source: str
    table: int


class Way(NamedTuple):
    """What the kernel does with a packet: `is_local`: it is for this host.  `gateway` is empty on the interface's own
    link; `source` is the address that a socket without one would get, empty if the request named one."""

    is_local: bool
    ifindex: int
    gateway: str
    source: str


Question = tuple[str, str]
"""A packet whose way is asked for: its destination, and its source or an empty text."""


class LinkState(NamedTuple):
    """What is read of a link in a container."""

    is_up: bool
    mtu: int


class Inside(NamedTuple):
    """What was found in a network namespace, as far as it was asked."""

    links: Mapping[int, LinkState] = {}  # by number
    addresses: Sequence[InterfaceAddress] = ()
    routes: Mapping[int, Sequence[Route]] = {}  # by family, without those of the table `local`
    ways: Sequence[Way | None] = ()  # in the order of the questions


def inside(ifindex: int, questions: Sequence[Question]) -> Inside:
    """Ask everything by one socket: a namespace of a container has little, but there may be a thousand containers.

    If there is an `ifindex`: all addresses, and the links of this number and of loopback.  Routes also if there is no
    way for a packet.  OSError: the kernel refuses.
    """
    numbers = (LOOPBACK_IFINDEX, ifindex) if ifindex else ()
    requests = [*map(_link_request, numbers), *(_way_request(*question) for question in questions)]
    with netlink.connect(socket.NETLINK_ROUTE) as sock:
        replies = netlink.replies(sock, requests)
        ways = [None if body is None else _way(body) for body in replies[len(numbers) :]]
        own = _listed(sock, _GET_ADDRESS, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)) if ifindex else []
        is_incomplete = ifindex or None in ways
        routed = _listed(sock, _GET_ROUTE, _ROUTE.pack(socket.AF_UNSPEC, *(0,) * 8)) if is_incomplete else []
    routes: dict[int, list[Route]] = {family: [] for family in FAMILIES}
    for body in routed:
        if body[0] in FAMILIES and body[_TABLE_AT] != _LOCAL_TABLE:
            routes[body[0]].append(_route(body))
    found = {number: _link_state(body) for number, body in zip(numbers, replies, strict=False) if body is not None}
    return Inside(found, [_own_address(body) for body in own if body[0] in FAMILIES], routes, ways)


def links(kind: str = "") -> list[Link]:
    """List all links, or those of a kind.  OSError: the kernel refuses."""
    request = _LINK.pack(0, 0, 0, 0, 0) + _NO_STATISTICS
    if kind:
        request += pack_attribute(_LINKINFO, pack_attribute(_INFO_KIND, kind.encode() + b"\0"))
    # A kernel that does not know the kind lists all links.
    return [link for link in map(_link, _dump(_GET_LINK, request)) if kind in ("", link.kind)]


def addresses() -> frozenset[str]:
    """List all addresses.  OSError: the kernel refuses."""
    return frozenset(one.address for one in prefixed_addresses())


def interface_addresses() -> frozenset[tuple[int, str]]:
    """List all addresses, each with the number of its interface.  OSError: the kernel refuses."""
    return frozenset((one.ifindex, one.address) for one in prefixed_addresses())


def prefixed_addresses() -> list[InterfaceAddress]:
    """List all addresses with their interfaces and prefixes.  OSError: the kernel refuses."""
    bodies = (body for family in FAMILIES for body in _dump(_GET_ADDRESS, _ADDRESS.pack(family, 0, 0, 0, 0)))
    return [one for one in map(_own_address, bodies) if one.address]


def routes(family: int, ifindex: int = 0) -> list[Route]:
    """List the routes of one of the FAMILIES, or those by one interface.  OSError: the kernel refuses.

    Of a host's many routes the kernel then lists only the few that are needed, as far as it can (since Linux 4.20).
    """
    request = _ROUTE.pack(family, *(0,) * 8)
    if ifindex:
        request += pack_attribute(_RTA_OIF, _NUMBER.pack(ifindex))
    found = (_route(body) for body in _dump(_GET_ROUTE, request, strict=bool(ifindex)) if body[0] == family)
    return [route for route in found if ifindex in (0, route.ifindex)]


def source_rules(family: int) -> list[Rule]:
    """List the policy rules for packets from some addresses only.  OSError: the kernel refuses."""
    bodies = [body for body in _dump(_GET_RULE, _RULE.pack(family, *(0,) * 8)) if body[0] == family]
    return [_rule(body) for body in bodies if _RULE.unpack_from(body)[2]]


def not_forwarding(family: int) -> frozenset[int]:
    """Return the numbers of the interfaces whose own switch for forwarding is off.  OSError: the kernel refuses."""
    bodies = (body for body in _dump(_GET_NETCONF, _NETCONF.pack(family)) if body[0] == family)
    found = (attributes_among(body, _NETCONF.size, (_NETCONFA_IFINDEX, _NETCONFA_FORWARDING)) for body in bodies)
    return frozenset(_number(one[_NETCONFA_IFINDEX]) for one in found if not any(one[_NETCONFA_FORWARDING]))


def way_to(destination: str, source: str = "") -> Way | None:
    """Return the way of a packet of this host to an address, perhaps from one of its own; None if there is no route."""
    with netlink.connect(socket.NETLINK_ROUTE) as sock:
        (body,) = netlink.replies(sock, [_way_request(destination, source)])
    return None if body is None else _way(body)


def _way_request(destination: str, source: str) -> bytes:
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    ends = [socket.inet_pton(family, text) if text else b"" for text in (destination, source)]
    request = _ROUTE.pack(family, *(8 * len(end) for end in ends), *(0,) * 6)
    request += b"".join(pack_attribute(kind, end) for kind, end in zip((_RTA_DST, _RTA_SRC), ends, strict=True) if end)
    return netlink.pack_message(_GET_ROUTE, netlink.REQUEST, request)


def _link_request(ifindex: int) -> bytes:
    return netlink.pack_message(_GET_LINK, netlink.REQUEST, _LINK.pack(0, 0, ifindex, 0, 0) + _NO_STATISTICS)


def _dump(kind: int, request: bytes, strict: bool = False) -> list[memoryview]:
    """Return the messages of a dump, without their headers; if `strict`, only what the request's attributes say."""
    with netlink.connect(socket.NETLINK_ROUTE) as sock:
        if strict:
            with suppress(OSError):  # before Linux 4.20
                sock.setsockopt(netlink.SOL_NETLINK, _STRICT_CHECK, 1)
        return _listed(sock, kind, request)


def _listed(sock: socket.socket, kind: int, request: bytes) -> list[memoryview]:
    try:
        return netlink.listed(sock, netlink.pack_message(kind, netlink.REQUEST | netlink.DUMP, request))
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:  # a kernel without the family, which has nothing of it
            return []
        raise


def _link(body: memoryview) -> Link:
    _, _, ifindex, flags, _ = _LINK.unpack_from(body)
    found = attributes_among(body, _LINK.size, _LINK_ATTRIBUTES)
    info = attributes_among(found.get(_LINKINFO, _EMPTY), 0, (_INFO_KIND, _INFO_SLAVE_DATA))
    port = attributes_among(info.get(_INFO_SLAVE_DATA, _EMPTY), 0, (_BRPORT_MODE, _BRPORT_ISOLATED))
    return Link(
        ifindex=ifindex,
        name=text_of(found[_IFNAME]),
        kind=text_of(info.get(_INFO_KIND, _EMPTY)),
        alias=text_of(found.get(_IFALIAS, _EMPTY)),
        master=_number(found.get(_MASTER)),
        isolated=any(port.get(_BRPORT_ISOLATED, _EMPTY)),
        mac=found.get(_MAC, _EMPTY).hex(":"),
        is_up=bool(flags & _IFF_UP),
        mtu=_number(found.get(_MTU)),
        hairpin=any(port.get(_BRPORT_MODE, _EMPTY)),
        peer=_number(found.get(_LINK_PEER)),
        peer_namespace=_number(found[_LINK_NETNSID]) if _LINK_NETNSID in found else None,
    )


def _link_state(body: memoryview) -> LinkState:
    flags = _LINK.unpack_from(body)[3]
    return LinkState(bool(flags & _IFF_UP), _number(attributes_among(body, _LINK.size, (_MTU,)).get(_MTU)))


def _own_address(body: memoryview) -> InterfaceAddress:
    """Return the host's own address, which IFA_ADDRESS is not if the link has a peer; empty if there is none."""
    family, prefix_length, _, _, ifindex = _ADDRESS.unpack_from(body)
    found = attributes_among(body, _ADDRESS.size, (_IFA_ADDRESS, _IFA_LOCAL))
    address = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
    return InterfaceAddress(ifindex, "" if address is None else socket.inet_ntop(family, address), prefix_length)


def _route(body: memoryview) -> Route:
    family, prefix_length, _, _, table, protocol, *_ = _ROUTE.unpack_from(body)
    found = attributes_among(body, _ROUTE.size, (_RTA_DST, _RTA_OIF))
    destination = socket.inet_ntop(family, found[_RTA_DST]) if _RTA_DST in found else ""
    return Route(destination, prefix_length, _number(found.get(_RTA_OIF)), table, protocol)


def _rule(body: memoryview) -> Rule:
    family, _, length, _, table, *_ = _RULE.unpack_from(body)
    found = attributes_among(body, _RULE.size, (_FRA_SRC, _FRA_TABLE))
    source = socket.inet_ntop(family, found[_FRA_SRC])
    return Rule(f"{source}/{length}", _number(found[_FRA_TABLE]) if _FRA_TABLE in found else table)


def _way(body: memoryview) -> Way | None:
    family, *_, kind, _ = _ROUTE.unpack_from(body)
    found = attributes_among(body, _ROUTE.size, (_RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC))
    gateway, source = (
        socket.inet_ntop(family, found[one]) if one in found else "" for one in (_RTA_GATEWAY, _RTA_PREFSRC)
    )
    if kind not in (_RTN_UNICAST, _RTN_LOCAL):
        return None
    return Way(kind == _RTN_LOCAL, _number(found.get(_RTA_OIF)), gateway, source)


def _number(value: memoryview | None) -> int:
    return 0 if value is None else int(_NUMBER.unpack(value)[0])
