"""The wire protocol: what is encoded is parsed again, and whatever else arrives is refused by a ProtocolError."""

import socket
from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway import inet
from gangway.inet import PROTOCOLS
from gangway.relay import protocol
from gangway.relay.protocol import (
    Count,
    CountShared,
    Destination,
    Exclude,
    GetHeld,
    GetPort,
    GetShared,
    Hello,
    Hold,
    HostPorts,
    Lease,
    List,
    ListExcluded,
    ListHeld,
    Mode,
    ProtocolError,
    Remove,
    Request,
    Retire,
    Serve,
    Share,
)
from gangway.relay.sockets import Counters

LAST_PORT = 65535
PORT_NUMBERS = st.integers(1, LAST_PORT)
NAMES = st.sampled_from(list(PROTOCOLS))
ADDRESSES = st.ip_addresses().map(str)
PAGES = st.lists(ADDRESSES, max_size=protocol.EXCLUDED_PAGE)
SUBNETS = st.tuples(ADDRESSES, st.integers(0, 32)).map(lambda pair: f"{pair[0]}/{pair[1]}")
ZONED = st.tuples(st.ip_addresses(v=6).map(str), st.sampled_from(["eth0", "1", "docker0.5"])).map("%".join)


@st.composite
def host_ports(draw: st.DrawFn, most: int = LAST_PORT) -> HostPorts:
    """Any range of at most so many ports."""
    first = draw(PORT_NUMBERS)
    last = draw(st.integers(first, min(LAST_PORT, first + most - 1)))
    return HostPorts(draw(NAMES), draw(ADDRESSES | ZONED), first, last)


@st.composite
def served(draw: st.DrawFn) -> Serve:
    """Any served ports."""
    mode = draw(st.sampled_from([Mode.OWN, Mode.LEASED, Mode.SHARED, Mode.HELD]))
    ports = draw(host_ports(LAST_PORT if mode in (Mode.SHARED, Mode.HELD) else 1))
    first = draw(st.integers(1, LAST_PORT - (ports.last - ports.first)))
    subnets = draw(st.lists(SUBNETS, max_size=protocol.MOST_SUBNETS))
    return Serve(ports, Destination(draw(ADDRESSES), first), mode, tuple(subnets))


KINDS: dict[type, st.SearchStrategy[Request]] = {
    Hello: st.builds(Hello, st.integers(0, 100)),
    Serve: served(),
    Remove: st.builds(Remove, host_ports()),
    List: st.builds(List, st.integers(0, 1 << 17)),
    Count: st.builds(Count, st.integers(0, 1 << 17)),
    Share: st.builds(Share, NAMES, st.sampled_from(sorted(inet.FAMILIES))),
    CountShared: st.builds(CountShared),
    Hold: st.builds(Hold, NAMES, st.integers(0, protocol.MAX_DESCRIPTORS)),
    GetHeld: st.builds(GetHeld, NAMES),
    Exclude: st.builds(Exclude, st.integers(0, 1 << 17), PAGES.map(tuple)),
    ListHeld: st.builds(ListHeld),
    ListExcluded: st.builds(ListExcluded),
    GetPort: st.builds(GetPort, host_ports()),
    GetShared: st.builds(GetShared, NAMES, st.sampled_from(sorted(inet.FAMILIES))),
    Retire: st.builds(Retire, st.integers(0, 1 << 20)),
    Lease: st.builds(Lease, NAMES, st.builds(Destination, ADDRESSES, PORT_NUMBERS)),
}
REQUESTS = st.one_of(*KINDS.values())
# Words of messages, and others, in any order.
VOCABULARY = (
    "hello serve remove list count share countshared hold getheld listheld listexcluded getport getshared retire lease "
    "tcp udp own leased 4 10.0.0.1 ::1 80 0 1 -1"
)
WORDS = st.sampled_from(VOCABULARY.split()) | st.text(max_size=5)
ALMOST_REQUESTS = st.lists(WORDS, max_size=9).map(" ".join).map(str.encode)


@given(REQUESTS)
def test_request_round_trip(request_: Request) -> None:
    message = protocol.encode(request_)
    assert protocol.parse(message) == request_
    assert len(message) <= protocol.MAX_REQUEST_BYTES


@given(served())
def test_served_port_round_trip(port: Serve) -> None:
    assert protocol.parse_served(protocol.encode_served(port)) == port


@given(host_ports(), st.lists(st.integers(0, 2**64 - 1), min_size=11, max_size=11).map(Counters._make))
def test_counters_round_trip(ports: HostPorts, counters: Counters) -> None:
    assert protocol.parse_counted(protocol.encode_counted(ports, counters)) == (ports, counters)


@given(st.text() | ALMOST_REQUESTS.map(bytes.decode))
def test_any_line_is_counters_or_refused(line: str) -> None:
    with suppress(ProtocolError):
        protocol.parse_counted(line)


@given(st.text().map(str.rstrip))
def test_answer_round_trip(text: str) -> None:
    assert protocol.parse_answer(protocol.encode_answer(text)) == (True, text)
    assert protocol.parse_answer(protocol.encode_refusal(text)) == (False, text)


def test_every_request_is_tested() -> None:
    assert set(KINDS) == set(get_args(Request))


@given(st.binary(max_size=600) | ALMOST_REQUESTS | ALMOST_REQUESTS.map(b"serve tcp 0.0.0.0 80 80 ::1 ".__add__))
@example(b"hold redirect \xd9\xa1")  # a digit of another script
@example(b"list " + b"9" * 500)
@example(b"remove tcp fe80::1%\x00 80 80")
def test_any_message_is_parsed_or_refused(message: bytes) -> None:
    try:
        parsed = protocol.parse(message)
    except ProtocolError:
        return
    assert protocol.parse(protocol.encode(parsed)) == parsed


@given(st.binary(max_size=200))
@example(b"")
@example(b"ok\xff")
@example(b"okay")
def test_any_answer_is_parsed_or_refused(answer: bytes) -> None:
    try:
        done, _text = protocol.parse_answer(answer)
    except ProtocolError:
        return
    assert answer.startswith(b"ok" if done else b"error")


@given(st.text() | ALMOST_REQUESTS.map(bytes.decode))
def test_any_line_is_a_served_port_or_refused(line: str) -> None:
    try:
        port = protocol.parse_served(line)
    except ProtocolError:
        return
    assert protocol.parse_served(protocol.encode_served(port)) == port


@pytest.mark.parametrize(
    "message",
    [
        "",
        " ",
        "hello",
        "hello 1 more",
        "hello one",
        "HELLO 1",
        "serve",
        "serve tcp 0.0.0.0 80 80",
        "serve tcp 0.0.0.0 80 172.17.0.2 8000",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 own more",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 OWN",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 ours",
        "serve TCP 0.0.0.0 80 80 172.17.0.2 8000 own",
        "serve icmp 0.0.0.0 80 80 172.17.0.2 8000 shared",
        "serve tcp 0.0.0 80 80 172.17.0.2 8000 own",
        "serve tcp localhost 80 80 172.17.0.2 8000 shared",
        "serve tcp 10.0.0.1%eth0 80 80 172.17.0.2 8000 own",
        "serve tcp fe80::1% 80 80 172.17.0.2 8000 own",
        "serve tcp 0.0.0.0 0 80 172.17.0.2 8000 shared",
        "serve tcp 0.0.0.0 80 65536 172.17.0.2 8000 shared",
        "serve tcp 0.0.0.0 81 80 172.17.0.2 8000 shared",
        "serve tcp 0.0.0.0 80 http 172.17.0.2 8000 shared",
        "serve tcp 0.0.0.0 80 +80 172.17.0.2 8000 own",
        "serve tcp 0.0.0.0 80 8_0 172.17.0.2 8000 shared",
        "serve tcp 0.0.0.0 80 80 172.17.0 8000 own",
        "serve tcp 0.0.0.0 80 80 localhost 8000 own",
        "serve tcp 0.0.0.0 80 80 172.17.0.2\0 8000 own",
        "serve tcp 0.0.0.0 80 80 fe80::2%eth0 8000 own",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 0 own",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 65536 own",
        "serve tcp 0.0.0.0 80 81 172.17.0.2 8000 own",
        "serve tcp 0.0.0.0 80 81 172.17.0.2 8000 leased",
        "serve tcp 0.0.0.0 80 81 172.17.0.2 65535 shared",
        "serve tcp 0.0.0.0 1 65535 172.17.0.2 2 shared",
        "remove tcp 0.0.0.0 80",
        "remove tcp 0.0.0.0 80 80 80",
        "list",
        "list -1",
        "list one",
        "list 0 1",
        "LIST 0",
        "share tcp",
        "share tcp 5",
        "share tcp 4 1",
        "share TCP 4",
        "countshared 1",
        "listheld 1",
        "listexcluded 1",
        "getport tcp 10.0.0.1 80",
        "getshared tcp",
        "getshared tcp 5",
        "retire",
        "retire -1",
        "hold some",
        "hold some one",
        "hold some -2",
        f"hold some {protocol.MAX_DESCRIPTORS + 1}",
        "hold some 1 1",
        "getheld",
        "getheld some 0",
        "lease",
        "lease 1 tcp 10.0.0.1",
        "lease 1 tcp 10.0.0.1 80 more",
        "lease 1 dccp 10.0.0.1 80",
        "lease 1 tcp 10.0.0.256 80",
        "lease 1 tcp :::1 80",
        "lease 1 tcp fe80::1%lo 80",
        "lease 1 tcp 10.0.0.1 0",
        "lease 1 tcp 10.0.0.1 65536",
        "lease 1 tcp 10.0.0.1 8.0",
        "lease tcp 10.0.0.1 80",
        "release 1 tcp 10.0.0.1 80",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 ended",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 own 10.0.0.0",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 own 10.0.0.0/33",
        "serve tcp 0.0.0.0 80 80 172.17.0.2 8000 own all/8",
    ],
)
def test_malformed_message_is_shown(message: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        protocol.parse(message.encode())
    assert repr(message.encode()) in str(refusal.value)


def test_long_malformed_message_is_cut() -> None:
    with pytest.raises(ProtocolError) as refusal:
        protocol.parse(b"x" * protocol.MAX_REQUEST_BYTES)
    assert len(str(refusal.value)) < 120


@pytest.mark.parametrize("message", ["lease {} tcp 10.0.0.1 80", "lease {} else"])
@pytest.mark.parametrize("version", [0, protocol.LEASE_VERSION + 1, 100])
def test_unknown_version_names_both(message: str, version: int) -> None:
    with pytest.raises(ProtocolError, match=rf"version {version} is not .*this is version {protocol.LEASE_VERSION}\)"):
        protocol.parse(message.format(version).encode())


def test_longest_page_fits_an_answer() -> None:
    ports = HostPorts("sctp", f"{':'.join(['ffff'] * 8)}%{'x' * 15}", 65535, 65535)
    line = protocol.encode_served(Serve(ports, Destination(":".join(["ffff"] * 8), 65535), Mode.SHARED))
    assert len(protocol.encode_answer("\n".join([line] * protocol.PAGE))) < protocol.MAX_ANSWER_BYTES


@pytest.mark.parametrize(
    ("address", "canonical"),
    [
        ("0.0.0.0", "0.0.0.0"),
        ("2001:DB8:0:0::0:5", "2001:db8::5"),
        ("::ffff:c000:205", "::ffff:192.0.2.5"),
        ("fe80::0:5%eth0", "fe80::5%eth0"),
    ],
)
def test_canonical_address(address: str, canonical: str) -> None:
    assert protocol.canonical(address) == canonical


@given(ADDRESSES | ZONED)
def test_canonical_address_is_the_kernels(address: str) -> None:
    plain, _, zone = protocol.canonical(address).partition("%")
    family = socket.AF_INET6 if ":" in plain else socket.AF_INET
    assert socket.inet_ntop(family, socket.inet_pton(family, address.partition("%")[0])) == plain
    assert zone == address.partition("%")[2]
