"""The key of a published port, or of a range of them, byte for byte.

What this file knows: `struct published` in published.bpf.h.  What it must not know: what is found under a key.

How it works.  An entry of a longest-prefix trie stands for all keys that begin alike, so a range of ports is cut into
blocks that do: 8000-8010 into 8000-8007, 8008-8009 and 8010.  No range takes more than 30 entries.  Ports are in
network byte order there, or they would not begin alike.
"""

import struct
from collections.abc import Iterator

PROTOCOLS = {"tcp": 6, "udp": 17}
"""Those whose sockets run programs: IPPROTO_TCP and IPPROTO_UDP."""

_KEY = struct.Struct("=II16s2s")  # prefix_bits, protocol, address, port
KEY_BYTES = _KEY.size
_PORT_BITS = 16
_BITS_BEFORE_PORT = 8 * (_KEY.size - 4) - _PORT_BITS
_MAPPED = bytes(10) + b"\xff\xff"


def keys(protocol: str, address: bytes, first: int, last: int) -> Iterator[bytes]:
    """The keys for a range of one host address (4 or 16 bytes); zero stands for all of its family."""
    for port, bits in blocks(first, last):
        yield key_at(protocol, address, port, bits)


def key_at(protocol: str, host_address: bytes, port: int, port_bits: int = _PORT_BITS) -> bytes:
    """What to look up for one port; or the key of a block of ports that share the first `port_bits` with it."""
    return _KEY.pack(_BITS_BEFORE_PORT + port_bits, PROTOCOLS[protocol], sixteen(host_address), port.to_bytes(2, "big"))


def unpacked(key: bytes) -> tuple[int, bytes, int, int]:
    """What a key stands for: IPPROTO_TCP or IPPROTO_UDP, an address (4 or 16 bytes), the first port and the last."""
    bits, protocol, address, port = _KEY.unpack(key)
    first = int.from_bytes(port, "big")
    return protocol, four_or_sixteen(address), first, first + (1 << (_BITS_BEFORE_PORT + _PORT_BITS - bits)) - 1


def blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The fewest blocks that make up a range: the first port of each, and how many of its bits all its ports share."""
    while first <= last:
        size_bits = min((first & -first).bit_length() - 1 if first else _PORT_BITS, (last - first + 1).bit_length() - 1)
        yield first, _PORT_BITS - size_bits
        first += 1 << size_bits


def sixteen(address: bytes) -> bytes:
    """IPv4's addresses as IPv6 maps them (RFC 4291, 2.5.5.2)."""
    return _MAPPED + address if len(address) == 4 else address


def four_or_sixteen(address: bytes) -> bytes:
    """And back."""
    return address.removeprefix(_MAPPED)
