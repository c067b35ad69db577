"""What a port's socket says about it to whoever may redirect."""

import socket

import pytest

from gangway.ebpf.keys import PortBlock, Target
from gangway.redirect import leases

CONTAINER4, CONTAINER6 = "172.17.0.2", "fd00::2"


def bound(address: str, kind: int = socket.SOCK_STREAM, v6only: bool = True) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    protocol = socket.IPPROTO_TCP if kind == socket.SOCK_STREAM else socket.IPPROTO_UDP
    sock = socket.socket(family, kind, protocol)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    sock.bind((address, 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


@pytest.mark.parametrize(
    ("address", "v6only", "asked"),
    [
        ("0.0.0.0", True, ["0.0.0.0"]),
        ("127.0.0.5", True, ["127.0.0.5"]),
        ("::", True, ["::"]),
        ("::", False, ["::", "0.0.0.0"]),
        ("::1", True, ["::1"]),
    ],
)
@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")])
def test_the_socket_says_where_sockets_are_redirected_from(
    address: str, v6only: bool, asked: list[str], kind: int, protocol: str
) -> None:
    with bound(address, kind, v6only) as sock:
        port = sock.getsockname()[1]
        found = list(leases._entries(sock, CONTAINER4, 80))
    assert found == [(PortBlock(protocol, one, port, port), Target(CONTAINER4, 80)) for one in asked]


def test_ipv4_clients_are_not_redirected_to_ipv6() -> None:
    with bound("0.0.0.0") as four, bound("::", v6only=False) as both:
        port = both.getsockname()[1]
        assert not list(leases._entries(four, CONTAINER6, 80))
        assert list(leases._entries(both, CONTAINER6, 80)) == [
            (PortBlock("tcp", "::", port, port), Target(CONTAINER6, 80))
        ]


def test_a_socket_that_does_not_listen_is_none_of_a_relays() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as sock:
        sock.bind(("0.0.0.0", 0))
        assert not list(leases._entries(sock, CONTAINER4, 80))


def test_who_asks_another_address_is_left_alone() -> None:
    with bound("127.0.0.1") as sock:
        assert not list(leases._asked(sock, bytes([10, 0, 0, 1])))
        assert not list(leases._asked(sock, socket.inet_pton(socket.AF_INET6, "fe80::1")))


def test_a_relay_that_is_not_understood_is_left_to_itself() -> None:
    ours, relays = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said: list[str] = []
    with ours, relays:
        relays.send(b"erase one")
        leases.serve(ours, said.append)
    assert len(said) == 1
    assert "not understood" in said[0]


def test_it_ends_when_the_relay_does() -> None:
    ours, relays = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said: list[str] = []
    with ours:
        relays.send(b"erase 1")
        relays.close()
        leases.serve(ours, said.append)
    assert not [line for line in said if "not redirected" in line and "understood" not in line]
