"""Decides which clients a port is for, by their addresses.

Kernel facts: rtnetlink(7) answers RTM_GETROUTE with the route to an address; its type is RTN_LOCAL for an address of
the host.  Binding a socket would not do as a test: with net.ipv4.ip_nonlocal_bind any address can be bound.
"""

import socket
import struct
from collections.abc import Iterable

_BITS: dict[int, int] = {socket.AF_INET: 32, socket.AF_INET6: 128}
_MAPPED = "::ffff:"
_LOOPBACK = ("127.0.0.0/8", "::1/128")
# include/uapi/linux/netlink.h, rtnetlink.h: struct nlmsghdr, rtmsg, rtattr
_HEADER, _ROUTE, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=8BI"), struct.Struct("=HH")
_NEWROUTE, _GETROUTE, _REQUEST, _DESTINATION, _LOCAL = 24, 26, 1, 1, 2
_TYPE = _HEADER.size + 7  # where rtm_type is
_ANSWER_BYTES = 4096


class Admission:
    """Admits the clients of some subnets, written ADDRESS/PREFIX-LENGTH, and the host's own."""

    def __init__(self, subnets: Iterable[str]) -> None:
        self.subnets = (*subnets, *_LOOPBACK)
        self._prefixes: list[tuple[int, int, int]] = []  # the family, how many bits a client may choose, the others
        for subnet in self.subnets:
            address, _, length = subnet.partition("/")
            family = _family(address)
            free = _BITS[family] - int(length)
            self._prefixes.append((family, free, int.from_bytes(socket.inet_pton(family, address)) >> free))

    def admits(self, client: str) -> bool:
        """True if a client with this address, perhaps with a zone, is to be served."""
        plain = client.partition("%")[0]
        if "." in plain:
            plain = plain.removeprefix(_MAPPED)  # of a socket that serves both families
        family = _family(plain)
        packed = socket.inet_pton(family, plain)
        number = int.from_bytes(packed)
        if any(family == one and number >> free == prefix for one, free, prefix in self._prefixes):
            return True
        return _is_the_hosts(family, packed)


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _is_the_hosts(family: int, address: bytes) -> bool:
    """True if an address is one of the host's own; false also if the kernel does not say."""
    route = _ROUTE.pack(family, _BITS[family], 0, 0, 0, 0, 0, 0, 0)
    asked = route + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address), _DESTINATION) + address
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            sock.send(_HEADER.pack(_HEADER.size + len(asked), _GETROUTE, _REQUEST, 1, 0) + asked)
            answer = sock.recv(_ANSWER_BYTES, socket.MSG_DONTWAIT)
    except OSError:
        return False
    return _HEADER.unpack_from(answer)[1] == _NEWROUTE and answer[_TYPE] == _LOCAL
