"""Valid networks, alone and beside others; the addresses that they allocate."""

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.addressing import first_gateway, free_address, free_subnets
from gangway.errors import Conflict, InvalidRequest
from gangway.model import Address, Network, Subnet, require_no_conflict

PRIVATE = IPv4Network("10.201.0.0/16")
GLOBAL_IDS = st.binary(min_size=5, max_size=5)


def network(
    subnet: str = "172.30.0.0/24", name: str = "web", bridge: str = "gw-web", gateway: str = "", mtu: int = 1500
) -> Network:
    subnets = tuple(ip_network(text) for text in subnet.split(","))
    gateways = (ip_address(gateway),) if gateway else tuple(first_gateway(each) for each in subnets)
    return Network(name, bridge, subnets, gateways, mtu=mtu)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"name": "we b"}, "invalid network name 'we b': use letters, digits, '_', '.' and '-'"),
        ({"name": ""}, "invalid network name ''"),
        ({"bridge": "a" * 16}, "longer than 15"),
        ({"bridge": "a/b"}, "invalid bridge name"),
        ({"bridge": ".."}, "invalid bridge name"),
        ({"bridge": ""}, "invalid bridge name"),
        # Rules contain the bridge's name: there a quote would end it, and + and * are wildcards.
        ({"bridge": 'a"b'}, "invalid bridge name"),
        ({"bridge": "gw+"}, "invalid bridge name"),
        ({"bridge": "gw*"}, "invalid bridge name"),
        ({"gateway": "172.31.0.1"}, "gateway 172.31.0.1 is not in subnet 172.30.0.0/24"),
        ({"gateway": "172.30.0.0"}, "is not a host address of 172.30.0.0/24"),
        ({"gateway": "172.30.0.255"}, "is not a host address of 172.30.0.0/24"),
        ({"subnet": "172.30.0.0/31"}, "no room"),
        ({"subnet": "172.30.0.0/32"}, "no room"),
        ({"subnet": "172.30.0.0/24,172.31.0.0/24"}, "one subnet of IPv4, one of IPv6, or both"),
        ({"mtu": 67}, "MTU 67 is out of range for network web (68 to 65535)"),
        ({"mtu": 65536}, "68 to 65535"),
        ({"mtu": 1279, "subnet": "fd30::/64"}, "1280 to 65535"),
    ],
)
def test_invalid_network_is_refused_with_the_reason(wrong: dict[str, str | int], why: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        network(**wrong)  # type: ignore[arg-type]  # each is one of network's own
    assert why in str(refusal.value)


def test_networks_must_not_share_name_bridge_or_addresses() -> None:
    web = network("172.30.0.0/24,fd30::/64")
    require_no_conflict(web, ())
    require_no_conflict(network("172.31.0.0/24,fd31::/64", "db", "gw-db"), (web,))
    for other, why in (
        (network("172.31.0.0/24", "web", "gw-db"), "network web exists already"),
        (network("172.31.0.0/24", "db", "gw-web"), "bridge gw-web belongs to network web already"),
        (network("172.30.0.0/16", "db", "gw-db"), "subnet 172.30.0.0/16 overlaps 172.30.0.0/24 of network web"),
        (network("fd30::/48", "db", "gw-db"), "subnet fd30::/48 overlaps fd30::/64 of network web"),
    ):
        with pytest.raises(Conflict, match=why):
            require_no_conflict(other, (network("172.29.0.0/24", "first", "gw-first"), web))


def test_addresses_are_allocated_in_order_until_none_is_left() -> None:
    small = network("172.30.0.0/29", gateway="172.30.0.2")
    allocated: set[Address] = set()
    for _ in range(5):
        allocated.add(free_address(small, small.subnets[0], frozenset(allocated)))
    assert sorted(map(str, allocated)) == [f"172.30.0.{number}" for number in (1, 3, 4, 5, 6)]
    with pytest.raises(Conflict, match="network web has no free address left in"):
        free_address(small, small.subnets[0], frozenset(allocated))


def test_network_is_checked_against_all_others() -> None:
    others = [network(f"172.{number}.0.0/24", f"n{number}", f"gw-n{number}") for number in range(16, 20)]
    with pytest.raises(Conflict, match="of network n19"):
        require_no_conflict(network("172.19.0.128/25"), iter(others))


def test_default_gateway_is_the_first_address() -> None:
    assert first_gateway(ip_network("172.30.0.0/24")) == ip_address("172.30.0.1")
    assert first_gateway(ip_network("fd30::/64")) == ip_address("fd30::1")
    assert first_gateway(ip_network("172.30.0.7/32")) == ip_address("172.30.0.7")


def test_first_private_subnet_is_allocated_on_an_empty_host() -> None:
    four, six = free_subnets((), bytes(range(1, 6)))
    assert (str(four), str(six)) == ("10.201.0.0/24", "fd01:203:405::/64")


def _subnets_in_use() -> Iterator[Subnet]:
    """Yield subnets in use: some in the range that gangway allocates from, of any size, and some outside it."""
    yield from (ip_network(f"10.201.{number}.0/24") for number in range(6))
    yield from map(ip_network, ("10.201.1.16/28", "10.201.4.0/22", "10.201.0.77/32", "172.30.0.0/24", "fd30::/64"))


@given(st.sets(st.sampled_from(list(_subnets_in_use()))), GLOBAL_IDS)
def test_allocated_subnets_are_free_and_private_and_make_a_network(used: set[Subnet], global_id: bytes) -> None:
    four, six = free_subnets(used, global_id)
    assert isinstance(four, IPv4Network)
    assert four.subnet_of(PRIVATE)
    assert not any(four.overlaps(other) for other in used if isinstance(other, IPv4Network))
    assert isinstance(six, IPv6Network)
    assert six.subnet_of(IPv6Network("fd00::/8"))
    assert six.network_address.packed[1:6] == global_id
    made = Network("gangway0", "gangway0", (four, six), (first_gateway(four), first_gateway(six)))
    assert [subnet.prefixlen for subnet in made.subnets] == [24, 64]


def test_without_a_free_private_subnet_the_user_has_to_name_one() -> None:
    assert free_subnets((IPv4Network("10.201.0.0/17"),), bytes(5))[0] == ip_network("10.201.128.0/24")
    with pytest.raises(Conflict, match="--subnet"):
        free_subnets((IPv4Network("10.0.0.0/8"),), bytes(5))
