"""Clients on a further network of a container are masqueraded, and nobody else for it."""

from dataclasses import replace

import pytest

from gangway.facts import HostFacts
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.neighbours import Neighbours, further_neighbours
from gangway.plan import Origin, Plan, assemble
from gangway.reconcile.properties import Kind, of_veth
from tests.unit.samples import BACK, FOUR, INNER, IPTABLES, NFTABLES, WEB, endpoint, mapping, planned

FIRST, FURTHER = endpoint(WEB), replace(endpoint(BACK), is_first=False)
PORTS = planned(mapping("0.0.0.0", "8000", "80")), planned(mapping("::", "8000", "80"))


OF_BACK = frozenset(further_neighbours(FIRST, WEB, BACK))


def plan(facts: HostFacts, further: frozenset[Neighbours] = OF_BACK) -> Plan:
    return assemble((WEB, BACK), further, PORTS, facts)


def nft_rules(made: Plan) -> list[str]:
    return [f"{name}: {rule}" for name, (_, rules) in nftables.chains(made).items() for rule in rules]


def iptables_rules(made: Plan, prefix: str) -> list[str]:
    tables = (table for family in (4, 6) for table in iptables.render(made, family, prefix))
    return [f"{table.name}: {rule}" for table in tables for rule in table.rules]


def test_further_neighbours_are_of_the_families_of_the_first_address() -> None:
    four = replace(FIRST, addresses=FIRST.addresses[:1])
    (found,) = further_neighbours(four, WEB, BACK)
    assert (str(found.subnet), str(found.address), found.bridge) == ("172.31.0.0/24", "172.30.0.2", "gw-web")
    assert [str(one.subnet) for one in further_neighbours(FIRST, WEB, FOUR)] == ["172.28.0.0/24"]
    assert sorted(str(one.subnet) for one in OF_BACK) == ["172.31.0.0/24", "fd31::/64"]


def test_nft_elements() -> None:
    """The rules are the same: they name sets."""
    with_back, without = plan(NFTABLES), plan(NFTABLES, frozenset())
    assert nft_rules(with_back) == nft_rules(without)
    added, removed = nftables.change_further((), OF_BACK), nftables.change_further(OF_BACK, ())
    assert added.adds == {"further4": ["172.31.0.0/24 . 172.30.0.2"], "further6": ["fd31::/64 . fd30::2"]}
    assert removed == added.inverse()
    assert nftables.render(with_back) == nftables.render(without) + added.text()
    assert all(map(nftables.is_interval, added.adds))


@pytest.mark.parametrize("prefix", [iptables.DEFAULT_PREFIX, iptables.DOCKERS_PREFIX])
def test_iptables_rules(prefix: str) -> None:
    without = iptables_rules(plan(IPTABLES, frozenset()), prefix)
    assert [one for one in iptables_rules(plan(IPTABLES), prefix) if one not in without] == [
        "nat: -A POSTROUTING -s 172.31.0.0/24 -d 172.30.0.2/32 -o gw-web -m conntrack --ctstate DNAT -j MASQUERADE",
        "nat: -A POSTROUTING -s fd31::/64 -d fd30::2/128 -o gw-web -m conntrack --ctstate DNAT -j MASQUERADE",
    ]


def test_explain_shows_these_rules_for_containers_of_other_networks() -> None:
    there = iptables_rules(plan(IPTABLES), iptables.DEFAULT_PREFIX)
    further = [one for one in OF_BACK if one.subnet.version == 4]
    for route in PORTS[0].routes:
        by_nft = [*nftables.matching_rules(PORTS[0], route, WEB, 8000, further)]
        by_iptables = [*iptables.matching_rules(PORTS[0], route, WEB, iptables.DEFAULT_PREFIX, further)]
        of_further = [one for one in (*by_nft, *by_iptables) if "172.31.0.0/24" in one]
        assert len(of_further) == 2 * (route.origin is Origin.CONTAINER and not route.neighbour)
        for rule in of_further:
            text, _, elements = rule.partition(" { ")
            assert rule in there or (text in nft_rules(plan(NFTABLES)) and elements == "172.31.0.0/24 . 172.30.0.2 }")


def test_a_further_link_has_no_default_route() -> None:
    kinds = {
        one.is_first: {found.kind for found in of_veth("gw", "/run/netns/box", one, network)}
        for one, network in ((FIRST, WEB), (FURTHER, BACK))
    }
    assert kinds[True] - kinds[False] == {Kind.DEFAULT_ROUTE, Kind.LOOPBACK}
    assert Kind.ROUTE in kinds[False]
    of_internal = of_veth("gw", "/run/netns/box", endpoint(INNER), INNER)
    assert Kind.DEFAULT_ROUTE not in {one.kind for one in of_internal}
