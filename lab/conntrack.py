"""The kernel's connection tracking table: it shows whether a connection was translated (DNAT).

Entries can also be made, so that a test needs no clients: those of TCP wait for the end of their time.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count as numbers
from pathlib import Path
from typing import NamedTuple

from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from gangway.host import netlink
from lab.netns import Namespace

_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}


def was_translated(host: Namespace, protocol: str, client: tuple[str, int], address: str, port: int) -> bool:
    """True if the tracked flow of a client to an address and port of `host` was sent on to another address.

    Deletes the entry, except that of SCTP, whose association may not have ended.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    body = struct.pack("!BBH", family, 0, 0) + _tuple(_TUPLE_ORIG, protocol, family, client, (address, port))
    with host.entered(), netlink.connect(netlink.NETFILTER) as sock, suppress(FileNotFoundError):
        sock.send(netlink.pack_message(_GET, netlink.REQUEST | netlink.ACK, body))
        (entry,), _ = netlink.answer(sock)
        if protocol != "sctp":
            sock.send(netlink.pack_message(_DELETE, netlink.REQUEST | netlink.ACK, body))
            netlink.answer(sock)
        reply = netlink.attributes(bytes(entry), netlink.NETFILTER_HEADER.size)[_TUPLE_REPLY]
        addresses = netlink.attributes(netlink.attributes(reply)[_TUPLE_IP])
        return addresses[_SOURCE[family]] != socket.inet_pton(family, address)
    return False


class Masqueraded(NamedTuple):
    """A client's connection to an address and port, and the address and port that it is seen from there."""

    protocol: str
    client: tuple[str, int]
    to: tuple[str, int]
    seen_from: tuple[str, int]


class Flow(NamedTuple):
    """A client's connection to an address and port, and where it leads."""

    protocol: str
    address: str
    port: int
    to: str
    client: tuple[str, int] | None = None  # any


_clients = numbers()
_NEW, _GET, _DELETE = 1 << 8, 1 << 8 | 1, 1 << 8 | 2  # IPCTNL_MSG_CT_…
_CREATE = netlink.REQUEST | 0x600  # NLM_F_CREATE, NLM_F_EXCL
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_NAT_SOURCE, _NAT_ADDRESSES = 6, {socket.AF_INET: (1, 2), socket.AF_INET6: (4, 5)}  # CTA_NAT_V4_MINIP, _MAXIP, …
# CTA_IP_V4_SRC, CTA_IP_V6_SRC; the destination is the next one.
_SOURCE: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}
_IS_ESTABLISHED = 1 << 1 | 1 << 2 | 1 << 3  # IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED
_TIME_WAIT = netlink.pack_attribute(1, b"\7")  # CTA_PROTOINFO_TCP_STATE


def track(*flows: Flow) -> None:
    """Make entries in this thread's network namespace, each with another client."""
    _make([_entry(flow, next(_clients)) for flow in flows])


def track_masqueraded(*flows: Masqueraded) -> None:
    """Make entries of masqueraded connections in this thread's network namespace."""
    _make([_masqueraded(flow) for flow in flows])


def _make(entries: Sequence[bytes]) -> None:
    messages = [netlink.pack_message(_NEW, _CREATE, entry) for entry in entries]
    with netlink.connect(netlink.NETFILTER) as sock:
        for first in range(0, len(messages), 100):
            *before, last = messages[first : first + 100]
            acknowledged = netlink.pack_message(_NEW, _CREATE | netlink.ACK, last[netlink.MESSAGE.size :])
            sock.send(b"".join([*before, acknowledged]))
            assert not [*netlink.errors(sock)]


def tracked() -> set[Flow]:
    """Return the flows of this thread's network namespace."""
    return {flow for family, kind in ((2, "V4"), (10, "V6")) for flow in _flows(family, kind)}


def flush() -> None:
    """Delete all entries of this thread's network namespace."""
    with netlink.connect(netlink.NETFILTER) as sock:
        sock.send(netlink.pack_message(_DELETE, netlink.REQUEST | netlink.ACK, bytes(4)))
        assert not [*netlink.errors(sock)]


def count() -> int:
    """Return the number of entries in this thread's network namespace."""
    return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text())


def _flows(family: int, kind: str) -> Iterator[Flow]:
    names = {number: name for name, number in _NUMBERS.items()}
    with NFCTSocket(nfgen_family=family) as conntrack:
        for message in list(conntrack.dump()):
            original, reply = message.get_attr("CTA_TUPLE_ORIG"), message.get_attr("CTA_TUPLE_REPLY")
            ports, addresses = original.get_attr("CTA_TUPLE_PROTO"), original.get_attr("CTA_TUPLE_IP")
            source = reply.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_{kind}_SRC")
            name = names.get(ports.get_attr("CTA_PROTO_NUM"))
            if name is not None:
                yield Flow(name, addresses.get_attr(f"CTA_IP_{kind}_DST"), ports.get_attr("CTA_PROTO_DST_PORT"), source)


def _masqueraded(flow: Masqueraded) -> bytes:
    address, port = flow.seen_from
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    addresses, ports = _NAT_ADDRESSES[family], (1, 2)  # CTA_PROTONAT_PORT_MIN, _MAX
    packed = b"".join(netlink.pack_attribute(kind, socket.inet_pton(family, address)) for kind in addresses)
    packed += netlink.pack_nested(3, *(netlink.pack_attribute(kind, struct.pack("!H", port)) for kind in ports))
    tuples = [(_TUPLE_ORIG, flow.client, flow.to), (_TUPLE_REPLY, flow.to, flow.client)]
    parts = [_tuple(kind, flow.protocol, family, source, to) for kind, source, to in tuples]
    return _packed(family, flow.protocol, *parts, netlink.pack_nested(_NAT_SOURCE, packed))


def _entry(flow: Flow, number: int) -> bytes:
    family = socket.AF_INET6 if ":" in flow.address else socket.AF_INET
    host = f"fd88::{number // 60000:x}" if ":" in flow.address else f"10.88.0.{number // 60000}"
    client = flow.client or (host, number % 60000)
    original = _tuple(_TUPLE_ORIG, flow.protocol, family, client, (flow.address, flow.port))
    return _packed(family, flow.protocol, original, _tuple(_TUPLE_REPLY, flow.protocol, family, (flow.to, 80), client))


def _packed(family: int, protocol: str, *parts: bytes) -> bytes:
    status = netlink.pack_attribute(_STATUS, struct.pack("!I", _IS_ESTABLISHED))
    timeout = netlink.pack_attribute(_TIMEOUT, struct.pack("!I", 300))
    state = netlink.pack_nested(_PROTOINFO, netlink.pack_nested(1, _TIME_WAIT)) if protocol == "tcp" else b""
    return struct.pack("!BBH", family, 0, 0) + b"".join((*parts, status, timeout, state))


def _tuple(kind: int, protocol: str, family: int, source: tuple[str, int], to: tuple[str, int]) -> bytes:
    addresses = [
        netlink.pack_attribute(_SOURCE[family] + number, socket.inet_pton(family, host))
        for number, (host, _) in enumerate((source, to))
    ]
    ports = [
        netlink.pack_attribute(2 + number, struct.pack("!H", port)) for number, (_, port) in enumerate((source, to))
    ]
    proto = netlink.pack_attribute(1, bytes([_NUMBERS[protocol]]))
    return netlink.pack_nested(
        kind, netlink.pack_nested(_TUPLE_IP, *addresses), netlink.pack_nested(_TUPLE_PROTO, proto, *ports)
    )
