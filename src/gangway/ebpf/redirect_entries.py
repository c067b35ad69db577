"""A port mapping as entries of the redirect's trie, byte for byte.

What this file knows: the layout of `struct backend` in sockets.bpf.c, and its rows of the table of ports.  What it must
not know: the kernel, who may be redirected.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from gangway.ebpf.keys import PROTOCOLS, four_or_sixteen, keys, sixteen, unpacked

_VALUE = struct.Struct("=16sHxxxxxxQ")  # address, shift, unused, redirected
VALUE_BYTES = _VALUE.size
_PORTS = 1 << 16
_SERVING = 2


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
    value = _VALUE.pack(sixteen(container_address), (container_first - host_ports[0]) % _PORTS, 0)
    for key in keys(protocol, host_address, *host_ports):
        yield key, value


def ports_of(key: bytes, value: bytes) -> Iterator[tuple[int, int, int]]:
    """The ports of an entry, those of the host and those of the container: a row of the table of ports (enum rows in
    sockets.bpf.c), the first port and the last."""
    protocol, _, first, last = unpacked(key)
    asked_row = int(protocol == PROTOCOLS["udp"])
    serving = led_to(value, first).port
    yield _SERVING + asked_row, serving, serving + last - first  # first: who is redirected is to know what it asked
    yield asked_row, first, last


def led_to(value: bytes, port: int) -> Led:
    """Where a value leads who asks for `port`."""
    address, shift, redirected = _VALUE.unpack(value)
    return Led(four_or_sixteen(address), (port + shift) % _PORTS, redirected)


def without_count(value: bytes) -> bytes:
    """A value as it was entered."""
    address, shift, _ = _VALUE.unpack(value)
    return _VALUE.pack(address, shift, 0)
