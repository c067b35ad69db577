"""A plan as iptables rules: the whole text of some plans, the article's listings, and which rules match a client."""

from dataclasses import replace
from ipaddress import IPv4Network, collapse_addresses, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables.render import matching_rules, render, rules_of
from gangway.firewall.iptables.tables import Table, are_listed, batch, built_in, chain_of, parse_listing
from gangway.model import Endpoint, Network, PortMapping, Protocol
from gangway.plan import Origin, Plan, Road, assemble, plan_mapping
from tests.unit.golden import FOLDER, assert_golden
from tests.unit.samples import (
    APART,
    BACK,
    FACTS,
    FORMS,
    FOUR,
    INNER,
    IPTABLES,
    NETWORKS,
    RESTRICTED,
    ROUTED,
    ROUTED_NETWORKS,
    WEB,
    admitting,
    held,
    mapping,
    planned,
    whole,
)

SUBNETS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, 32),
)
PREFIX, DOCKER = "GANGWAY", "DOCKER"
DOCKERS = HostFacts(Firewall.IPTABLES, own_bridge=False)
PLANS: dict[str, Plan] = {
    "one": whole(IPTABLES, mapping("0.0.0.0", "8000", "80"), networks=(FOUR,)),
    "forms": whole(IPTABLES, *FORMS, networks=(BACK, INNER)),
    "unrouted": whole(
        HostFacts(Firewall.IPTABLES, forwarding=frozenset(), may_forward=False), mapping("192.0.2.5"), networks=(WEB,)
    ),
    "restricted": whole(IPTABLES, *RESTRICTED),
    "routed": whole(IPTABLES, *ROUTED, networks=ROUTED_NETWORKS),
}


def article() -> dict[str, list[str]]:
    """Return the rules in the article "The docker-proxy", by listing: `TABLE CHAIN …`."""
    listings: dict[str, list[str]] = {}
    for line in (FOLDER / "article.iptables").read_text().splitlines():
        if line.startswith("# "):
            rules = listings.setdefault(line[2:], [])
        else:
            rules.append(line)
    return listings


def dockers_plan() -> Plan:
    """Return the article's host: docker0, and a container whose port 8000 is published."""
    docker0 = Network("bridge", "docker0", (ip_network("172.17.0.0/16"),), (ip_address("172.17.0.1"),))
    box = Endpoint("box", "bridge", (ip_address("172.17.0.2"),))
    published = plan_mapping(mapping("0.0.0.0", "8000"), box, docker0, DOCKERS)
    return assemble((docker0,), frozenset(), (published,), DOCKERS)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", PLANS)
def test_whole_text(name: str, family: int) -> None:
    assert_golden(f"{name}{family}.iptables", batch(render(PLANS[name], family, PREFIX), (), {}))


@given(APART, NETWORKS, FACTS, st.sampled_from((4, 6)))
def test_redirect_does_not_change_the_rules(
    many: list[PortMapping], network: Network, facts: HostFacts, family: int
) -> None:
    """It serves the connections that no rule does."""
    able, unable = (whole(replace(facts, no_redirect=why), *many, networks=(network,)) for why in ("", "why not"))
    assert render(able, family, PREFIX) == render(unable, family, PREFIX)


@pytest.mark.parametrize("listing", article())
def test_dockers_prefix_renders_the_articles_listing(listing: str) -> None:
    name, *chains = listing.split()
    (table,) = (table for table in render(dockers_plan(), 4, DOCKER) if table.name == name)
    assert [rule for chain in chains for rule in table.rules if chain_of(rule) == chain] == article()[listing]


def test_nat_and_filter_have_only_the_articles_rules() -> None:
    tables = {table.name: table for table in render(dockers_plan(), 4, DOCKER)}
    for name in ("nat", "filter"):
        listed = [rule for listing, rules in article().items() if listing.startswith(name) for rule in rules]
        assert sorted(tables[name].rules) == sorted(listed)


def test_mappings_without_nat_have_no_rules() -> None:
    for family in (4, 6):
        text = "".join(rule for table in render(PLANS["forms"], family, PREFIX) for rule in table.rules)
        assert not [port for port in ("6000", "6001", "6005") if port in text]


@pytest.mark.parametrize(("family", "loopback"), [(4, "127.0.0.0/8"), (6, "::1/128")])
def test_first_packets_of_tcp_mappings_get_timeouts(family: int, loopback: str) -> None:
    ports = mapping("0.0.0.0", "8000"), mapping("::", "8000"), mapping("0.0.0.0", "53", protocol=Protocol.UDP)
    raw, *_ = render(whole(IPTABLES, *ports), family, PREFIX, timeouts=True)
    first = "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m addrtype --dst-type LOCAL"
    assert raw.rules[1:] == (
        f"-A PREROUTING {first} -j {PREFIX}",
        f"-A OUTPUT ! -d {loopback} {first} -j {PREFIX}",
        f"-A {PREFIX} -p tcp -m tcp --dport 8000 -j CT --timeout gw-{family}",
    )


@pytest.mark.parametrize(
    ("one", "match", "target"),
    [
        (mapping("0.0.0.0", "8000", "80"), "-p tcp -m tcp --dport 8000", "172.30.0.2:80"),
        (mapping("192.0.2.5", "8000", "80"), "-d 192.0.2.5/32 -p tcp -m tcp --dport 8000", "172.30.0.2:80"),
        (mapping("::", "8000", "80"), "-p tcp -m tcp --dport 8000", "[fd30::2]:80"),
        (mapping("2001:db8::5", "80"), "-d 2001:db8::5/128 -p tcp -m tcp --dport 80", "[fd30::2]:80"),
        (mapping("0.0.0.0", "70-79"), "-p tcp -m tcp --dport 70:79", "172.30.0.2"),
        (mapping("::", "70-79"), "-p tcp -m tcp --dport 70:79", "fd30::2"),
        (mapping("0.0.0.0", "70-79", "50-59"), "-p tcp -m tcp --dport 70:79", "172.30.0.2:50-59/70"),
        (mapping("::", "70-79", "50-59"), "-p tcp -m tcp --dport 70:79", "[fd30::2]:50-59/70"),
    ],
)
def test_a_mapping_has_a_rule_in_nat_and_one_in_filter(one: PortMapping, match: str, target: str) -> None:
    made = whole(IPTABLES, one)
    tables = {table.name: table for table in render(made, one.host_address.version, PREFIX)}
    assert tables["nat"].own[-1] == f"-A {PREFIX} {match} -j DNAT --to-destination {target}"
    address = ip_network(made.mappings[0].container_address)
    inner = str(one.container_ports).replace("-", ":")
    accepted, *rejected = tables["filter"].own
    assert accepted == f"-A {PREFIX} -d {address} -o gw-web -p tcp -m tcp --dport {inner} -j ACCEPT"
    start = f"-A {PREFIX} -s {address} -i gw-web -p tcp -m tcp --sport {inner} ! --tcp-flags FIN,SYN,RST,ACK SYN "
    is_kept = one.keeps_ports and one.host_address.is_unspecified
    assert [rule.startswith(start) for rule in rejected] == [True] * (not is_kept)


LEASED = replace(IPTABLES, leased=True)


PORT = "-p tcp -m tcp --dport 8000"
TO_PORT = f"-A INPUT ! -i lo {PORT} -m conntrack --ctstate NEW -j {PREFIX}"


def refusals(one: PortMapping, family: int, facts: HostFacts = LEASED) -> list[str]:
    """Return the rules for what comes in at a mapping's port, and is not translated; but those of invalid segments."""
    of_mapping = rules_of(planned(one, facts), family, PREFIX).get("mangle", [])
    return [rule for rule in of_mapping if "--ctstate INVALID" not in rule]


@pytest.mark.parametrize(
    ("one", "family", "sources"),
    [
        (admitting(held("0.0.0.0"), "10.0.0.0/8"), 4, [" -s 10.0.0.0/8"]),
        (admitting(held("0.0.0.0"), "0.0.0.0/1", "192.0.0.0/2"), 4, [" -s 0.0.0.0/1", " -s 192.0.0.0/2"]),
        (admitting(held("::"), "10.0.0.0/8"), 6, []),
        (admitting(held("::"), "::/0"), 6, [""]),
    ],
)
def test_other_clients_are_dropped_at_leased_ports(one: PortMapping, family: int, sources: list[str]) -> None:
    admitted = [f"-A {PREFIX}{source} {PORT} -j RETURN" for source in sources]
    dropped = f"-A {PREFIX} {PORT} -m conntrack --ctstate NEW -j DROP"
    assert refusals(one, family) == [TO_PORT, *admitted, dropped]
    assert refusals(one, family, IPTABLES) == []


@pytest.mark.parametrize(
    ("one", "family"),
    [
        (admitting(held("0.0.0.0"), "10.0.0.0/8"), 6),
        (held("0.0.0.0"), 4),
        (admitting(mapping("0.0.0.0"), "10.0.0.0/8"), 4),
        (admitting(held("fe80::5"), "fd00::/8"), 6),
    ],
)
def test_nobody_is_dropped_at_other_ports(one: PortMapping, family: int) -> None:
    assert refusals(one, family) == []


@given(st.lists(SUBNETS, min_size=1, max_size=64))
def test_refusals_take_a_rule_for_each_subnet(subnets: list[IPv4Network]) -> None:
    admitted = [*collapse_addresses(subnets)]
    one = admitting(held("0.0.0.0"), *map(str, admitted))
    assert len(refusals(one, 4)) == 2 + len(admitted)


def test_only_new_packets_to_the_host_get_to_the_refusals() -> None:
    """An internal network's rules, which are before them, leave new packets to the host alone."""
    internal = replace(WEB, internal=True)
    one = admitting(held("0.0.0.0"), "10.0.0.0/8")
    made = whole(LEASED, one, networks=(internal,))
    mangle = next(table for table in render(made, 4, PREFIX) if table.name == "mangle")
    leaving = f"-A {PREFIX} -i gw-web ! -o gw-web"
    invalid, elsewhere = (
        f"{leaving} -m conntrack --ctstate INVALID -j DROP",
        f"{leaving} -m addrtype ! --dst-type LOCAL -j DROP",
    )
    returned = f"-A {PREFIX} -m addrtype ! --dst-type LOCAL -j RETURN"
    excluded = f"-A {PREFIX} -d 192.0.2.9/32 -j RETURN"
    assert mangle.own[1:4] == (invalid, elsewhere, returned)
    assert excluded not in mangle.own
    facts = replace(LEASED, excluded=frozenset({ip_address("192.0.2.9")}))
    mangle = next(table for table in render(whole(facts, one), 4, PREFIX) if table.name == "mangle")
    assert mangle.own.index(excluded) < mangle.own.index(f"-A {PREFIX} -s 10.0.0.0/8 {PORT} -j RETURN")


@pytest.mark.parametrize("facts", [LEASED, replace(LEASED, forwarding=frozenset(), may_forward=False)])
def test_refusals_are_among_the_rules_that_match_what_the_relay_gets_by_an_interface(facts: HostFacts) -> None:
    found = planned(admitting(held("0.0.0.0"), "10.0.0.0/8"), facts)
    for route in found.routes:
        rules = [
            rule.removeprefix("mangle: ") for rule in matching_rules(found, route, WEB, PREFIX) if "mangle" in rule
        ]
        is_met = facts is not LEASED and route.origin in (Origin.REMOTE, Origin.CONTAINER)
        assert rules == (refusals(found.mapping, 4) if is_met else [])


def test_matching_rules_of_each_kind_of_client() -> None:
    found = planned(mapping("0.0.0.0", "8000", "80"), IPTABLES)
    loopback, host, remote, container, neighbour = (
        tuple(matching_rules(found, route, WEB, PREFIX)) for route in found.routes
    )
    translation = "nat: -A GANGWAY -p tcp -m tcp --dport 8000 -j DNAT --to-destination 172.30.0.2:80"
    assert loopback == ()
    assert host == ("nat: -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j GANGWAY", translation)
    assert remote == (
        "nat: -A PREROUTING -m addrtype --dst-type LOCAL -j GANGWAY",
        translation,
        "filter: -A FORWARD -o gw-web -j GANGWAY",
        "filter: -A GANGWAY -d 172.30.0.2/32 -o gw-web -p tcp -m tcp --dport 80 -j ACCEPT",
    )
    assert container == remote
    hairpin = "nat: -A POSTROUTING -s 172.30.0.0/24 -o gw-web -m conntrack --ctstate DNAT -j MASQUERADE"
    assert neighbour == (*remote, hairpin)


@given(APART, FACTS, st.sampled_from((PREFIX, DOCKER)))
def test_matching_rules_are_in_the_tables(many: list[PortMapping], facts: HostFacts, prefix: str) -> None:
    made = whole(facts, *many)
    there = {
        (family, f"{table.name}: {rule}")
        for family in (4, 6)
        for table in render(made, family, prefix)
        for rule in table.rules
    }
    for one in made.mappings:
        for route in one.routes:
            matching = list(matching_rules(one, route, WEB, prefix))
            assert bool(matching) == (route.road is Road.NAT)
            if not (route.neighbour and prefix == DOCKER):
                assert {(one.family, rule) for rule in matching} <= there


@given(APART, FACTS, st.sampled_from((4, 6)), st.sampled_from((PREFIX, DOCKER)))
def test_each_rule_is_in_our_chain_or_a_built_in_one(
    many: list[PortMapping], facts: HostFacts, family: int, prefix: str
) -> None:
    for table in render(whole(facts, *many), family, prefix):
        assert sorted((*table.own, *table.built_in)) == sorted(table.rules)
        assert all(rule.startswith(f"-A {prefix} ") for rule in table.own)
        assert table.has_chain or not table.own
    assert all(not table.own for table in built_in(render(whole(facts, *many), family, prefix)))


def test_a_family_has_only_its_own_addresses() -> None:
    for family, own, foreign in ((4, "172.31.0.2", "::"), (6, "fd31::2", "172.")):
        text = "\n".join(rule for table in render(PLANS["forms"], family, PREFIX) for rule in table.rules)
        assert own in text
        assert foreign not in text


def test_the_hosts_own_connections_are_translated_without_forwarding() -> None:
    (nat,) = (table for table in render(PLANS["unrouted"], 4, PREFIX) if table.name == "nat")
    assert not [rule for rule in nat.rules if chain_of(rule) == "PREROUTING"]
    found = planned(mapping("192.0.2.5"), PLANS["unrouted"].facts)
    assert [route.origin for route in found.routes if list(matching_rules(found, route, WEB, PREFIX))] == [Origin.HOST]


@pytest.mark.parametrize("forwarding", [frozenset({4, 6}), frozenset({6}), frozenset[int]()])
def test_closed_families_accept_frames_within_other_programs_bridges(forwarding: frozenset[int]) -> None:
    made = whole(HostFacts(Firewall.IPTABLES, forwarding=forwarding, foreign_bridges=("docker0", "virbr0")))
    passing = [f"-A FORWARD -i {bridge} -o {bridge} -j ACCEPT" for bridge in ("docker0", "virbr0")]
    for family in (4, 6):
        (found,) = (table for table in render(made, family, PREFIX) if table.name == "filter")
        assert [rule for rule in found.rules if rule in passing] == ([] if family in forwarding else passing)


def test_parse_listing() -> None:
    text = (
        "# Generated by iptables-save\n*nat\n:PREROUTING ACCEPT [1:60]\n:DOCKER - [0:0]\n"
        "-A PREROUTING -j DOCKER\nCOMMIT\n# Completed\n*filter\n:FORWARD DROP [0:0]\nCOMMIT\n"
    )
    found = parse_listing(text)
    assert set(found) == {"nat", "filter"}
    assert set(found["nat"]) == {":PREROUTING", ":DOCKER", "-A PREROUTING -j DOCKER"}
    assert set(found["filter"]) == {":FORWARD"}
    assert parse_listing("") == {}


def test_rules_are_listed_exactly() -> None:
    """Neither fewer nor more: of other rules only those in our own chain, and our former ones, count."""
    tables = (Table("nat", "X", ("-A OUTPUT -j X", "-A X -j RETURN")), Table("raw", "X", ("-A PREROUTING -j DROP",)))
    former = (Table("nat", "X", ("-A OUTPUT -j X", "-A POSTROUTING -j MASQUERADE")),)

    def listed(nat: str) -> bool:
        listing = parse_listing(f"*nat\n:X - [0:0]\n{nat}-A Y -j X\nCOMMIT\n*raw\n-A PREROUTING -j DROP\n")
        return are_listed(tables, former, listing)

    whole = "-A OUTPUT -j X\n-A X -j RETURN\n"
    assert listed(whole)
    assert listed(whole + "-A OUTPUT -j Y\n")
    assert not listed("-A OUTPUT -j X\n")
    assert not listed(whole + "-A X -j DROP\n")
    assert not listed(whole + "-A X -j RETURN\n")
    assert not listed(whole + "-A POSTROUTING -j MASQUERADE\n")
    assert not are_listed(tables, (), {})
    assert are_listed((), (), parse_listing("*filter\n-A OUTPUT -j X\n"))
