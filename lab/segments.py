"""TCP segments that no socket would send, and the packets that arrive at an interface."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lab.netns import Namespace

# include/uapi/linux/tcp.h; the last one ends the repair without a window probe
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ, _OFF_NO_WP = 19, 20, 21, -1
_RECEIVE_QUEUE, _SEND_QUEUE = 1, 2
_IPV6_CHECKSUM = 7  # include/uapi/linux/in6.h
_PSH_ACK = 0x18
_FAR = 1 << 28
_ETH_P_ALL = 3  # include/uapi/linux/if_ether.h
_TCP = socket.IPPROTO_TCP


def send_outside_of_window(space: Namespace, sock: socket.socket) -> None:
    """Send a segment as if it were that of a connected socket in `space`, far out of its peer's window."""
    (source, sport), (target, dport) = (
        (address.removeprefix("::ffff:"), port) for address, port, *_ in (sock.getsockname(), sock.getpeername())
    )
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    sent, received = _sequence_numbers(sock)
    ports_and_numbers = struct.pack("!HHII", sport, dport, (sent + _FAR) % (1 << 32), received)
    segment = ports_and_numbers + struct.pack("!BBHHH", 5 << 4, _PSH_ACK, 512, 0, 0) + b"stray"
    with space.entered():
        raw = socket.socket(family, socket.SOCK_RAW, _TCP)
    with raw:
        raw.bind((source, 0))
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, 16)
        else:
            pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!HH", _TCP, len(segment))
            segment = segment[:16] + struct.pack("!H", _checksum(pseudo + segment)) + segment[18:]
        raw.sendto(segment, (target, 0))


class Segment(NamedTuple):
    """Where an IPv4 TCP segment comes from, and where it goes."""

    source: tuple[str, int]
    target: tuple[str, int]


class Recorder:
    """Records the IPv4 TCP segments that pass an interface."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def segments(self) -> Iterator[Segment]:
        """Yield what has passed since the last call."""
        while True:
            try:
                packet = self._sock.recv(2000)
            except BlockingIOError:
                return
            if packet[0] == 0x45 and packet[9] == _TCP:  # no options
                sport, dport = struct.unpack_from("!HH", packet, 20)
                source, target = (socket.inet_ntoa(packet[at : at + 4]) for at in (12, 16))
                yield Segment((source, sport), (target, dport))


@contextmanager
def recorded(space: Namespace, interface: str) -> Iterator[Recorder]:
    """Record for a `with` block."""
    with space.entered():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
    with sock:
        sock.bind((interface, _ETH_P_ALL))
        sock.setblocking(False)
        yield Recorder(sock)


def _sequence_numbers(sock: socket.socket) -> tuple[int, int]:
    """Return the number of the next byte to send, and of the next to receive."""
    sock.setsockopt(_TCP, _TCP_REPAIR, 1)
    numbers = []
    for queue in (_SEND_QUEUE, _RECEIVE_QUEUE):
        sock.setsockopt(_TCP, _TCP_REPAIR_QUEUE, queue)
        numbers.append(sock.getsockopt(_TCP, _TCP_QUEUE_SEQ) % (1 << 32))
    sock.setsockopt(_TCP, _TCP_REPAIR, _OFF_NO_WP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # which the repair has switched off
    return numbers[0], numbers[1]


def _checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total
