"""Valid port mappings; `-p` as Docker reads it; the address that a mapping leads to."""

import re
from contextlib import suppress
from ipaddress import ip_address

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.inet import format_host
from gangway.model import (
    ANY,
    Address,
    Endpoint,
    PortMapping,
    PortRange,
    PortRequest,
    Protocol,
    Source,
    parse_address,
    parse_port,
)

PORTS = st.integers(1, 65535)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: PortRange(min(pair), max(pair)))
ADDRESSES = st.ip_addresses()
PROTOCOLS = st.sampled_from(Protocol)


def ports(first: int, last: int | None = None) -> PortRange:
    return PortRange(first, last or first)


def mapping(host: str, host_ports: PortRange, protocol: Protocol = Protocol.TCP) -> PortMapping:
    return PortMapping("c", protocol, ip_address(host), host_ports, host_ports)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("80", PortRequest(Protocol.TCP, ANY, None, ports(80))),
        (":80", PortRequest(Protocol.TCP, ANY, None, ports(80))),
        ("0:80", PortRequest(Protocol.TCP, ANY, None, ports(80))),
        ("8000:80", PortRequest(Protocol.TCP, ANY, ports(8000), ports(80))),
        ("8000:80/udp", PortRequest(Protocol.UDP, ANY, ports(8000), ports(80))),
        ("8000:80/SCTP", PortRequest(Protocol.SCTP, ANY, ports(8000), ports(80))),
        ("8000-8002:80-82", PortRequest(Protocol.TCP, ANY, ports(8000, 8002), ports(80, 82))),
        ("80-82", PortRequest(Protocol.TCP, ANY, None, ports(80, 82))),
        ("8000-8010:80", PortRequest(Protocol.TCP, ANY, ports(8000, 8010), ports(80))),
        ("127.0.0.1:8000:80", PortRequest(Protocol.TCP, (ip_address("127.0.0.1"),), ports(8000), ports(80))),
        ("127.0.0.1::80/udp", PortRequest(Protocol.UDP, (ip_address("127.0.0.1"),), None, ports(80))),
        ("0.0.0.0:8000:80", PortRequest(Protocol.TCP, (ip_address("0.0.0.0"),), ports(8000), ports(80))),
        ("[::1]:8000:80", PortRequest(Protocol.TCP, (ip_address("::1"),), ports(8000), ports(80))),
        ("::1:8000:80", PortRequest(Protocol.TCP, (ip_address("::1"),), ports(8000), ports(80))),
        ("[::]::80", PortRequest(Protocol.TCP, (ip_address("::"),), None, ports(80))),
    ],
)
def test_port_is_parsed_as_docker_parses_it(text: str, wanted: PortRequest) -> None:
    assert parse_port(text) == wanted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no container port"),
        ("8000:", "no container port after the colon"),
        ("80::", "no container port after the colon"),
        ("8000:x", "'x' is not a port or a range of ports"),
        ("web:80", "'web' is not a port or a range"),
        ("8000:0", "port 0 is out of range (1 to 65535)"),
        ("65536:80", "port 65536 is out of range"),
        ("8000:80-70000", "port 70000 is out of range"),
        ("8010-8000:80", "8010-8000 is reversed: write 8000-8010"),
        ("8000-8001:80-82", "2 host ports for 3 container ports; for example 8000-8002:80-82"),
        ("10.0.0.1:8000:80-82/udp", "1 host port for 3 container ports; for example 10.0.0.1:8000-8002:80-82/udp"),
        ("[fd00::1]:8000:80-82/sctp", "1 host port for 3 container ports; for example [fd00::1]:8000-8002:80-82/sctp"),
        ("8000:80-82", "1 host port for 3 container ports; for example 8000-8002:80-82"),
        ("65535:80-82", "1 host port for 3 container ports"),
        ("8000:80/icmp", "unknown protocol 'icmp': use tcp, udp or sctp"),
        ("8000:80/tcp/udp", "unknown protocol 'tcp/udp'"),
        ("1.2.3:8000:80", "'1.2.3' is not an IP address"),
        ("[127.0.0.1:8000:80", "'[127.0.0.1' is not an IP address"),
        ("localhost:8000:80", "'localhost' is not an IP address"),
        ("+8000:80", "not a port or a range"),
        ("8000:٨٠", "not a port or a range"),
    ],
)
def test_invalid_port_is_quoted_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_port(text)
    assert str(refusal.value).startswith(f"invalid -p {text!r}: ")
    assert why in str(refusal.value)


@given(st.text(alphabet="0123456789:.-/[]tcpud") | st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with suppress(InvalidRequest):
        request = parse_port(text)
        assert request.is_choice or request.host_ports is not None


@given(PROTOCOLS, ADDRESSES, RANGES, RANGES)
def test_printed_mapping_can_be_parsed(
    protocol: Protocol, address: object, host: PortRange, container: PortRange
) -> None:
    host_address = ip_address(str(address).partition("%")[0])
    assume(not host_address.is_multicast and not getattr(host_address, "ipv4_mapped", None))
    assume(host_address != ip_address("255.255.255.255"))
    container = PortRange(container.first, min(container.last, container.first + host.count - 1))
    host = PortRange(host.first, host.first + container.count - 1)
    made = PortMapping("c", protocol, host_address, host, container)
    read = parse_port(str(made))
    assert (read.protocol, read.host_addresses) == (protocol, (host_address,))
    assert (read.host_ports, read.container_ports) == (host, container)
    assert not read.is_choice


@given(RANGES)
def test_printed_range_can_be_parsed(one: PortRange) -> None:
    assert PortRange.parse(str(one)) == one


def test_mapping_of_unequal_ranges_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        PortMapping("c", Protocol.TCP, ANY[0], ports(1, 2), ports(1))


def test_mapping_prefers_an_address_of_its_own_family() -> None:
    four, six = ip_address("172.30.0.2"), ip_address("fd30::2")
    both, only_four = Endpoint("c", "web", (four, six)), Endpoint("c", "web", (four,))
    assert [both.address_for(address) for address in ANY] == [four, six]
    assert [only_four.address_for(address) for address in ANY] == [four, four]


def test_ipv6_addresses_are_put_in_brackets() -> None:
    assert [format_host(address) for address in ANY] == ["0.0.0.0", "[::]"]


@pytest.mark.parametrize(
    ("text", "wanted"), [("tcp", Protocol.TCP), ("UDP", Protocol.UDP), ("Sctp", Protocol.SCTP), ("TCP", Protocol.TCP)]
)
def test_protocol_is_parsed_in_either_case(text: str, wanted: Protocol) -> None:
    assert Protocol.parse(text) is wanted


@pytest.mark.parametrize("text", ["", "icmp", " tcp", "tcp6", "6", "tcp\n"])
def test_unknown_protocol_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(InvalidRequest, match="tcp, udp or sctp") as refusal:
        Protocol.parse(text)
    assert repr(text) in str(refusal.value)


@given(ADDRESSES.map(lambda address: ip_address(str(address).partition("%")[0])), st.booleans())
def test_address_is_parsed_with_or_without_brackets(address: Address, bracketed: bool) -> None:
    bracketed = bracketed and address.version == 6
    assert parse_address(f"[{address}]" if bracketed else str(address)) == address


@pytest.mark.parametrize("address", ["224.0.0.1", "239.255.255.255", "255.255.255.255", "ff02::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("source", Source)
def test_no_front_publishes_on_an_address_that_is_not_a_hosts(address: str, source: Source) -> None:
    port = PortRange(80, 80)
    with pytest.raises(InvalidRequest, match=f"{re.escape(str(ip_address(address)))} is an? "):
        PortMapping("c", Protocol.UDP, ip_address(address), port, port, source)
    with pytest.raises(InvalidRequest, match=f"invalid -p .*{re.escape(str(ip_address(address)))} is an? "):
        parse_port(f"[{address}]:80:80" if ":" in address else f"{address}:80:80")


def test_ipv4_addresses_have_no_brackets() -> None:
    with pytest.raises(InvalidRequest, match=r"write 0\.0\.0\.0 without brackets"):
        parse_port("[0.0.0.0]:80:80")


# A zone says which link an address is on; only link-local addresses need one (RFC 4007, 6).  It has to be an
# interface's name.
@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[::1",
        "::1]",
        "[[::1]]",
        "1.2.3",
        "1.2.3.4.5",
        "1.2.3.04",
        "localhost",
        "127.0.0.1/32",
        " ::1",
        "2001:db8::5%eth0",
        "fd30::2%0",
        "fe80::1%a; flush ruleset",
    ],
)
def test_invalid_address_is_quoted(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_address(text)
    assert str(refusal.value).startswith(f"{text!r} is not an IP address")


@pytest.mark.parametrize("zone", ["eth0", "gw-web", "br0.100", "2"])
def test_link_local_address_may_have_a_zone(zone: str) -> None:
    assert str(parse_address(f"[fe80::1%{zone}]")) == f"fe80::1%{zone}"


@given(RANGES, st.data())
def test_ports_of_a_mapping_are_paired_in_order(host: PortRange, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, 65535 - host.count + 1))
    container = PortRange(first, first + host.count - 1)
    made = PortMapping("c", Protocol.TCP, ANY[0], host, container)
    of_host, of_container = range(host.first, host.last + 1), range(container.first, container.last + 1)
    assert list(made.pairs()) == list(zip(of_host, of_container, strict=True))
    assert made.keeps_ports == all(one == other for one, other in made.pairs())


def test_request_for_any_host_ports_is_split() -> None:
    assert [str(one.container_ports) for one in parse_port("80-82").split_ports()] == ["80", "81", "82"]
    assert list(parse_port("8000-8002:80-82").split_ports()) == [parse_port("8000-8002:80-82")]
