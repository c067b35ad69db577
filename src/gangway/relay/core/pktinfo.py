"""Which host address and port a datagram's client asked, and how an answer leaves from there.

What this file knows: ancillary data (cmsg(3)) of UDP sockets.  What it must not know: clients, ports.

Facts that it leans on:

* ip(7), struct in_pktinfo: `ipi_spec_dst` is the local address for the datagram: the one that was asked or, for a
  broadcast, the interface's own; given to sendmsg it is the source of the answer.  With `ipi_ifindex` 0 routing picks
  the interface.
* ipv6(7), struct in6_pktinfo: address and interface; the interface matters to link-local addresses only.  A multicast
  address cannot be a source: the kernel chooses.
* A dual-stack socket tells the IPv4 way (IP_PKTINFO) too, if asked: only there does a broadcast have its interface's
  address (net/ipv6/udp.c, udpv6_recvmsg and udpv6_sendmsg know both).
* IP_RECVORIGDSTADDR and IPV6_RECVORIGDSTADDR tell the address and port that a datagram was sent to, as a struct
  sockaddr (net/ipv4/ip_sockglue.c, net/ipv6/datagram.c): at a socket that serves many ports that is the asked one.
"""

import socket
import struct

from gangway.relay.core.batch import Ancillary

IP_PKTINFO = 8  # include/uapi/linux/in.h; Python 3.11 does not name it
_IP_ORIGDSTADDR = 20
_IPV6_ORIGDSTADDR = 74  # include/uapi/linux/in6.h
_PKTINFO4 = socket.IPPROTO_IP, IP_PKTINFO
_PKTINFO6 = socket.IPPROTO_IPV6, socket.IPV6_PKTINFO
_ORIGINAL = {(socket.IPPROTO_IP, _IP_ORIGDSTADDR), (socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR)}
_LINK_LOCAL = 0xFE80 >> 6
_MULTICAST = 0xFF


def request_address(sock: socket.socket) -> None:
    """The address that was asked is to come with each datagram."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def request_port(sock: socket.socket) -> None:
    """And so is the port."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_ORIGDSTADDR, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_ORIGDSTADDR, 1)


def destination_port(ancillary: Ancillary) -> int:
    """The host port that was asked, if it was to come (struct sockaddr_in and _in6 begin alike); else 0."""
    return next((int.from_bytes(data[2:4]) for level, kind, data in ancillary if (level, kind) in _ORIGINAL), 0)


def destination4(ancillary: Ancillary) -> bytes:
    """The host address that an IPv4 socket's client asked: ipi_spec_dst, 4 bytes."""
    return next((data[4:8] for level, kind, data in ancillary if (level, kind) == _PKTINFO4), b"")


def destination6(ancillary: Ancillary) -> bytes:
    """The same of an IPv6 socket: 16 bytes and, for a link-local address, the interface (4 bytes); 4 bytes from an
    IPv4 client."""
    ipv4 = destination4(ancillary)
    if ipv4:
        return ipv4
    info = next((data for level, kind, data in ancillary if (level, kind) == _PKTINFO6), b"")
    return info if int.from_bytes(info[:2]) >> 6 == _LINK_LOCAL else info[:16]


def reply_ancillary(destination: bytes) -> Ancillary:
    """The ancillary data that makes an answer leave from an address, as `destination4` and `destination6` give it."""
    if len(destination) == 4:
        return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, destination, b"\0\0\0\0"))]
    if not destination or destination[0] == _MULTICAST:
        return []
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, destination.ljust(20, b"\0"))]
