"""Tracked connections: those that lead where a port no longer leads.

What this file knows: conntrack entries, by ctnetlink (pyroute2).  What it must not know: mappings.

The rules of type nat see a connection's first packet only; the entry that it made decides for the rest.  For UDP an
entry lives as long as datagrams come, so a client that goes on sending would never meet a new rule.
"""

import socket
from collections.abc import Collection
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

_GONE = 2  # ENOENT: it ended meanwhile


def delete(protocol: int, family: int, ports: range, addresses: Collection[str]) -> int:
    """Deletes the entries whose client asked one of `ports` at one of `addresses`; gives how many.

    `family` is 4 or 6.  A kernel that cannot say gives 0.
    """
    number = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
    port = {"dport": ports[0]} if len(ports) == 1 else {}
    try:
        with NFCTSocket(nfgen_family=number) as conntrack:
            wanted = NFCTAttrTuple(family=number, proto=protocol, **port)
            found = [_asked(number, message) for message in conntrack.dump(tuple_orig=wanted)]
            stale = [way for way in found if way.proto == protocol and way.dport in ports and way.daddr in addresses]
            return sum(_delete(conntrack, way) for way in stale)
    except (NetlinkError, OSError):
        return 0


def _asked(family: int, message: Any) -> NFCTAttrTuple:
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
