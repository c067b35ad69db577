"""Deletes connection tracking entries that lead where a port no longer leads, by ctnetlink.

Rules of type nat see only a connection's first packet; the entry that it creates decides for the rest.  A UDP entry
lives as long as datagrams arrive, so a client that keeps sending would never reach a new rule.

There may be hundreds of thousands of entries.  Facts that this file leans on (net/netfilter/nf_conntrack_netlink.c):

* The kernel lists only what a filter matches (CTA_FILTER, Linux 5.8; before, it lists all).  But it compares the ports
  of TCP and UDP only, and of IPv6 addresses it matches all others (ctnetlink_filter_match_tuple).
* Since Linux 6.9 it also deletes by a filter, which takes a fifth of the time that listing and deleting take.  Before,
  the request fails with EINVAL, because it lacks the source address: it never deletes anything else.
* An entry begins with the client's tuple and the container's (ctnetlink_fill_info): always the same attributes in the
  same order, so a few bytes at fixed places are enough.
"""

import errno
import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from gangway.errors import HostRefused, Unsupported
from gangway.host import netlink
from gangway.inet import FAMILIES, PROTOCOLS

# include/uapi/linux/netfilter/nfnetlink_conntrack.h, nfnetlink.h
_GET, _DELETE, _STATISTICS = (1 << 8 | kind for kind in (1, 2, 5))
_TUPLE_ORIG, _TUPLE_IP, _TUPLE_PROTO, _FILTER, _FILTER_ORIG_FLAGS = 1, 1, 2, 25, 1
_IP_V4_DST, _IP_V6_DST, _PROTO_NUMBER = 2, 4, 1
# net/netfilter/nf_internals.h: CTA_FILTER_F_…, the parts of a tuple that are compared
_BY_DST_ADDRESS, _BY_PROTOCOL = 1 << 1, 1 << 3
_ADDRESS_BYTES = {4: 4, 6: 16}
_TUPLE_AT, _SOURCE_IN_TUPLE = netlink.MESSAGE.size + netlink.NETFILTER_HEADER.size, 12
_BATCH = 128  # so few that the errors of a batch fit into the socket's queue
_MANY = 4096  # entries, from which on deleting by a filter is worth another walk through the table


class _End(NamedTuple):
    """One of the ends in the tuple of an entry's first packet."""

    layout: dict[int, struct.Struct]
    """By IP version: an entry's length, the length of the tuple, which begins at _TUPLE_AT, an address and a port."""
    port_attribute: int
    port_flag: int  # CTA_FILTER_F_…


# Attributes: CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT.
_SOURCE_LAYOUT = {4: struct.Struct("=I16xHxx4x4x4s8x4x8x4x2s"), 6: struct.Struct("=I16xHxx4x4x16s20x4x8x4x2s")}
_DESTINATION_LAYOUT = {4: struct.Struct("=I16xHxx4x8x4x4s4x8x8x4x2s"), 6: struct.Struct("=I16xHxx4x20x4x16s4x8x8x4x2s")}
_SOURCE, _DESTINATION = _End(_SOURCE_LAYOUT, 2, 1 << 4), _End(_DESTINATION_LAYOUT, 3, 1 << 5)
_Key = tuple[bytes, bytes]
"""An address and a port that clients connect to, in network byte order."""


class Destination(NamedTuple):
    """The addresses and ports that clients connect to, any of each, and the container that they should be led to.

    Entries that lead to the container are kept; without one none are.  With one, entries that an answer from there has
    created are deleted, too: if it was sent after the client's own entry had been deleted, it leads the client back.
    """

    addresses: Collection[str]
    ports: range
    container: str = ""


def unavailable() -> str:
    """Return why entries cannot be deleted; empty if they can."""
    try:
        with netlink.connect(netlink.NETFILTER) as sock:
            sock.send(
                netlink.pack_message(_STATISTICS, netlink.REQUEST | netlink.ACK, netlink.NETFILTER_HEADER.pack(0, 0, 0))
            )
            code = next(iter([*netlink.errors(sock)]), 0)
    except OSError as error:
        code = error.errno or errno.EIO
    if code in (errno.EINVAL, errno.EPROTONOSUPPORT):
        return "this kernel has no access to tracked connections (CONFIG_NF_CT_NETLINK)"
    return os.strerror(code) if code else ""


def delete(
    protocol: str,
    family: int,
    destinations: Sequence[Destination],
    clients: Collection[IPv4Network | IPv6Network] = (),
) -> bool:
    """Delete the entries of clients that connected to one of `destinations`; `family` is 4 or 6.

    With `clients`, subnets of that family, those of clients there only.  Return whether there were any.
    Unsupported: this kernel cannot.  HostRefused: it failed, and some entries may be left.
    """
    try:
        with netlink.connect(netlink.NETFILTER) as sock:
            sock.setsockopt(netlink.SOL_NETLINK, netlink.CAP_ACK, 1)
            return _Entries(sock, protocol, family, destinations, clients).delete()
    except OSError as error:
        if reason := unavailable():
            raise Unsupported(f"tracked connections cannot be deleted: {reason}") from None
        ports = ", ".join(f"{one.ports[0]}-{one.ports[-1]}" for one in destinations)
        what = f"tracked connections of {protocol} ports {ports} (IPv{family})"
        raise HostRefused(f"cannot delete {what}: {error.strerror}: try again") from None


class _Entries(dict[_Key, bytes | None]):
    """The entries of one protocol and family that lead to one of `destinations`; `sock` is for deleting them.

    As a dictionary it says of an address and port which container's entries are kept: b"" is none of them, None means
    that it is not among the destinations.
    """

    def __init__(
        self,
        sock: socket.socket,
        protocol: str,
        family: int,
        destinations: Sequence[Destination],
        clients: Collection[IPv4Network | IPv6Network],
    ) -> None:
        self._clients = [(int(one.netmask), int(one.network_address)) for one in clients]
        self._sock, self._protocol, self._destinations = sock, PROTOCOLS[protocol], destinations
        self._family, self._version = FAMILIES[family], family
        self._can_filter = protocol != "sctp" and not clients and not any(one.container for one in destinations)

    def __missing__(self, key: _Key) -> bytes | None:
        address, port = socket.inet_ntop(self._family, key[0]), int.from_bytes(key[1], "big")
        found = (one for one in self._destinations if port in one.ports and address in one.addresses)
        to = next(found, None)
        self[key] = None if to is None else self._packed(to.container)
        return self[key]

    def delete(self) -> bool:
        """Delete the entries; return whether there were any.

        If many are of one address and port, the kernel is asked to find them, if it can.
        """
        found, is_any = Counter[_Key](), False
        while self._can_filter:
            found = self._delete_listed(_DESTINATION, _MANY)
            is_any = is_any or bool(found)
            if found.total() < _MANY:
                return is_any
            many = [key for key, number in found.items() if number > _MANY // 4]
            self._can_filter = bool(many) and all(map(self._delete_filtered, many))
        is_any = bool(self._delete_listed(_DESTINATION)) or is_any
        if any(one.container for one in self._destinations):
            is_any = bool(self._delete_listed(_SOURCE)) or is_any
        return is_any

    def _packed(self, container: str) -> bytes:
        is_same_family = (":" in container) is (self._version == 6)
        return socket.inet_pton(self._family, container) if container and is_same_family else b""

    def _delete_listed(self, end: _End, most: int | None = None) -> Counter[_Key]:
        """List entries that have a destination at an end, and delete them, until `most` are found.

        Return how many were found, by address and port.
        """
        unpack, address_bytes = end.layout[self._version].unpack_from, _ADDRESS_BYTES[self._version]
        found, batch = Counter[_Key](), list[bytes]()
        with netlink.connect(netlink.NETFILTER) as listing:
            for data in netlink.dump(listing, self._request(end)):
                at = 0
                while at < len(data):  # there may be a quarter of a million
                    length, size, address, port = unpack(data, at)
                    original, at = at + _TUPLE_AT, at + length
                    kept = self[address, port]
                    source = original + size + _SOURCE_IN_TUPLE
                    if kept is None or (kept and data[source : source + address_bytes] == kept):
                        continue
                    client = original + _SOURCE_IN_TUPLE
                    if not self._clients or self._is_client(data[client : client + address_bytes]):
                        found[address, port] += 1
                        batch.append(data[original : original + size])
                self._delete_batch(batch)
                if most is not None and found.total() >= most:
                    break
                batch.clear()
        return found

    def _is_client(self, address: bytes) -> bool:
        number = int.from_bytes(address, "big")
        return any(number & mask == subnet for mask, subnet in self._clients)

    def _delete_batch(self, tuples: Sequence[bytes]) -> None:
        """Delete the entries with these tuples, many with one call; some may have ended meanwhile."""
        for first in range(0, len(tuples), _BATCH):
            *before, last = (self._body(one) for one in tuples[first : first + _BATCH])
            batch = [netlink.pack_message(_DELETE, netlink.REQUEST, body) for body in before]
            self._sock.send(b"".join([*batch, netlink.pack_message(_DELETE, netlink.REQUEST | netlink.ACK, last)]))
            for code in netlink.errors(self._sock):
                if code != errno.ENOENT:
                    raise OSError(code, os.strerror(code))

    def _delete_filtered(self, key: _Key) -> bool:
        """Have the kernel delete all entries of an address and port; False if it cannot."""
        address: bytes | None = key[0]
        if self._version == 6 and (other := self._first_filtered(key)) != address:
            if other is not None:
                return False
            address = None  # the port is used at no other address
        body = self._body(*_filter(self._protocol, _DESTINATION, key[1], address))
        self._sock.send(netlink.pack_message(_DELETE, netlink.REQUEST | netlink.ACK, body))
        return not [*netlink.errors(self._sock)]

    def _first_filtered(self, key: _Key) -> bytes | None:
        """Return the address of the first entry that the kernel lists by a filter; None if it lists none."""
        body = self._body(*_filter(self._protocol, _DESTINATION, key[1], key[0]))
        with netlink.connect(netlink.NETFILTER) as listing:
            for data in netlink.dump(listing, netlink.pack_message(_GET, netlink.REQUEST | netlink.DUMP, body)):
                return bytes(_DESTINATION.layout[self._version].unpack_from(data)[2])
        return None

    def _request(self, end: _End) -> bytes:
        """Return the request for a list of the entries, with a filter by what the destinations have in common."""
        ports = {port for one in self._destinations for port in (one.ports[0], one.ports[-1])}
        port = next(iter(ports)).to_bytes(2, "big") if len(ports) == 1 else None
        body = self._body(*_filter(self._protocol, end, port))
        return netlink.pack_message(_GET, netlink.REQUEST | netlink.DUMP, body)

    def _body(self, *attributes: bytes) -> bytes:
        return netlink.NETFILTER_HEADER.pack(self._family, 0, 0) + b"".join(attributes)


def _filter(
    protocol: int, end: _End, port: bytes | None = None, destination: bytes | None = None
) -> tuple[bytes, bytes]:
    """Return the attributes of a filter: by the port at an end, and by the destination's address, if given."""
    proto, flags = [netlink.pack_attribute(_PROTO_NUMBER, bytes([protocol]))], _BY_PROTOCOL
    parts = []
    if destination is not None:
        kind = _IP_V4_DST if len(destination) == 4 else _IP_V6_DST
        parts.append(netlink.pack_nested(_TUPLE_IP, netlink.pack_attribute(kind, destination)))
        flags |= _BY_DST_ADDRESS
    if port is not None:
        proto.append(netlink.pack_attribute(end.port_attribute, port))
        flags |= end.port_flag
    parts.append(netlink.pack_nested(_TUPLE_PROTO, *proto))
    packed_flags = netlink.pack_attribute(_FILTER_ORIG_FLAGS, flags.to_bytes(4, sys.byteorder))
    return netlink.pack_nested(_TUPLE_ORIG, *parts), netlink.pack_nested(_FILTER, packed_flags)
