"""A range of ports as entries of steering's trie, byte for byte.

What this file knows: `kept`, `shared` and the rows of `ports` in steer.bpf.c.  What it must not know: the kernel, where
a port leads.

The keys are those of the redirect's trie: a range takes 30 entries at most.
"""

import sys
from collections.abc import Iterator

from gangway.redirect.entries import KEY_BYTES, PROTOCOLS, blocks, key_at, unpacked

VALUE_BYTES = 1
TAKEN, SERVED = b"\1", b"\2"
"""Nobody else gets a port; and what arrives for it is steered."""

_UDP, _IPV6 = 1, 2
KINDS = tuple((protocol, family) for family in (4, 6) for protocol in ("tcp", "udp"))
"""Those that have a socket, in the order of their rows."""

__all__ = ["KEY_BYTES", "KINDS", "SERVED", "TAKEN", "VALUE_BYTES", "keys", "row", "stretch"]


def keys(protocol: str, address: bytes, first: int, last: int) -> Iterator[bytes]:
    """The keys for a range of one host address (4 or 16 bytes); zero stands for all of its family."""
    for port, bits in blocks(first, last):
        yield key_at(protocol, address, port, bits)


def stretch(key: bytes) -> tuple[int, int, int]:
    """The ports of a key, in the table of ports: a row, the first port and the last."""
    protocol, address, first, last = unpacked(key)
    is_ipv6 = len(address) > 4
    return _UDP * (protocol == PROTOCOLS["udp"]) + _IPV6 * is_ipv6, first, last


def row(protocol: str, family: int) -> bytes:
    """A protocol's and family's key in `shared`."""
    return KINDS.index((protocol, family)).to_bytes(4, sys.byteorder)
