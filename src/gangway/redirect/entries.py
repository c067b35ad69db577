"""A port mapping as entries of the redirect's trie, byte for byte.

What this file knows: the layout of `struct published` and `struct backend` in sockets.bpf.c.  What it must not know:
the kernel, who may be redirected.

How it works.  An entry of a longest-prefix trie stands for all keys that begin alike, so a range of ports is cut into
blocks that do: 8000-8010 into 8000-8007, 8008-8009 and 8010.  No range takes more than 30 entries.  Ports are in
network byte order there, or they would not begin alike.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

PROTOCOLS = {"tcp": 6, "udp": 17}
"""Whose sockets run the programs when they connect or send: IPPROTO_TCP and IPPROTO_UDP."""

_KEY = struct.Struct("=II16s2s")  # prefix_bits, protocol, address, port
_VALUE = struct.Struct("=16sHxxxxxxQ")  # address, shift, unused, redirected
_PORT_BITS = 16
_BITS_BEFORE_PORT = 8 * (_KEY.size - 4) - _PORT_BITS
_SERVING = 2
_MAPPED = bytes(10) + b"\xff\xff"


class Led(NamedTuple):
    """What a port leads to, as the trie has it: an address (4 or 16 bytes), a port, and how often it was used."""

    address: bytes
    port: int
    redirected: int


def entries(
    protocol: str, host_address: bytes, host_ports: tuple[int, int], container_address: bytes, container_first: int
) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values for a mapping.

    Addresses have 4 or 16 bytes; the host's is zero if it is published on all of its family.  `host_ports` are the
    first and the last.
    """
    value = _VALUE.pack(sixteen(container_address), (container_first - host_ports[0]) % (1 << _PORT_BITS), 0)
    for port, bits in blocks(*host_ports):
        yield key_at(protocol, host_address, port, bits), value


def key_at(protocol: str, host_address: bytes, port: int, port_bits: int = _PORT_BITS) -> bytes:
    """What to look up for one port; or the key of a block of ports that share the first `port_bits` with it."""
    return _KEY.pack(_BITS_BEFORE_PORT + port_bits, PROTOCOLS[protocol], sixteen(host_address), port.to_bytes(2, "big"))


def ports_of(key: bytes, value: bytes) -> Iterator[tuple[int, int, int]]:
    """The ports of an entry, those of the host and those of the container: a row of the table of ports (enum rows in
    sockets.bpf.c), the first port and the last."""
    protocol, _, first, last = unpacked(key)
    asked_row = int(protocol == PROTOCOLS["udp"])
    serving = led_to(value, first).port
    yield _SERVING + asked_row, serving, serving + last - first  # first: who is redirected is to know what it asked
    yield asked_row, first, last


def unpacked(key: bytes) -> tuple[int, bytes, int, int]:
    """What a key stands for: IPPROTO_TCP or IPPROTO_UDP, an address (4 or 16 bytes), the first port and the last."""
    bits, protocol, address, port = _KEY.unpack(key)
    first = int.from_bytes(port, "big")
    return protocol, address.removeprefix(_MAPPED), first, first + (1 << (_BITS_BEFORE_PORT + _PORT_BITS - bits)) - 1


def led_to(value: bytes, port: int) -> Led:
    """Where a value leads who asks for `port`."""
    address, shift, redirected = _VALUE.unpack(value)
    return Led(address.removeprefix(_MAPPED), (port + shift) % (1 << _PORT_BITS), redirected)


def without_count(value: bytes) -> bytes:
    """A value as it was entered."""
    address, shift, _ = _VALUE.unpack(value)
    return _VALUE.pack(address, shift, 0)


KEY_BYTES, VALUE_BYTES = _KEY.size, _VALUE.size


def blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The fewest blocks that make up a range: the first port of each, and how many of its bits all its ports share."""
    while first <= last:
        size_bits = min((first & -first).bit_length() - 1 if first else _PORT_BITS, (last - first + 1).bit_length() - 1)
        yield first, _PORT_BITS - size_bits
        first += 1 << size_bits


def sixteen(address: bytes) -> bytes:
    """IPv4's addresses as IPv6 maps them (RFC 4291, 2.5.5.2)."""
    return _MAPPED + address if len(address) == 4 else address
