"""Which road each kind of client gets, and why: every cell of the matrix, and what turns a cell."""

from ipaddress import ip_address

import pytest

from gangway.model import Network, Protocol
from gangway.plan import Code, Firewall, HostFacts, MappingPlan, Origin, Road, Source, asked_at, origins_of
from tests.unit.samples import BACK, FOUR, INNER, IPTABLES, NFTABLES, NONE, WEB, endpoint, mapping, planned, whole

WITH_RULES = (Firewall.NFTABLES, Firewall.IPTABLES)
# The columns: loopback, host, remote, a container of another network, one of the same network (or the very same).
COLUMNS = [*((origin, False) for origin in Origin), (Origin.CONTAINER, True)]
CELLS = {
    "e": (Road.BLOCKED, Source.NOBODY, Code.ELSEWHERE),
    "o": (Road.BLOCKED, Source.NOBODY, Code.LOOPBACK_ONLY),
    "L": (Road.RELAY, Source.GATEWAY, Code.LOOPBACK),
    "F": (Road.RELAY, Source.GATEWAY, Code.FAMILY),
    "K": (Road.RELAY, Source.GATEWAY, Code.LINK_LOCAL),
    "W": (Road.RELAY, Source.GATEWAY, Code.NO_FIREWALL),
    "n": (Road.NAT, Source.CLIENT, Code.TRANSLATED),
    "m": (Road.NAT, Source.GATEWAY, Code.MASQUERADED),
}
# Host address: with rules, with rules and a container of IPv4 only, without rules.
MATRIX = {
    "0.0.0.0": ("Lnnnm", "Lnnnm", "LWWWW"),
    "::": ("Lnnnm", "LFFFF", "LWWWW"),
    "127.0.0.1": ("Loooo", "Loooo", "Loooo"),
    "127.7.7.7": ("Loooo", "Loooo", "Loooo"),
    "::1": ("Loooo", "Loooo", "Loooo"),
    "192.0.2.5": ("ennnm", "ennnm", "eWWWW"),
    "169.254.0.5": ("ennnm", "ennnm", "eWWWW"),
    "2001:db8::5": ("ennnm", "eFFFF", "eWWWW"),
    "fe80::5": ("eKKKK", "eFFFF", "eWWWW"),
}


def codes(found: MappingPlan) -> list[Code]:
    return [route.reason.code for route in found.routes]


def turned(facts: HostFacts) -> list[list[Code]]:
    """Why each kind of client gets its road to 0.0.0.0, then to `::`."""
    return [codes(planned(mapping(at), facts)) for at in ("0.0.0.0", "::")]


USUAL = [Code.LOOPBACK, Code.TRANSLATED, Code.TRANSLATED, Code.TRANSLATED, Code.MASQUERADED]


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("firewall", Firewall)
@pytest.mark.parametrize("network", [WEB, FOUR], ids=["both", "ipv4"])
@pytest.mark.parametrize("at", MATRIX)
def test_every_cell_of_the_matrix(at: str, network: Network, firewall: Firewall, protocol: Protocol) -> None:
    both, only_four, none = MATRIX[at]
    cells = none if firewall is Firewall.NONE else both if network is WEB else only_four
    found = planned(mapping(at, protocol=protocol), HostFacts(firewall), network)
    assert [(route.origin, route.neighbour) for route in found.routes] == COLUMNS
    assert [(route.road, route.source, route.reason.code) for route in found.routes] == [CELLS[one] for one in cells]
    assert found.is_nat == bool(set(cells) & set("nm"))
    assert found.is_relayed == bool(set(cells) & set("LFKW"))


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_an_ipv4_client_of_a_container_with_ipv6_only_is_relayed(facts: HostFacts) -> None:
    only_six = Network("six", "gw-six", BACK.subnets[1:], BACK.gateways[1:])
    assert codes(planned(mapping("0.0.0.0"), facts, only_six)) == [Code.LOOPBACK, *[Code.FAMILY] * 4]
    assert codes(planned(mapping("::"), facts, only_six)) == USUAL


@pytest.mark.parametrize(
    ("at", "facts", "reasons"),
    [
        ("0.0.0.0", NFTABLES, ["127.0.0.0/8", "172.30.0.2 port 80", "172.30.0.2 port 80"]),
        ("::", NFTABLES, ["::1", "fd30::2 port 80", "fd30::2 port 80"]),
        ("127.0.0.1", NFTABLES, ["127.0.0.0/8", "127.0.0.1", "127.0.0.1"]),
        ("192.0.2.5", NFTABLES, ["192.0.2.5", "172.30.0.2 port 80", "172.30.0.2 port 80"]),
        ("fe80::5", NFTABLES, ["fe80::5", "fe80::5", "fe80::5"]),
        ("0.0.0.0", NONE, ["127.0.0.0/8", "", ""]),
    ],
)
def test_a_reason_comes_with_its_fact(at: str, facts: HostFacts, reasons: list[str]) -> None:
    found = planned(mapping(at, "8000", "80"), facts)
    loopback, host, *_, neighbour = found.routes
    assert [route.reason.fact for route in (loopback, host, neighbour)] == reasons


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_without_forwarding_only_the_host_is_translated(firewall: Firewall) -> None:
    off = HostFacts(firewall, forwarding=frozenset({6}), may_forward=False)
    relayed = [Code.LOOPBACK, Code.TRANSLATED, *[Code.NOT_FORWARDED] * 3]
    assert turned(off) == [relayed, USUAL]
    assert planned(mapping("0.0.0.0"), off).routes[2].reason.fact == "net.ipv4.ip_forward"
    off = HostFacts(firewall, forwarding=frozenset(), may_forward=False)
    assert turned(off) == [relayed, relayed]
    assert planned(mapping("::"), off).routes[2].reason.fact == "net.ipv6.conf.all.forwarding"


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_forwarding_that_may_be_switched_on_counts_as_on(firewall: Firewall) -> None:
    assert turned(HostFacts(firewall, forwarding=frozenset())) == [USUAL, USUAL]


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_where_others_drop_only_the_host_is_translated(firewall: Firewall) -> None:
    facts = HostFacts(firewall, forward_droppers=((6, "ip6 theirs drop"),))
    assert turned(facts) == [USUAL, [Code.LOOPBACK, Code.TRANSLATED, *[Code.FORWARD_DROPPED] * 3]]
    assert planned(mapping("::"), facts).routes[3].reason.fact == "ip6 theirs drop"
    assert (facts.dropper(4), facts.dropper(6)) == (None, "ip6 theirs drop")


def test_dockers_layout_leaves_the_own_bridge_to_the_relay() -> None:
    found = planned(mapping("0.0.0.0"), HostFacts(Firewall.IPTABLES, own_bridge=False))
    assert codes(found) == [*USUAL[:4], Code.OWN_BRIDGE]
    assert (found.routes[4].road, found.routes[4].reason.fact) == (Road.RELAY, "gw-web")


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_without_sockets_there_is_nat_or_nothing(firewall: Firewall) -> None:
    facts = HostFacts(firewall, missing=frozenset({Protocol.SCTP}))
    found = planned(mapping("0.0.0.0", protocol=Protocol.SCTP), facts)
    assert codes(found) == [Code.NO_SOCKETS, *USUAL[1:]]
    assert (found.routes[0].road, found.routes[0].source) == (Road.BLOCKED, Source.NOBODY)
    assert found.routes[0].reason.fact == "sctp"
    assert found.is_nat
    assert not found.is_relayed
    assert turned(facts) == [USUAL, USUAL], "tcp has nothing to do with it"


def test_without_sockets_and_rules_nobody_gets_anywhere() -> None:
    found = planned(
        mapping("192.0.2.5", protocol=Protocol.SCTP), HostFacts(Firewall.NONE, missing=frozenset({Protocol.SCTP}))
    )
    assert codes(found) == [Code.ELSEWHERE, *[Code.NO_SOCKETS] * 4]
    assert {route.road for route in found.routes} == {Road.BLOCKED}


def test_who_asks_a_link_local_address_is_relayed() -> None:
    found = planned(mapping("::"))
    asked = list(asked_at(found, ip_address("fe80::1")))
    assert [route.reason.code for route in asked] == [Code.LOOPBACK, *[Code.LINK_LOCAL] * 4]
    assert {route.reason.fact for route in asked[1:]} == {"fe80::1"}
    assert {(route.road, route.source) for route in asked} == {(Road.RELAY, Source.GATEWAY)}
    assert [(route.origin, route.neighbour) for route in asked] == COLUMNS


@pytest.mark.parametrize(("at", "asked"), [("::", "fd30::1"), ("0.0.0.0", "169.254.0.5"), ("192.0.2.5", "192.0.2.5")])
def test_who_asks_any_other_address_gets_the_road_that_was_planned(at: str, asked: str) -> None:
    found = planned(mapping(at))
    assert tuple(asked_at(found, ip_address(asked))) == found.routes


@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.0.3", "::1"])
def test_a_loopback_address_is_asked_by_loopback_alone(address: str) -> None:
    assert origins_of(ip_address(address)) == (Origin.LOOPBACK,)


@pytest.mark.parametrize("address", ["192.0.2.5", "fd30::1", "fe80::1"])
def test_any_other_address_is_asked_by_all_others(address: str) -> None:
    assert origins_of(ip_address(address)) == (Origin.HOST, Origin.REMOTE, Origin.CONTAINER)


def test_the_plan_of_a_mapping_says_where_it_leads() -> None:
    found = planned(mapping("::", "8000", "80"), of=BACK)
    assert (found.bridge, found.container_address, found.family) == ("gw-back", ip_address("fd31::2"), 6)
    assert planned(mapping("::"), of=FOUR).container_address == ip_address("172.28.0.2")
    assert planned(mapping("::"), of=FOUR).family == 6


def test_a_plan_holds_all_that_is_wanted() -> None:
    made = whole(NFTABLES, mapping("0.0.0.0"), mapping("::"), networks=(WEB, INNER))
    assert [one.network for one in made.networks] == [WEB, INNER]
    assert made.endpoints == (endpoint(WEB),)
    assert made.mappings == (planned(mapping("0.0.0.0")), planned(mapping("::")))
    assert made.facts is NFTABLES
