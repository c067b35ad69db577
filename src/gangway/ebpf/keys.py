"""Layouts of the maps' keys and values, byte for byte, and the values that the rest of gangway works with.

What this file knows: the structs in published.bpf.h, redirect.bpf.c and steering.bpf.c.  What it must not know: the
kernel.

How it works.  The published ports of both programs are the keys of longest-prefix tries: protocol, host address, port.
One entry stands for all ports that begin with the same bits, so a range of ports is split into aligned blocks:
8000-8010 into 8000-8007, 8008-8009 and 8010.  No range takes more than 30 entries.  Ports are in network byte order in
the keys, otherwise the ports of a block would not begin with the same bits.
"""

import struct
import sys
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gangway import inet
from gangway.inet import IPV4_MAPPED, pack_address

PROTOCOLS = {name: number for name, number in inet.PROTOCOLS.items() if name != "sctp"}
"""IPPROTO_TCP and IPPROTO_UDP.  The kernel runs no programs for sockets of other protocols."""
KINDS = tuple((protocol, family) for family in (4, 6) for protocol in ("tcp", "udp"))
"""Protocols and families (4 or 6), in the order of steering's rows."""
_KEY = struct.Struct("=II16s2s")  # prefix_bits, protocol, address, port
_TARGET = struct.Struct("=16sHxxxxxxQ")  # address, shift, unused, uses
KEY_BYTES, TARGET_BYTES, STATE_BYTES, ADDRESS_BYTES, AUTO_BOUND_BYTES = _KEY.size, _TARGET.size, 1, 16, 4
_FLOW = struct.Struct("=Q16s2sxx")  # struct flow: a socket's cookie, and an address and port in network byte order
_PEER = struct.Struct("=16s2sxx")
FLOW_BYTES, PEER_BYTES = _FLOW.size, _PEER.size
_PORT_BITS = 16
_PORTS = 1 << _PORT_BITS
_BITS_BEFORE_PORT = 8 * (_KEY.size - 4) - _PORT_BITS
_NAMES = {number: name for name, number in PROTOCOLS.items()}
REDIRECT_ROWS, STEERING_ROWS = 4, 8  # of their port_counts
_UDP_ROW, _IPV6_ROW = 1, 2  # of steering's; relay_sockets has the same rows
_RESERVED_ROWS = 4  # steering's rows from here on are the same for reserved ports only
_CONTAINER_ROW = 2  # of the redirect's: enum rows in redirect.bpf.c

Span = tuple[int, int, int]
"""A row of `port_counts`, a first port and a last one."""


class SteeringState(bytes, Enum):
    """What steering does with a port: the values of its map."""

    RESERVED = b"\1"  # other programs cannot bind it
    SERVED = b"\2"  # nor can they, and its packets go to the relay's socket
    HELD = b"\3"  # its packets do, though another program's socket is bound to it


class PortBlock(NamedTuple):
    """2^n ports, the first one a multiple of 2^n.  The addresses 0.0.0.0 and :: stand for all of their family."""

    protocol: str
    address: str
    first: int
    last: int


class Target(NamedTuple):
    """Where the redirect leads a port, or the first one of a block, and how often the entry has been used."""

    address: str
    port: int
    uses: int = 0


Peer = tuple[str, int]
"""An address and a port."""


class Flow(NamedTuple):
    """A redirected socket, by its cookie, and an address and port that it has to do with."""

    cookie: int
    peer: Peer


def blocks(protocol: str, address: str, first: int, last: int) -> Iterator[PortBlock]:
    """Split a range of ports into the fewest blocks, in order."""
    address = unpack_address(pack_address(address))
    while first <= last:
        aligned_bits = (first & -first).bit_length() - 1 if first else _PORT_BITS
        size = 1 << min(aligned_bits, (last - first + 1).bit_length() - 1)
        yield PortBlock(protocol, address, first, first + size - 1)
        first += size


@lru_cache(1024)
def unpack_address(packed: bytes) -> str:
    """Return the address of 16 bytes, in its canonical form."""
    return str(IPv4Address(packed[-4:]) if packed.startswith(IPV4_MAPPED) else IPv6Address(packed))


def pack_key(block: PortBlock) -> bytes:
    """Return the trie's key for a block: struct port_key.  KeyError: the protocol is neither TCP nor UDP."""
    bits = _BITS_BEFORE_PORT + _PORT_BITS - (block.last - block.first).bit_length()
    return _KEY.pack(bits, PROTOCOLS[block.protocol], pack_address(block.address), block.first.to_bytes(2, "big"))


def unpack_key(key: bytes) -> PortBlock:
    """Return the block that a key stands for."""
    bits, protocol, address, port = _KEY.unpack(key)
    first, size = int.from_bytes(port, "big"), 1 << (_BITS_BEFORE_PORT + _PORT_BITS - bits)
    return PortBlock(_NAMES[protocol], unpack_address(address), first, first + size - 1)


def pack_target(block: PortBlock, target: Target) -> bytes:
    """Return the redirect's value for a block, not used yet: struct target."""
    return _TARGET.pack(pack_address(target.address), (target.port - block.first) % _PORTS, 0)


def unpack_target(value: bytes, port: int) -> Target:
    """Return where a value of the redirect leads a host port."""
    address, shift, uses = _TARGET.unpack(value)
    return Target(unpack_address(address), (port + shift) % _PORTS, uses)


def pack_flow(flow: Flow) -> bytes:
    """Return a key of the maps of redirected sockets."""
    return _FLOW.pack(flow.cookie, pack_address(flow.peer[0]), flow.peer[1].to_bytes(2, "big"))


def unpack_flow(key: bytes) -> Flow:
    cookie, address, port = _FLOW.unpack(key)
    return Flow(cookie, (unpack_address(address), int.from_bytes(port, "big")))


def unpack_peer(value: bytes) -> Peer:
    address, port = _PEER.unpack(value)
    return unpack_address(address), int.from_bytes(port, "big")


def unspecified(address: str) -> str:
    """Return the address that stands for all of an address's family."""
    return "::" if ":" in address else "0.0.0.0"


def redirect_spans(block: PortBlock, value: bytes) -> Iterator[Span]:
    """Yield the ports of an entry: the container's first, as a redirected socket must find the address it requested."""
    row, first = int(block.protocol == "udp"), unpack_target(value, block.first).port
    yield _CONTAINER_ROW + row, first, first + block.last - block.first
    yield row, block.first, block.last


def steering_spans(block: PortBlock, value: bytes) -> Iterator[Span]:
    """Yield the ports of an entry of steering; a reserved port is counted a second time."""
    row = _UDP_ROW * (block.protocol == "udp") + _IPV6_ROW * (":" in block.address)
    yield row, block.first, block.last
    if value != SteeringState.HELD:
        yield _RESERVED_ROWS + row, block.first, block.last


def pack_kind(protocol: str, family: int) -> bytes:
    """Return the key of `relay_sockets` for a protocol and family (4 or 6).  ValueError: there is none."""
    return KINDS.index((protocol, family)).to_bytes(4, sys.byteorder)


def unpack_auto_bound(key: bytes) -> tuple[str, int]:
    """Return the protocol and port of a key of `auto_bound`."""
    number = int.from_bytes(key, sys.byteorder)
    return ("tcp", "udp")[number >> _PORT_BITS], number % _PORTS
