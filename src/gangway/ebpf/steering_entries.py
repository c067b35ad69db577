"""A range of ports in steering's maps, byte for byte.

What this file knows: the values of `kept`, the keys of `lent`, and the rows of `ports` and `shared`, in steer.bpf.c.
What it must not know: the kernel, where a port leads.
"""

import sys

from gangway.ebpf.keys import PROTOCOLS, unpacked

VALUE_BYTES = 1
TAKEN, SERVED = b"\1", b"\2"
"""Nobody else gets a port; and what arrives for it is steered."""

KINDS = tuple((protocol, family) for family in (4, 6) for protocol in ("tcp", "udp"))
"""Those that have a socket, in the order of their rows."""
LENT_BYTES = 4
_UDP, _IPV6 = 1, 2


def stretch(key: bytes) -> tuple[int, int, int]:
    """The ports of a key, in the table of ports: a row, the first port and the last."""
    protocol, address, first, last = unpacked(key)
    is_ipv6 = len(address) > 4
    return _UDP * (protocol == PROTOCOLS["udp"]) + _IPV6 * is_ipv6, first, last


def row(protocol: str, family: int) -> bytes:
    """A protocol's and family's key in `shared`."""
    return KINDS.index((protocol, family)).to_bytes(4, sys.byteorder)


def lent_port(key: bytes) -> tuple[str, int]:
    """The protocol and port of a key in `lent`."""
    number = int.from_bytes(key, sys.byteorder)
    return ("tcp", "udp")[number >> 16], number & 0xFFFF
