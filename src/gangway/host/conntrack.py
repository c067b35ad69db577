"""Deletes connection tracking entries that lead where a port no longer leads, by ctnetlink (pyroute2).

Rules of type nat see only a connection's first packet; the entry that it creates decides for the rest.  A UDP entry
lives as long as datagrams arrive, so a client that keeps sending would never reach a new rule.
"""

import errno
import socket
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from gangway.inet import PROTOCOLS

SUPPORTED = ("tcp", "udp")
"""The protocols whose ports pyroute2 can read from an entry."""


class Destination(NamedTuple):
    """The addresses and ports that clients connect to: any of each."""

    addresses: Collection[str]
    ports: range


def delete(protocol: str, family: int, destinations: Sequence[Destination]) -> int:
    """Delete the entries of clients that connected to one of `destinations`; return their number.

    `protocol` is one of SUPPORTED, `family` is 4 or 6.  Where the kernel cannot list entries, the number is 0.
    """
    number = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
    one_port = len(destinations) == 1 and len(destinations[0].ports) == 1
    port = {"dport": destinations[0].ports[0]} if one_port else {}
    filtered = NFCTAttrTuple(family=number, proto=PROTOCOLS[protocol], **port)
    try:
        with NFCTSocket(nfgen_family=number) as conntrack:
            # A kernel before 5.8 ignores the filter.
            entries = [_original(number, message) for message in conntrack.dump(tuple_orig=filtered)]
            stale = [one for one in entries if one.proto == PROTOCOLS[protocol] and _is_one(one, destinations)]
            return sum(_delete(conntrack, entry) for entry in stale)
    except (NetlinkError, OSError):
        return 0


def _is_one(entry: NFCTAttrTuple, destinations: Sequence[Destination]) -> bool:
    return any(entry.dport in one.ports and entry.daddr in one.addresses for one in destinations)


def _original(family: int, message: Any) -> NFCTAttrTuple:
    """Return the addresses and ports of an entry in the client's direction, before translation."""
    return NFCTAttrTuple.from_netlink(family, message.get_attr("CTA_TUPLE_ORIG"))


def _delete(conntrack: NFCTSocket, entry: NFCTAttrTuple) -> bool:
    try:
        conntrack.entry("del", tuple_orig=entry)
    except NetlinkError as error:
        if error.code != errno.ENOENT:  # it has ended meanwhile
            raise
        return False
    return True
