"""Clients on a further network of a container are masqueraded, and nobody else for it."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gangway.facts import HostFacts
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.model import Endpoint
from gangway.neighbours import further_neighbours
from gangway.plan import Plan, assemble
from gangway.reconcile.properties import Kind, of_veth
from tests.unit.samples import BACK, FOUR, INNER, IPTABLES, NFTABLES, WEB, endpoint, mapping, planned

FIRST, FURTHER = endpoint(WEB), replace(endpoint(BACK), is_first=False)
PORTS = planned(mapping("0.0.0.0", "8000", "80")), planned(mapping("::", "8000", "80"))


def plan(facts: HostFacts, *endpoints: Endpoint) -> Plan:
    return assemble((WEB, BACK, FOUR), endpoints, PORTS, facts)


def nft_rules(made: Plan) -> list[str]:
    return [f"{name}: {rule}" for name, (_, rules) in nftables.chains(made).items() for rule in rules]


def iptables_rules(made: Plan, prefix: str) -> list[str]:
    tables = (table for family in (4, 6) for table in iptables.render(made, family, prefix))
    return [f"{table.name}: {rule}" for table in tables for rule in table.rules]


def test_a_first_network_has_no_further_neighbours() -> None:
    assert further_neighbours(plan(NFTABLES, FIRST, endpoint(BACK, "other"))) == ()


def test_further_neighbours_are_of_the_families_of_the_first_address() -> None:
    four = replace(FIRST, addresses=FIRST.addresses[:1])
    (found,) = further_neighbours(plan(NFTABLES, four, FURTHER))
    assert (str(found.subnet), str(found.address), found.bridge) == ("172.31.0.0/24", "172.30.0.2", "gw-web")
    on_both = further_neighbours(plan(NFTABLES, FIRST, replace(endpoint(FOUR), is_first=False), FURTHER))
    assert [str(one.subnet) for one in on_both] == ["172.28.0.0/24", "172.31.0.0/24", "fd31::/64"]


def test_the_order_of_endpoints_makes_no_difference() -> None:
    """Rules that are there are compared with those of a plan that was made later."""
    other = Endpoint("other", "back", (ip_address("172.31.0.3"),))
    endpoints = FIRST, FURTHER, other, replace(endpoint(WEB, "other"), is_first=False)
    assert further_neighbours(plan(NFTABLES, *endpoints)) == further_neighbours(plan(NFTABLES, *reversed(endpoints)))


def test_nft_rules() -> None:
    without = nft_rules(plan(NFTABLES, FIRST))
    assert [one for one in nft_rules(plan(NFTABLES, FIRST, FURTHER)) if one not in without] == [
        "postrouting: oifname @bridges ip saddr . ip daddr { 172.31.0.0/24 . 172.30.0.2 } ct status dnat masquerade",
        "postrouting: oifname @bridges ip6 saddr . ip6 daddr { fd31::/64 . fd30::2 } ct status dnat masquerade",
    ]


@pytest.mark.parametrize("prefix", [iptables.DEFAULT_PREFIX, iptables.DOCKERS_PREFIX])
def test_iptables_rules(prefix: str) -> None:
    without = iptables_rules(plan(IPTABLES, FIRST), prefix)
    assert [one for one in iptables_rules(plan(IPTABLES, FIRST, FURTHER), prefix) if one not in without] == [
        "nat: -A POSTROUTING -s 172.31.0.0/24 -d 172.30.0.2/32 -o gw-web -m conntrack --ctstate DNAT -j MASQUERADE",
        "nat: -A POSTROUTING -s fd31::/64 -d fd30::2/128 -o gw-web -m conntrack --ctstate DNAT -j MASQUERADE",
    ]


def test_explain_shows_these_rules_for_neighbours_only() -> None:
    by_nft, by_iptables = plan(NFTABLES, FIRST, FURTHER), plan(IPTABLES, FIRST, FURTHER)
    there = {*nft_rules(by_nft), *iptables_rules(by_iptables, iptables.DEFAULT_PREFIX)}
    further = [one for one in further_neighbours(by_nft) if one.subnet.version == 4]
    for route in PORTS[0].routes:
        found = [
            *nftables.matching_rules(PORTS[0], route, WEB, 8000, further),
            *iptables.matching_rules(PORTS[0], route, WEB, iptables.DEFAULT_PREFIX, further),
        ]
        of_further = [one for one in found if "172.31.0.0/24" in one]
        assert len(of_further) == 2 * route.neighbour
        assert set(of_further) <= there


def test_a_further_link_has_no_default_route() -> None:
    kinds = {
        one.is_first: {found.kind for found in of_veth("gw", "/run/netns/box", one, network)}
        for one, network in ((FIRST, WEB), (FURTHER, BACK))
    }
    assert kinds[True] - kinds[False] == {Kind.DEFAULT_ROUTE, Kind.LOOPBACK}
    assert Kind.ROUTE in kinds[False]
    of_internal = of_veth("gw", "/run/netns/box", endpoint(INNER), INNER)
    assert Kind.DEFAULT_ROUTE not in {one.kind for one in of_internal}
