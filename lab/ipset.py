"""Sets of ipset(8), created by netlink(7): the tool is not needed (include/uapi/linux/netfilter/ipset/ip_set.h)."""

import socket
from collections.abc import Iterable

from gangway.host import netlink
from gangway.host.netlink import pack_attribute, pack_nested

_CREATE, _DESTROY, _ADD = (6 << 8 | command for command in (2, 3, 9))
_VERSION, _NAME, _TYPE, _REVISION, _FAMILY, _DATA = 1, 2, 3, 4, 5, 7
_IP, _PORT, _PROTOCOL = 1, 4, 7
_IPV4, _BIG_ENDIAN = 1, 0x4000  # IPSET_ATTR_IPADDR_IPV4, NLA_F_NET_BYTEORDER
_NUMBERS = {"tcp": 6, "udp": 17}


def entry(address: str, protocol: str = "", port: int = 0) -> bytes:
    """Return an entry with an IPv4 address, and a port if a protocol is given."""
    packed = pack_nested(_IP, pack_attribute(_IPV4 | _BIG_ENDIAN, socket.inet_aton(address)))
    if protocol:
        packed += pack_attribute(_PORT | _BIG_ENDIAN, port.to_bytes(2))
        packed += pack_attribute(_PROTOCOL, bytes([_NUMBERS[protocol]]))
    return packed


def create_set(name: str, kind: str, entries: Iterable[bytes]) -> None:
    """Create a set in the calling thread's network namespace."""
    named = pack_attribute(_NAME, f"{name}\0".encode())
    described = pack_attribute(_TYPE, f"{kind}\0".encode()) + pack_attribute(_REVISION, b"\1")
    family = pack_attribute(_FAMILY, bytes([socket.AF_INET]))
    _request(_CREATE, named + described + family + pack_nested(_DATA))
    for one in entries:
        _request(_ADD, named + pack_nested(_DATA, one))


def destroy_sets() -> None:
    """Destroy all sets of the calling thread's network namespace."""
    _request(_DESTROY, b"")


def _request(kind: int, rest: bytes) -> None:
    body = netlink.NETFILTER_HEADER.pack(socket.AF_INET, 0, 0) + pack_attribute(_VERSION, b"\6") + rest
    with netlink.connect(netlink.NETFILTER) as sock:
        sock.send(netlink.pack_message(kind, netlink.REQUEST | netlink.ACK, body))
        netlink.answer(sock)
