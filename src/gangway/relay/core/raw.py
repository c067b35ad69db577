"""Answers from a UDP port that this process can bind no socket to, because another program's socket has it.

They leave by a raw socket (raw(7)), which serves all such ports of a family: the kernel makes the IP header, and the
UDP header comes with the data.  For IPv6 the kernel also computes the checksum (IPV6_CHECKSUM).  Connection tracking
and rules see a datagram as any other.
"""

import struct
from collections.abc import Callable

from gangway.inet import PROTOCOLS
from gangway.relay.core.batch import Label, reply_ancillary, write_label

Receive = Callable[[memoryview], int]
"""Write a datagram to a buffer, and return its size."""

_HEADER = struct.Struct("!HHHH")  # RFC 768: source port, destination port, length, checksum
_CHECKSUM, _CHECKSUM_AT = struct.Struct("!H"), 6
_PORT = slice(2, 4)  # of struct sockaddr_in and sockaddr_in6
_IPV4_ADDRESS = slice(4, 8)
_MODULUS = 0xFFFF  # a sum in ones' complement of 16-bit words is the remainder of the number that the words make up


def raw_label(sockaddr: bytes, destination: bytes) -> Label:
    """Return the label of answers to a client's struct sockaddr; a raw socket takes no port there."""
    return write_label(sockaddr[: _PORT.start] + b"\0\0" + sockaddr[_PORT.stop :], reply_ancillary(destination))


def with_header(receive: Receive, sockaddr: bytes, destination: bytes, port: int) -> Receive:
    """Return a function that receives an answer and puts the UDP header before it.

    The answer goes from the port of the host address `destination` to the client with this struct sockaddr.
    """
    client_port = int.from_bytes(sockaddr[_PORT])
    pseudo = 0
    if is_ipv4 := len(destination) == 4:
        pseudo = int.from_bytes(destination + sockaddr[_IPV4_ADDRESS]) + PROTOCOLS["udp"]

    def receive_answer(room: memoryview) -> int:
        size = receive(room[_HEADER.size :]) + _HEADER.size
        _HEADER.pack_into(room, 0, port, client_port, size, 0)
        if is_ipv4:
            total = pseudo + size + (int.from_bytes(room[:size]) << 8 * (size % 2))
            _CHECKSUM.pack_into(room, _CHECKSUM_AT, _MODULUS - total % _MODULUS)
        return size

    return receive_answer
