"""Elements of the maps of published ports, as the kernel has them.

Each field of a concatenation takes a multiple of four bytes (nf_tables.h: NFT_REG32_SIZE).  An element of an interval
map has two keys: of the first and of the last value of each field.
"""

import socket
import struct
from functools import lru_cache
from ipaddress import ip_network
from typing import NamedTuple

_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}  # include/uapi/linux/in.h: IPPROTO_…
_PROTOCOL, _PORT = struct.Struct(">Bxxx"), struct.Struct(">Hxx")


class Element(NamedTuple):
    """An element of a map; `last` is empty unless it is an interval, `target` is empty in a set."""

    key: bytes
    last: bytes
    target: bytes


def pack(text: str, is_interval: bool) -> Element:
    """Pack an element in nft's language; its fields are protocols, addresses and ports."""
    key, _, target = text.partition(" : ")
    fields = [*map(_pack, key.split(" . "))]
    last = b"".join(last for _, last in fields) if is_interval else b""
    return Element(b"".join(first for first, _ in fields), last, _pack_target(target))


def unpack_target(target: bytes) -> str:
    """Return a target in nft's language: `ADDRESS [. PORT]`."""
    length = 4 if len(target) <= 8 else 16
    address = socket.inet_ntop(socket.AF_INET if length == 4 else socket.AF_INET6, target[:length])
    return " . ".join((address, *(str(port) for (port,) in _PORT.iter_unpack(target[length:]))))


def pack_key(protocol: str, address: str, port: int) -> bytes:
    """Pack the fields of a packet that are looked up; an empty address is not."""
    return b"".join(_pack(field)[0] for field in (protocol, address, str(port)) if field)


@lru_cache(4096)
def _pack_target(text: str) -> bytes:
    return b"".join(_pack(field)[0] for field in text.split(" . ")) if text else b""


@lru_cache(4096)
def _pack(text: str) -> tuple[bytes, bytes]:
    """Pack the first and the last value of a field."""
    if text in _PROTOCOLS:
        return (_PROTOCOL.pack(_PROTOCOLS[text]),) * 2
    if "." in text or ":" in text:
        network = ip_network(text)
        return network[0].packed, network[-1].packed
    first, _, last = text.partition("-")
    return _PORT.pack(int(first)), _PORT.pack(int(last or first))
