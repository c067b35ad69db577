"""What a holder's message asks for."""

import socket
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.relay.lease import parse
from gangway.relay.stream import IPPROTO_SCTP, Backend

NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": IPPROTO_SCTP}
# Text that comes near to a message: its words, in any number, order and spelling.
WORDS = st.sampled_from(["lease", "tcp", "udp", "sctp", "10.0.0.1", "::1", "80", "0", "65536", "-1", "\0", "\u0661"])
NEARLY = st.lists(WORDS | st.text(max_size=5), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("message", "backend"),
    [
        ("lease tcp 172.17.0.2 80", Backend(socket.IPPROTO_TCP, socket.AF_INET, "172.17.0.2", 80)),
        ("lease udp fd00::2 53", Backend(socket.IPPROTO_UDP, socket.AF_INET6, "fd00::2", 53)),
        ("lease sctp 10.0.0.1 65535", Backend(IPPROTO_SCTP, socket.AF_INET, "10.0.0.1", 65535)),
    ],
)
def test_a_good_message(message: str, backend: Backend) -> None:
    assert parse(message) == backend


@pytest.mark.parametrize(
    "message",
    [
        "",
        "lease",
        "lease tcp 10.0.0.1",
        "lease tcp 10.0.0.1 80 more",
        "release tcp 10.0.0.1 80",
        "lease TCP 10.0.0.1 80",
        "lease dccp 10.0.0.1 80",
        "lease tcp 10.0.0 80",
        "lease tcp 10.0.0.256 80",
        "lease tcp localhost 80",
        "lease tcp :::1 80",
        "lease tcp fe80::1%lo 80",
        "lease tcp 10.0.0.1 0",
        "lease tcp 10.0.0.1 -1",
        "lease tcp 10.0.0.1 65536",
        "lease tcp 10.0.0.1 http",
        "lease tcp 10.0.0.1 8.0",
        "lease tcp 10.0.0.1\0 80",
        "lease tcp 10.0.0.1 " + "9" * 5000,
    ],
)
def test_a_bad_message_is_shown_as_it_came(message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(message)
    assert repr(message) in str(refusal.value)


@given(
    st.sampled_from(sorted(NUMBERS)),
    st.ip_addresses(),
    st.integers(1, 65535),
)
def test_what_was_asked_is_what_is_understood(protocol: str, address: IPv4Address | IPv6Address, port: int) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    backend = parse(f"lease {protocol} {address} {port}")
    assert backend == Backend(NUMBERS[protocol], family, str(address), port)


@given(st.text() | NEARLY | NEARLY.map("lease {}".format))
def test_any_text_is_a_lease_or_is_refused(message: str) -> None:
    try:
        backend = parse(message)
    except InvalidRequest:
        return
    socket.inet_pton(backend.family, backend.address)
    assert backend.protocol in NUMBERS.values()
    assert 0 < backend.port < 65536
