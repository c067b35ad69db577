"""The host address and port that a UDP client's datagram was sent to, and how to answer from there.

It reads and writes the ancillary data (cmsg(3)) of UDP sockets.  A *destination* is a host address in the form that
`destination4` and `destination6` return.

Kernel facts:

* ip(7), struct in_pktinfo: `ipi_spec_dst` is the local address of the datagram: its destination or, for a broadcast,
  the address of the interface.  Given to sendmsg it is the source of the answer.  With `ipi_ifindex` 0 routing chooses
  the interface.
* ipv6(7), struct in6_pktinfo: address and interface; the interface matters for link-local addresses only.  A multicast
  address cannot be a source: the kernel chooses one.
* A dual-stack socket also reports IPv4's struct (IP_PKTINFO) on request; only that has the interface's address for a
  broadcast (net/ipv6/udp.c, udpv6_recvmsg and udpv6_sendmsg support both).
* IP_RECVORIGDSTADDR and IPV6_RECVORIGDSTADDR report the address and port that a datagram was sent to, as a struct
  sockaddr (net/ipv4/ip_sockglue.c, net/ipv6/datagram.c): a socket that serves many ports needs the port.
"""

import socket
import struct

from gangway.relay.core.batch import Ancillary

IP_PKTINFO = 8  # include/uapi/linux/in.h; Python 3.11 does not name it
_IP_ORIGDSTADDR = 20
_IPV6_ORIGDSTADDR = 74  # include/uapi/linux/in6.h
_PKTINFO4 = socket.IPPROTO_IP, IP_PKTINFO
_PKTINFO6 = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO
_ORIGDSTADDR = {(socket.IPPROTO_IP, _IP_ORIGDSTADDR), (socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR)}
_LINK_LOCAL = 0xFE80 >> 6
_MULTICAST = 0xFF


def request_address(sock: socket.socket) -> None:
    """Have the kernel report each datagram's destination address."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def request_port(sock: socket.socket) -> None:
    """Have the kernel report each datagram's destination port."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_ORIGDSTADDR, 1)


def destination_port(ancillary: Ancillary) -> int:
    """Return the destination port, or 0 if it was not requested.  (sockaddr_in and sockaddr_in6 begin alike.)"""
    return next((int.from_bytes(data[2:4]) for level, kind, data in ancillary if (level, kind) in _ORIGDSTADDR), 0)


def destination4(ancillary: Ancillary) -> bytes:
    """Return the destination address of a datagram of an IPv4 socket (ipi_spec_dst): 4 bytes."""
    return next((data[4:8] for level, kind, data in ancillary if (level, kind) == _PKTINFO4), b"")


def destination6(ancillary: Ancillary) -> bytes:
    """Return the destination address of a datagram of an IPv6 socket.

    16 bytes and, for a link-local address, the interface's index (4 bytes); 4 bytes from an IPv4 client.
    """
    ipv4 = destination4(ancillary)
    if ipv4:
        return ipv4
    info = next((data for level, kind, data in ancillary if (level, kind) == _PKTINFO6), b"")
    return info if int.from_bytes(info[:2]) >> 6 == _LINK_LOCAL else info[:16]


def reply_ancillary(destination: bytes) -> Ancillary:
    """Return the ancillary data that sends an answer from the address that a datagram was sent to."""
    if len(destination) == 4:
        return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, destination, b"\0\0\0\0"))]
    if not destination or destination[0] == _MULTICAST:
        return []
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, destination.ljust(20, b"\0"))]
