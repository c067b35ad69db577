"""The setting `exclude`: which addresses it stands for, and that nothing is published there."""

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from gangway.daemon import config
from gangway.ebpf.keys import SteeringState
from gangway.errors import InvalidRequest
from gangway.exclusions import excluded_addresses
from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.model import PortMapping, Protocol
from gangway.plan import Origin, Road, SeenAs
from gangway.reach import origins_reaching, routes_to
from gangway.reasons import Code, Reason
from gangway.reconcile.state import ports_of, redirects_of, steered_of
from tests.unit.samples import NFTABLES, held, lease, mapping, planned, whole

VIP4, VIP6, LOOPBACK, LINK_LOCAL = "192.0.2.7", "2001:db8::7", "127.0.0.53", "fe80::7"
NAMED = VIP4, VIP6, LOOPBACK, LINK_LOCAL
ADDRESSES = frozenset(map(ip_address, NAMED))
FACTS = replace(NFTABLES, exclude=NAMED, excluded=ADDRESSES)
FOUND = [("eth0", ip_address("192.0.2.5")), ("eth1", ip_address(VIP4)), ("eth1", ip_address("fe80::7%eth1"))]


@pytest.mark.parametrize(
    ("exclude", "addresses"),
    [
        ((), ()),
        ((VIP4, "2001:DB8::7"), (VIP4, VIP6)),
        (("eth1",), (VIP4, LINK_LOCAL)),
        (("eth1", "192.0.2.5"), (VIP4, LINK_LOCAL, "192.0.2.5")),
        (("eth2",), ()),
    ],
)
def test_addresses_are_named_or_an_interfaces(exclude: tuple[str, ...], addresses: tuple[str, ...]) -> None:
    assert excluded_addresses(exclude, FOUND) == frozenset(map(ip_address, addresses))


@pytest.mark.parametrize("text", ["", "10.0.0.0/8", "10.0.0.256", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0", "a b"])
def test_wrong_value_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "gangway.toml"
    file.write_text(f'exclude = ["eth1", "{text}"]')
    with pytest.raises(InvalidRequest) as refused:
        config.load(file, {}, {})
    assert str(refused.value).startswith(f"{file}: invalid exclude {text!r}: ")
    assert "\n" not in str(refused.value)


def test_option_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gangway.toml"
    file.write_text('exclude = ["eth1"]')
    assert config.load(file, {}, {}).config.exclude == ("eth1",)
    assert config.load(file, {"exclude": ["10.0.0.5"]}, {}).config.exclude == ("10.0.0.5",)


@pytest.mark.parametrize("firewall", Firewall)
@pytest.mark.parametrize("at", NAMED)
@pytest.mark.parametrize("make", [mapping, lease])
def test_every_client_of_an_excluded_address_is_blocked(make: type, at: str, firewall: Firewall) -> None:
    address = ip_address(at)
    one = planned(make("::" if address.version == 6 else "0.0.0.0"), replace(FACTS, firewall=firewall))
    found = [*routes_to(one, address, 8000)]
    assert {route.origin for route in found} == {*origins_reaching(address)}
    assert {(route.road, route.reason, route.seen_as) for route in found} == {
        (Road.BLOCKED, Reason(Code.EXCLUDED), SeenAs.NOBODY)
    }


@pytest.mark.parametrize("at", ["192.0.2.5", "127.0.0.1"])
@pytest.mark.parametrize("origin", Origin)
def test_other_addresses_are_served_as_before(at: str, origin: Origin) -> None:
    def found(facts: HostFacts) -> list[object]:
        return [*routes_to(planned(mapping("0.0.0.0"), facts), ip_address(at), 8000, origin)]

    assert found(FACTS) == found(NFTABLES)


@pytest.mark.parametrize("at", NAMED)
@pytest.mark.parametrize("protocol", Protocol)
def test_mapping_of_an_address_that_was_excluded_later_has_nothing(protocol: Protocol, at: str) -> None:
    one = planned(mapping(at, protocol=protocol), FACTS)
    assert not [*ports_of(one), *steered_of(one), *redirects_of(one)]
    assert one.roads.used == {Road.BLOCKED}


@pytest.mark.parametrize(
    ("one", "is_steered"),
    [
        (mapping("0.0.0.0", protocol=Protocol.UDP), True),
        (mapping("192.0.2.5", protocol=Protocol.UDP), False),
        (mapping("0.0.0.0", protocol=Protocol.SCTP), False),
        (lease("0.0.0.0", protocol=Protocol.UDP), False),
    ],
)
def test_udp_port_at_all_addresses_leaves_excluded_ones_to_others(one: PortMapping, is_steered: bool) -> None:
    assert planned(one, FACTS).is_steered is is_steered
    assert not planned(one, NFTABLES).is_steered


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_port_that_dockerd_holds_there_stays_steered(protocol: Protocol) -> None:
    """For the program that refuses connections at excluded addresses."""
    found = planned(held(VIP4, "8000", protocol=protocol), FACTS)
    assert found.is_blocked
    assert [*ports_of(found), *redirects_of(found)] == []
    assert [state for _, state in steered_of(found)] == [SteeringState.HELD]


def test_rules_leave_excluded_addresses_before_they_look_for_a_port() -> None:
    plan = whole(FACTS, mapping("0.0.0.0"), mapping("::"))
    chains = nftables.chains(plan)
    for family, word, addresses in ((4, "ip", (LOOPBACK, VIP4)), (6, "ip6", (VIP6, LINK_LOCAL))):
        returns = [f"{word} daddr {address} return" for address in addresses]
        for name in (f"published{family}", "invalid"):
            rules = chains[name][1]
            places = [rules.index(rule) for rule in returns]
            assert max(places) < min(place for place, rule in enumerate(rules) if "@ports" in rule)
        for table in iptables.render(plan, family, "GANGWAY"):
            if table.name in ("nat", "mangle"):
                bits = 32 if family == 4 else 128
                places = [table.own.index(f"-A GANGWAY -d {address}/{bits} -j RETURN") for address in addresses]
                assert max(places) < table.own.index(next(rule for rule in table.own if "--dport 8000" in rule))
