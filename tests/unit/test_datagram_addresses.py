"""Which host address a client asked, and how an answer leaves from there: by what the kernel itself says."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gangway.relay.core.batch import Ancillary
from gangway.relay.core.pktinfo import IP_PKTINFO, destination4, destination6, reply_ancillary

LINK_LOCAL = socket.inet_pton(socket.AF_INET6, "fe80::1")
GLOBAL = socket.inet_pton(socket.AF_INET6, "2001:db8::7")
MULTICAST = socket.inet_pton(socket.AF_INET6, "ff02::1")


@contextmanager
def listening(family: int, address: str) -> Iterator[socket.socket]:
    """A UDP socket that is told which address was asked, as a port's is; on IPv6 a dual-stack one."""
    with socket.socket(family, socket.SOCK_DGRAM) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        listener.bind((address, 0))
        listener.settimeout(5)
        yield listener


def info4(interface: int, spec_dst: str, address: str) -> Ancillary:
    """IPv4's in_pktinfo."""
    data = struct.pack("=i4s4s", interface, socket.inet_aton(spec_dst), socket.inet_aton(address))
    return [(socket.IPPROTO_IP, IP_PKTINFO, data)]


def info6(address: bytes, interface: int) -> Ancillary:
    """IPv6's in6_pktinfo."""
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16sI", address, interface))]


@pytest.mark.parametrize(
    ("family", "bound", "client", "asked"),
    [
        (socket.AF_INET, "0.0.0.0", socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", socket.AF_INET, "127.9.8.7"),
        (socket.AF_INET6, "::", socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::", socket.AF_INET, "127.9.8.7"),
    ],
    ids=["4", "4, another address", "6", "4 of a dual-stack socket"],
)
def test_the_answer_leaves_from_the_address_that_was_asked(family: int, bound: str, client: int, asked: str) -> None:
    with listening(family, bound) as listener, socket.socket(client, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(b"who are you?", (asked, listener.getsockname()[1]))
        _, ancillary, _, address = listener.recvmsg(64, 256)
        told = (destination6 if family == socket.AF_INET6 else destination4)(ancillary)
        assert told == socket.inet_pton(client, asked)
        listener.sendmsg([b"me"], reply_ancillary(told), 0, address)
        assert sock.recvfrom(64)[1][0] == asked


def test_a_broadcast_is_answered_from_the_interface() -> None:
    told = destination4(info4(2, "192.0.2.1", "192.0.2.255"))
    assert told == socket.inet_aton("192.0.2.1")
    assert reply_ancillary(told) == info4(0, "192.0.2.1", "0.0.0.0")


def test_routing_picks_the_interface_of_a_global_address() -> None:
    told = destination6(info6(GLOBAL, 3))
    assert told == GLOBAL
    assert reply_ancillary(told) == info6(GLOBAL, 0)


def test_a_link_local_address_keeps_its_interface() -> None:
    told = destination6(info6(LINK_LOCAL, 3))
    assert told != destination6(info6(LINK_LOCAL, 4))
    assert reply_ancillary(told) == info6(LINK_LOCAL, 3)


@pytest.mark.parametrize(
    ("address", "kept"), [("fe80::1", True), ("febf::1", True), ("fec0::1", False), ("fe7f::1", False)]
)
def test_which_addresses_are_link_local(address: str, kept: bool) -> None:
    packed = socket.inet_pton(socket.AF_INET6, address)
    assert (len(destination6(info6(packed, 3))) == 20) is kept


def test_a_multicast_address_is_no_source() -> None:
    assert reply_ancillary(destination6(info6(MULTICAST, 3))) == []


def test_ipv4_comes_first_on_a_dual_stack_socket() -> None:
    mapped = info6(b"\0" * 10 + b"\xff\xff" + socket.inet_aton("192.0.2.255"), 3)
    four = info4(3, "192.0.2.1", "192.0.2.255")
    for ancillary in (mapped + four, four + mapped):
        assert reply_ancillary(destination6(ancillary)) == info4(0, "192.0.2.1", "0.0.0.0")


def test_without_a_word_the_kernel_chooses() -> None:
    assert destination4([]) == b""
    assert destination6([]) == b""
    assert reply_ancillary(b"") == []
