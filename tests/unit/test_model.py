"""What makes sense as a port mapping, a network, an endpoint; and `-p` as Docker reads it."""

from contextlib import suppress
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.model import (
    ANY,
    Address,
    Endpoint,
    Network,
    PortMapping,
    PortRange,
    PortRequest,
    Protocol,
    check_together,
    first_gateway,
    free_address,
    in_brackets,
    parse_port,
)

PORTS = st.integers(1, 65535)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: PortRange(min(pair), max(pair)))
ADDRESSES = st.ip_addresses()
PROTOCOLS = st.sampled_from(Protocol)


def ports(first: int, last: int | None = None) -> PortRange:
    return PortRange(first, last or first)


def network(
    subnet: str = "172.30.0.0/24", name: str = "web", bridge: str = "gw-web", gateway: str = "", mtu: int = 1500
) -> Network:
    subnets = tuple(ip_network(text) for text in subnet.split(","))
    gateways = (ip_address(gateway),) if gateway else tuple(first_gateway(each) for each in subnets)
    return Network(name, bridge, subnets, gateways, mtu=mtu)


def mapping(host: str, host_ports: PortRange, protocol: Protocol = Protocol.TCP) -> PortMapping:
    return PortMapping("c", protocol, ip_address(host), host_ports, host_ports)


# ---- -p ----


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
        ("8000-8010:80", PortRequest(Protocol.TCP, ANY, ports(8000, 8010), ports(80))),
        ("127.0.0.1:8000:80", PortRequest(Protocol.TCP, (ip_address("127.0.0.1"),), ports(8000), ports(80))),
        ("127.0.0.1::80/udp", PortRequest(Protocol.UDP, (ip_address("127.0.0.1"),), None, ports(80))),
        ("0.0.0.0:8000:80", PortRequest(Protocol.TCP, (ip_address("0.0.0.0"),), ports(8000), ports(80))),
        ("[::1]:8000:80", PortRequest(Protocol.TCP, (ip_address("::1"),), ports(8000), ports(80))),
        ("::1:8000:80", PortRequest(Protocol.TCP, (ip_address("::1"),), ports(8000), ports(80))),
        ("[::]::80", PortRequest(Protocol.TCP, (ip_address("::"),), None, ports(80))),
    ],
)
def test_a_port_is_read_as_docker_reads_it(text: str, wanted: PortRequest) -> None:
    assert parse_port(text) == wanted


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither a port nor a range"),
        ("8000:", "neither a port nor a range"),
        ("web:80", "'web' is neither a port nor a range"),
        ("8000:0", "0 is not a port"),
        ("65536:80", "65536 is not a port"),
        ("8000:80-70000", "70000 is not a port"),
        ("8010-8000:80", "8010-8000 is upside down: write 8000-8010"),
        ("8000-8001:80-82", "2 host ports and 80-82 are 3 container ports"),
        ("8000:80-82", "1 host ports and 80-82 are 3 container ports"),
        ("80-82", "no host ports for the range 80-82"),
        ("8000:80/icmp", "unknown protocol 'icmp': tcp, udp or sctp"),
        ("8000:80/tcp/udp", "unknown protocol 'tcp/udp'"),
        ("1.2.3:8000:80", "'1.2.3' is not an address"),
        ("[127.0.0.1:8000:80", "'[127.0.0.1' is not an address"),
        ("localhost:8000:80", "'localhost' is not an address"),
        ("+8000:80", "neither a port nor a range"),
        ("8000:٨٠", "neither a port nor a range"),
    ],
)
def test_a_port_that_makes_no_sense_is_named(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_port(text)
    assert str(refusal.value).startswith(f"-p {text}: ")
    assert why in str(refusal.value)


@given(st.text(alphabet="0123456789:.-/[]tcpud") | st.text())
def test_whatever_is_typed_is_read_or_named(text: str) -> None:
    with suppress(InvalidRequest):
        request = parse_port(text)
        assert request.is_choice or request.host_ports is not None


@given(PROTOCOLS, ADDRESSES, RANGES, RANGES)
def test_a_mapping_that_is_printed_can_be_read(
    protocol: Protocol, address: object, host: PortRange, container: PortRange
) -> None:
    host_address = ip_address(str(address).partition("%")[0])
    container = PortRange(container.first, min(container.last, container.first + host.count - 1))
    host = PortRange(host.first, host.first + container.count - 1)
    made = PortMapping("c", protocol, host_address, host, container)
    read = parse_port(str(made))
    assert (read.protocol, read.host_addresses) == (protocol, (host_address,))
    assert (read.host_ports, read.container_ports) == (host, container)
    assert not read.is_choice


@given(RANGES, RANGES)
def test_ranges_overlap_when_a_port_is_in_both(one: PortRange, other: PortRange) -> None:
    common = range(max(one.first, other.first), min(one.last, other.last) + 1)
    assert one.overlaps(other) == other.overlaps(one) == bool(common)
    assert PortRange.parse(str(one)) == one


def test_unequal_ranges_are_no_mapping() -> None:
    with pytest.raises(InvalidRequest):
        PortMapping("c", Protocol.TCP, ANY[0], ports(1, 2), ports(1))


@pytest.mark.parametrize(
    ("one", "other", "collide"),
    [
        (mapping("0.0.0.0", ports(80)), mapping("10.0.0.1", ports(80)), True),
        (mapping("10.0.0.1", ports(80)), mapping("10.0.0.2", ports(80)), False),
        (mapping("10.0.0.1", ports(80, 90)), mapping("10.0.0.1", ports(90, 99)), True),
        (mapping("10.0.0.1", ports(80, 89)), mapping("10.0.0.1", ports(90, 99)), False),
        (mapping("0.0.0.0", ports(80)), mapping("::", ports(80)), False),
        (mapping("::", ports(80)), mapping("fd00::1", ports(80)), True),
        (mapping("0.0.0.0", ports(80)), mapping("0.0.0.0", ports(80), Protocol.UDP), False),
    ],
)
def test_mappings_collide_on_an_address_in_common(one: PortMapping, other: PortMapping, collide: bool) -> None:
    assert one.collides(other) == other.collides(one) == collide


# ---- networks ----


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"name": "we b"}, "no name for a network"),
        ({"name": ""}, "no name for a network"),
        ({"bridge": "a" * 16}, "longer than 15"),
        ({"bridge": "a/b"}, "no name for an interface"),
        ({"bridge": ".."}, "no name for an interface"),
        ({"gateway": "172.31.0.1"}, "172.31.0.1 is not in 172.30.0.0/24"),
        ({"gateway": "172.30.0.0"}, "not an address for a host"),
        ({"gateway": "172.30.0.255"}, "not an address for a host"),
        ({"subnet": "172.30.0.0/31"}, "no room"),
        ({"subnet": "172.30.0.0/32"}, "no room"),
        ({"subnet": "172.30.0.0/24,172.31.0.0/24"}, "one subnet of IPv4, one of IPv6, or both"),
        ({"mtu": 67}, "68 to 65535"),
        ({"mtu": 65536}, "68 to 65535"),
        ({"mtu": 1279, "subnet": "fd30::/64"}, "1280 to 65535"),
    ],
)
def test_a_network_that_makes_no_sense_is_named(wrong: dict[str, str | int], why: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        network(**wrong)  # type: ignore[arg-type]  # each is one of network's own
    assert why in str(refusal.value)


def test_networks_have_nothing_in_common() -> None:
    web = network("172.30.0.0/24,fd30::/64")
    check_together((web, network("172.31.0.0/24,fd31::/64", "db", "gw-db")))
    for other, why in (
        (network("172.31.0.0/24", "web", "gw-db"), "there is a network web already"),
        (network("172.31.0.0/24", "db", "gw-web"), "network web has the bridge gw-web already"),
        (network("172.30.0.0/16", "db", "gw-db"), "subnet 172.30.0.0/16 overlaps 172.30.0.0/24 of network web"),
        (network("fd30::/48", "db", "gw-db"), "subnet fd30::/48 overlaps fd30::/64 of network web"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            check_together((web, other))


def test_addresses_are_given_in_order_until_there_are_none() -> None:
    small = network("172.30.0.0/29", gateway="172.30.0.2")
    given_out: set[Address] = set()
    for _ in range(5):
        given_out.add(free_address(small, small.subnets[0], frozenset(given_out)))
    assert sorted(map(str, given_out)) == [f"172.30.0.{number}" for number in (1, 3, 4, 5, 6)]
    with pytest.raises(InvalidRequest, match="network web has no free address left in"):
        free_address(small, small.subnets[0], frozenset(given_out))


def test_a_mapping_leads_to_an_address_of_its_own_family_if_there_is_one() -> None:
    four, six = ip_address("172.30.0.2"), ip_address("fd30::2")
    both, only_four = Endpoint("c", "web", (four, six)), Endpoint("c", "web", (four,))
    assert [both.address_for(address) for address in ANY] == [four, six]
    assert [only_four.address_for(address) for address in ANY] == [four, four]


def test_brackets_are_for_ipv6() -> None:
    assert [in_brackets(address) for address in ANY] == ["0.0.0.0", "[::]"]
