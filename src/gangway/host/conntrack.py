"""Deletes connection tracking entries that lead where a port no longer leads, by ctnetlink (pyroute2).

Rules of type nat see only a connection's first packet; the entry that it creates decides for the rest.  A UDP entry
lives as long as datagrams arrive, so a client that keeps sending would never reach a new rule.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import NamedTuple

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from gangway.inet import FAMILIES, PROTOCOLS

SUPPORTED = ("tcp", "udp")
"""The protocols whose ports pyroute2 can read from an entry."""


class Destination(NamedTuple):
    """The addresses and ports that clients connect to: any of each."""

    addresses: Collection[str]
    ports: range


def delete(protocol: str, family: int, destinations: Sequence[Destination]) -> None:
    """Delete the entries of clients that connected to one of `destinations`, where the kernel can list entries.

    `protocol` is one of SUPPORTED, `family` is 4 or 6.
    """
    number, proto = FAMILIES[family], PROTOCOLS[protocol]
    one_port = len(destinations) == 1 and len(destinations[0].ports) == 1
    port = {"dport": destinations[0].ports[0]} if one_port else {}
    filtered = NFCTAttrTuple(family=number, proto=proto, **port)
    with suppress(NetlinkError, OSError), NFCTSocket(nfgen_family=number) as conntrack:
        # The client's direction, before translation.  A kernel before 5.8 ignores the filter.
        tuples = [message.get_attr("CTA_TUPLE_ORIG") for message in conntrack.dump(tuple_orig=filtered)]
        for entry in [NFCTAttrTuple.from_netlink(number, one) for one in tuples]:
            if entry.proto == proto and any(
                entry.dport in to.ports and entry.daddr in to.addresses for to in destinations
            ):
                with suppress(NetlinkError):  # it may have ended meanwhile
                    conntrack.entry("del", tuple_orig=entry)
