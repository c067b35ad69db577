"""Destination addresses of datagrams, and answers from there, as the kernel reports them."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gangway.relay.core.batch import IP_PKTINFO, Ancillary, destination4, destination6, reply_ancillary

LINK_LOCAL = socket.inet_pton(socket.AF_INET6, "fe80::1")
GLOBAL = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
MULTICAST = socket.inet_pton(socket.AF_INET6, "ff02::1")


@contextmanager
def listening(family: int, address: str) -> Iterator[socket.socket]:
    """A UDP socket that reports destination addresses, as a port's does; for IPv6 a dual-stack one."""
    with socket.socket(family, socket.SOCK_DGRAM) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        listener.bind((address, 0))
        listener.settimeout(5)
        yield listener


def info4(interface: int, spec_dst: str, address: str) -> Ancillary:
    """Return a struct in_pktinfo."""
    data = struct.pack("=i4s4s", interface, socket.inet_aton(spec_dst), socket.inet_aton(address))
    return [(socket.IPPROTO_IP, IP_PKTINFO, data)]


def info6(address: bytes, interface: int) -> Ancillary:
    """Return a struct in6_pktinfo."""
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16sI", address, interface))]


@pytest.mark.parametrize(
    ("family", "bound", "client", "address"),
    [
        (socket.AF_INET, "0.0.0.0", socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", socket.AF_INET, "127.9.8.7"),
        (socket.AF_INET6, "::", socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::", socket.AF_INET, "127.9.8.7"),
    ],
    ids=["4", "4, another address", "6", "4 of a dual-stack socket"],
)
def test_answer_leaves_from_the_destination_address(family: int, bound: str, client: int, address: str) -> None:
    with listening(family, bound) as listener, socket.socket(client, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(b"request", (address, listener.getsockname()[1]))
        _, ancillary, _, sender = listener.recvmsg(64, 256)
        destination = (destination6 if family == socket.AF_INET6 else destination4)(ancillary)
        assert destination == socket.inet_pton(client, address)
        listener.sendmsg([b"answer"], reply_ancillary(destination), 0, sender)
        assert sock.recvfrom(64)[1][0] == address


def test_broadcast_is_answered_from_the_interface_address() -> None:
    destination = destination4(info4(2, "192.0.2.1", "192.0.2.255"))
    assert destination == socket.inet_aton("192.0.2.1")
    assert reply_ancillary(destination) == info4(0, "192.0.2.1", "0.0.0.0")


def test_routing_chooses_the_interface_for_a_global_address() -> None:
    destination = destination6(info6(GLOBAL, 3))
    assert destination == GLOBAL
    assert reply_ancillary(destination) == info6(GLOBAL, 0)


def test_link_local_address_has_its_interface() -> None:
    destination = destination6(info6(LINK_LOCAL, 3))
    assert destination != destination6(info6(LINK_LOCAL, 4))
    assert reply_ancillary(destination) == info6(LINK_LOCAL, 3)


@pytest.mark.parametrize(
    ("address", "link_local"), [("fe80::1", True), ("febf::1", True), ("fec0::1", False), ("fe7f::1", False)]
)
def test_link_local_addresses(address: str, link_local: bool) -> None:
    packed = socket.inet_pton(socket.AF_INET6, address)
    assert (len(destination6(info6(packed, 3))) == 20) is link_local


def test_multicast_address_is_not_used_as_source() -> None:
    assert reply_ancillary(destination6(info6(MULTICAST, 3))) == []


def test_ipv4_info_is_preferred_on_a_dual_stack_socket() -> None:
    mapped = info6(b"\0" * 10 + b"\xff\xff" + socket.inet_aton("192.0.2.255"), 3)
    four = info4(3, "192.0.2.1", "192.0.2.255")
    for ancillary in (mapped + four, four + mapped):
        assert reply_ancillary(destination6(ancillary)) == info4(0, "192.0.2.1", "0.0.0.0")


def test_without_info_the_kernel_chooses_the_source() -> None:
    assert destination4([]) == b""
    assert destination6([]) == b""
    assert reply_ancillary(b"") == []
