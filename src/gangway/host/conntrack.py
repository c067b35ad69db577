"""Tracked connections: those that lead where a port no longer leads.

What this file knows: conntrack entries, by ctnetlink (pyroute2).  What it must not know: mappings.

The rules of type nat see a connection's first packet only; the entry that it made decides for the rest.  For UDP an
entry lives as long as datagrams come, so a client that goes on sending would never meet a new rule.
"""

import socket
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

_GONE = 2  # ENOENT: it ended meanwhile


PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
"""Those whose ports pyroute2 can read from an entry."""


class Asked(NamedTuple):
    """What clients asked: one of these addresses, one of these ports."""

    addresses: Collection[str]
    ports: range


def delete(protocol: str, family: int, asked: Sequence[Asked]) -> int:
    """Deletes the entries of clients that asked one of these; gives how many.

    `family` is 4 or 6.  A kernel that cannot say gives 0.
    """
    number = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
    single = len(asked) == 1 and len(asked[0].ports) == 1
    wanted = NFCTAttrTuple(family=number, proto=PROTOCOLS[protocol], **({"dport": asked[0].ports[0]} if single else {}))
    try:
        with NFCTSocket(nfgen_family=number) as conntrack:
            found = [_way(number, message) for message in conntrack.dump(tuple_orig=wanted)]
            stale = [way for way in found if way.proto == PROTOCOLS[protocol] and _is_one(way, asked)]
            return sum(_delete(conntrack, way) for way in stale)
    except (NetlinkError, OSError):
        return 0


def _is_one(way: NFCTAttrTuple, asked: Sequence[Asked]) -> bool:
    return any(way.dport in one.ports and way.daddr in one.addresses for one in asked)


def _way(family: int, message: Any) -> NFCTAttrTuple:
    """What the client asked; a kernel before 5.8 has sent more than it was asked for."""
    return NFCTAttrTuple.from_netlink(family, message.get_attr("CTA_TUPLE_ORIG"))


def _delete(conntrack: NFCTSocket, way: NFCTAttrTuple) -> bool:
    try:
        conntrack.entry("del", tuple_orig=way)
    except NetlinkError as error:
        if error.code != _GONE:
            raise
        return False
    return True
