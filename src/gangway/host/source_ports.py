"""Counts the source ports of translated connections, by ctnetlink: one address has so many towards one destination.

Facts that it leans on:

* A connection whose source is translated (masquerade, SNAT) gets a port that no other one has with the same source
  address and destination: its own, if that is free, else one of 1024 to 65535.  If some hundred attempts have found
  none, its packets are dropped (net/netfilter/nf_nat_core.c, nf_nat_l4proto_unique_tuple).  Ports below 1024 are given
  to clients with such a port only.
* An entry in TIME_WAIT has its port, too: for net.netfilter.nf_conntrack_tcp_timeout_time_wait seconds.
* The kernel lists only what has some status bits (CTA_STATUS; kernels that do not know it list all).
* An entry begins with the tuples of both directions (ctnetlink_fill_info), at fixed places if it has ports.
"""

import socket
import struct
import time
from collections import Counter
from contextlib import suppress

from gangway.host import netlink
from gangway.inet import FAMILIES, PROTOCOLS, format_host

PORTS = range(1024, 65536)
"""What the kernel selects from."""

_GET, _STATUS, _STATUS_MASK = 1 << 8 | 1, 3, 26  # IPCTNL_MSG_CT_GET; CTA_STATUS…
_TRANSLATED = (1 << 4).to_bytes(4)  # IPS_SRC_NAT
# The length of an entry and of its first tuple, the client's address; of the tuple of answers: the server's address,
# the address that they are sent to, the protocol and the server's port
_LAYOUT = {
    version: struct.Struct(f"=I16xH6x4x{size}s4x{size}x28x8x4x{size}s4x{size}s8xB7x2s")
    for version, size in {4: 4, 6: 16}.items()
}
_TUPLE_BYTES = {4: 52, 6: 76}  # with ports
_NAMES = {number: name for name, number in PROTOCOLS.items()}
_AGE_S = 60.0
_Pair = tuple[int, bytes, bytes, bytes]
"""A protocol, the destination's address and port, and the source's address."""


class RecentCount:
    """The last result of `busiest`, at most a minute old: to look at 64,000 connections takes 0.4 s."""

    def __init__(self) -> None:
        self._counted_at, self._found = -_AGE_S, (0, "")

    def busiest(self) -> tuple[int, str]:
        if (now := time.monotonic()) - self._counted_at >= _AGE_S:
            self._counted_at, self._found = now, busiest()
        return self._found


def busiest() -> tuple[int, str]:
    """Return how many tracked connections the busiest translated address and destination have, and both in words."""
    counts: Counter[_Pair] = Counter()
    for version in FAMILIES:
        with suppress(OSError):  # no access to tracked connections
            _count(version, counts)
    for (protocol, server, port, source), count in counts.most_common(1):
        family = FAMILIES[4 if len(server) == 4 else 6]
        to, by = (socket.inet_ntop(family, one) for one in (server, source))
        return count, f"from {by} to {_NAMES[protocol]} {format_host(to)}:{int.from_bytes(port)}"
    return 0, "to one destination"


def _count(version: int, counts: Counter[_Pair]) -> None:
    unpack, tuple_bytes = _LAYOUT[version].unpack_from, _TUPLE_BYTES[version]
    body = netlink.NETFILTER_HEADER.pack(FAMILIES[version], 0, 0)
    body += netlink.pack_attribute(_STATUS, _TRANSLATED) + netlink.pack_attribute(_STATUS_MASK, _TRANSLATED)
    with netlink.connect(netlink.NETFILTER) as sock:
        for data in netlink.dump(sock, netlink.pack_message(_GET, netlink.REQUEST | netlink.DUMP, body)):
            at = 0
            while at < len(data):  # there may be a quarter of a million
                length, size, client, server, source, protocol, port = unpack(data, at)
                at += length
                if size == tuple_bytes and client != source and protocol in _NAMES:
                    counts[protocol, server, port, source] += 1
