"""Which road each kind of client takes, and why: every cell of the matrix, and the facts that change a cell."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gangway.facts import Firewall, HostFacts
from gangway.model import Network, Protocol
from gangway.plan import MappingPlan, Origin, Road, SeenAs
from gangway.reach import origins_reaching, routes_at
from gangway.reasons import Code, Reason
from tests.unit.samples import (
    BACK,
    FOUR,
    INNER,
    IPTABLES,
    NFTABLES,
    NO_CGROUPS,
    NO_RAW,
    NO_REDIRECT,
    NO_STEERING,
    NONE,
    SIX,
    WEB,
    held,
    lease,
    mapping,
    planned,
    whole,
)

WITH_RULES = (Firewall.NFTABLES, Firewall.IPTABLES)
# The columns: loopback, host, remote, a container of another network, a container of the same network.
COLUMNS = [*((origin, False) for origin in Origin), (Origin.CONTAINER, True)]
CELLS = {
    "e": (Road.BLOCKED, SeenAs.NOBODY, Code.ELSEWHERE),
    "o": (Road.BLOCKED, SeenAs.NOBODY, Code.LOOPBACK_ONLY),
    "r": (Road.REDIRECT, SeenAs.GATEWAY, Code.REDIRECTED),
    "4": (Road.REDIRECT, SeenAs.GATEWAY, Code.REDIRECTED_AS_IPV4),
    "L": (Road.RELAY, SeenAs.GATEWAY, Code.LOOPBACK),
    "x": (Road.RELAY, SeenAs.GATEWAY, Code.NO_REDIRECT),
    "F": (Road.RELAY, SeenAs.GATEWAY, Code.FAMILY),
    "K": (Road.RELAY, SeenAs.GATEWAY, Code.LINK_LOCAL),
    "W": (Road.RELAY, SeenAs.GATEWAY, Code.NO_FIREWALL),
    "n": (Road.NAT, SeenAs.CLIENT, Code.TRANSLATED),
    "m": (Road.NAT, SeenAs.GATEWAY, Code.MASQUERADED),
    "l": (Road.RELAY, SeenAs.GATEWAY, Code.LEASE),
}
# Host address: with rules, then without; and for each a container of both families, of IPv4 only, of IPv6 only.
MATRIX = {
    "0.0.0.0": (("rnnnm", "rnnnm", "FFFFF"), ("rrWWW", "rrWWW", "FWWWW")),
    "::": (("rnnnm", "4FFFF", "rnnnm"), ("rrWWW", "44WWW", "rrWWW")),
    "127.0.0.1": (("roooo", "roooo", "Foooo"), ("roooo", "roooo", "Foooo")),
    "127.7.7.7": (("roooo", "roooo", "Foooo"), ("roooo", "roooo", "Foooo")),
    "::1": (("roooo", "4oooo", "roooo"), ("roooo", "4oooo", "roooo")),
    "192.0.2.5": (("ennnm", "ennnm", "eFFFF"), ("erWWW", "erWWW", "eWWWW")),
    "169.254.0.5": (("ennnm", "ennnm", "eFFFF"), ("erWWW", "erWWW", "eWWWW")),
    "2001:db8::5": (("ennnm", "eFFFF", "ennnm"), ("erWWW", "e4WWW", "erWWW")),
    "fe80::5": (("eKKKK", "eFFFF", "eKKKK"), ("eWWWW", "eWWWW", "eWWWW")),
}
# How the first cell, and any other, changes where sockets are not redirected.
NEVER = str.maketrans("r4", "LL"), str.maketrans("r4", "WW")
LACKING = str.maketrans("r4", "xx"), str.maketrans("r4", "WW")


def codes(found: MappingPlan) -> list[Code]:
    return [route.reason.code for route in found.routes]


def codes_of_both_families(facts: HostFacts) -> list[list[Code]]:
    """Return the reasons for the roads to 0.0.0.0, and to `::`."""
    return [codes(planned(mapping(at), facts)) for at in ("0.0.0.0", "::")]


USUAL = [Code.REDIRECTED, Code.TRANSLATED, Code.TRANSLATED, Code.TRANSLATED, Code.MASQUERADED]


@pytest.mark.parametrize("lacking", ["", NO_CGROUPS], ids=["redirect", "no redirect"])
@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("firewall", Firewall)
@pytest.mark.parametrize("network", [WEB, FOUR, SIX], ids=["both", "ipv4", "ipv6"])
@pytest.mark.parametrize("at", MATRIX)
def test_every_cell_of_the_matrix(
    at: str, network: Network, firewall: Firewall, protocol: Protocol, lacking: str
) -> None:
    cells = MATRIX[at][firewall is Firewall.NONE][(WEB, FOUR, SIX).index(network)]
    if protocol is Protocol.SCTP or lacking:
        first, other = NEVER if protocol is Protocol.SCTP else LACKING
        cells = cells[0].translate(first) + cells[1:].translate(other)
    found = planned(mapping(at, protocol=protocol), HostFacts(firewall, no_redirect=lacking), network)
    assert [(route.origin, route.neighbour) for route in found.routes] == COLUMNS
    assert [(route.road, route.seen_as, route.reason.code) for route in found.routes] == [CELLS[one] for one in cells]
    assert found.is_nat == bool(set(cells) & set("nm"))
    assert found.is_redirected == bool(set(cells) & set("r4"))
    assert found.is_relayed == bool(set(cells) & set("LxFKW"))


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_ipv4_client_of_an_ipv6_only_container_is_relayed(facts: HostFacts) -> None:
    """An IPv4 socket cannot be connected to an IPv6 address."""
    found = planned(mapping("0.0.0.0"), facts, SIX)
    assert codes(found) == [Code.FAMILY] * 5
    assert {(route.road, route.reason.fact) for route in found.routes} == {(Road.RELAY, "fd28::2")}
    assert codes(planned(mapping("::"), facts, SIX)) == USUAL


@pytest.mark.parametrize("lacking", ["", NO_CGROUPS], ids=["redirect", "no redirect"])
def test_sctp_sockets_are_never_redirected(lacking: str) -> None:
    """They run no program when they connect."""
    for at in MATRIX:
        for firewall in Firewall:
            facts = HostFacts(firewall, no_redirect=lacking)
            assert not planned(mapping(at, protocol=Protocol.SCTP), facts).is_redirected
    assert codes(planned(mapping("0.0.0.0", protocol=Protocol.SCTP)))[0] is Code.LOOPBACK


@pytest.mark.parametrize(
    ("at", "facts", "reasons"),
    [
        ("0.0.0.0", NFTABLES, ["172.30.0.2 port 80", "172.30.0.2 port 80", "172.30.0.2 port 80"]),
        ("::", NFTABLES, ["fd30::2 port 80", "fd30::2 port 80", "fd30::2 port 80"]),
        ("127.0.0.1", NFTABLES, ["172.30.0.2 port 80", "127.0.0.1", "127.0.0.1"]),
        ("::1", NO_REDIRECT, [NO_CGROUPS, "::1", "::1"]),
        ("192.0.2.5", NFTABLES, ["192.0.2.5", "172.30.0.2 port 80", "172.30.0.2 port 80"]),
        ("fe80::5", NFTABLES, ["fe80::5", "fe80::5", "fe80::5"]),
        ("0.0.0.0", NONE, ["172.30.0.2 port 80", "172.30.0.2 port 80", ""]),
        ("0.0.0.0", replace(NONE, no_redirect=NO_CGROUPS), [NO_CGROUPS, "", ""]),
    ],
)
def test_reasons_have_their_facts(at: str, facts: HostFacts, reasons: list[str]) -> None:
    found = planned(mapping(at, "8000", "80"), facts)
    loopback, host, *_, neighbour = found.routes
    assert [route.reason.fact for route in (loopback, host, neighbour)] == reasons


@pytest.mark.parametrize(("at", "fact"), [("0.0.0.0", "127.0.0.0/8"), ("127.0.0.1", "127.0.0.0/8"), ("::", "::1")])
def test_sctp_by_loopback_names_the_addresses_that_are_not_routed(at: str, fact: str) -> None:
    assert planned(mapping(at, protocol=Protocol.SCTP)).routes[0].reason.fact == fact


@pytest.mark.parametrize(
    ("at", "network", "target"),
    [
        ("0.0.0.0", WEB, "172.30.0.2"),
        ("::", WEB, "fd30::2"),
        ("::", FOUR, "172.28.0.2"),
        ("192.0.2.5", FOUR, "172.28.0.2"),
    ],
)
def test_redirect_names_the_containers_address_and_ports(at: str, network: Network, target: str) -> None:
    found = planned(mapping(at, "8000-8010", "80-90"), NONE, network)
    redirected = [route for route in found.routes if route.road is Road.REDIRECT]
    assert redirected
    assert {(route.reason.fact, route.seen_as) for route in redirected} == {(f"{target} port 80-90", SeenAs.GATEWAY)}


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_without_forwarding_only_the_host_is_translated(firewall: Firewall) -> None:
    off = HostFacts(firewall, forwarding=frozenset({6}), may_forward=False)
    relayed = [Code.REDIRECTED, Code.TRANSLATED, *[Code.NOT_FORWARDED] * 3]
    assert codes_of_both_families(off) == [relayed, USUAL]
    assert planned(mapping("0.0.0.0"), off).routes[2].reason.fact == "net.ipv4.ip_forward"
    off = HostFacts(firewall, forwarding=frozenset(), may_forward=False)
    assert codes_of_both_families(off) == [relayed, relayed]
    assert planned(mapping("::"), off).routes[2].reason.fact == "net.ipv6.conf.all.forwarding"


@pytest.mark.parametrize("firewall", WITH_RULES)
@pytest.mark.parametrize("forwarding", [frozenset({6}), frozenset({4, 6})])  # both: one bridge does not
def test_family_that_cannot_be_forwarded_is_relayed(firewall: Firewall, forwarding: frozenset[int]) -> None:
    off = HostFacts(firewall, forwarding=forwarding, unforwardable=((4, "it is read-only"),))
    relayed = [Code.REDIRECTED, Code.TRANSLATED, *[Code.UNFORWARDABLE] * 3]
    assert codes_of_both_families(off) == [relayed, USUAL]
    assert planned(mapping("0.0.0.0"), off).routes[2].reason.fact == "it is read-only"


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_clients_elsewhere_are_relayed_if_the_chain_input_has_to_be_obeyed(firewall: Firewall) -> None:
    relayed = [Code.REDIRECTED, Code.TRANSLATED, *[Code.OBEY_INPUT] * 3]
    assert codes_of_both_families(HostFacts(firewall, obey_input=True)) == [relayed, relayed]


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_forwarding_that_the_daemon_may_enable_counts_as_enabled(firewall: Firewall) -> None:
    assert codes_of_both_families(HostFacts(firewall, forwarding=frozenset())) == [USUAL, USUAL]


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_where_another_program_drops_only_the_host_is_translated(firewall: Firewall) -> None:
    facts = HostFacts(firewall, forward_droppers=((6, "ip6 theirs drop"),))
    assert codes_of_both_families(facts) == [USUAL, [Code.REDIRECTED, Code.TRANSLATED, *[Code.FORWARD_DROPPED] * 3]]
    assert planned(mapping("::"), facts).routes[3].reason.fact == "ip6 theirs drop"
    assert (facts.dropper(4), facts.dropper(6)) == (None, "ip6 theirs drop")


def test_dockers_layout_relays_the_containers_own_bridge() -> None:
    found = planned(mapping("0.0.0.0"), HostFacts(Firewall.IPTABLES, own_bridge=False))
    assert codes(found) == [*USUAL[:4], Code.OWN_BRIDGE]
    assert (found.routes[4].road, found.routes[4].reason.fact) == (Road.RELAY, "gw-web")


@pytest.mark.parametrize("firewall", WITH_RULES)
def test_without_sockets_of_a_protocol_there_is_only_nat(firewall: Firewall) -> None:
    facts = HostFacts(firewall, missing_protocols=frozenset({Protocol.SCTP}))
    found = planned(mapping("0.0.0.0", protocol=Protocol.SCTP), facts)
    assert codes(found) == [Code.NO_SOCKETS, *USUAL[1:]]
    assert (found.routes[0].road, found.routes[0].seen_as) == (Road.BLOCKED, SeenAs.NOBODY)
    assert found.routes[0].reason.fact == "sctp"
    assert found.is_nat
    assert not found.is_relayed
    assert codes_of_both_families(facts) == [USUAL, USUAL], "tcp is not affected"


def test_without_sockets_and_rules_every_client_is_blocked() -> None:
    found = planned(
        mapping("192.0.2.5", protocol=Protocol.SCTP),
        HostFacts(Firewall.NONE, missing_protocols=frozenset({Protocol.SCTP})),
    )
    assert codes(found) == [Code.ELSEWHERE, *[Code.NO_SOCKETS] * 4]
    assert {route.road for route in found.routes} == {Road.BLOCKED}


def test_clients_of_a_link_local_address_are_relayed() -> None:
    found = planned(mapping("::"))
    routes = list(routes_at(found, ip_address("fe80::1")))
    assert [route.reason.code for route in routes] == [Code.LINK_LOCAL] * 5
    assert {route.reason.fact for route in routes} == {"fe80::1"}
    assert {(route.road, route.seen_as) for route in routes} == {(Road.RELAY, SeenAs.GATEWAY)}
    assert [(route.origin, route.neighbour) for route in routes] == COLUMNS


@pytest.mark.parametrize("network", [WEB, FOUR, SIX], ids=["both", "ipv4", "ipv6"])
def test_without_rules_clients_of_a_link_local_address_are_not_redirected(network: Network) -> None:
    host = list(routes_at(planned(mapping("::"), NONE, network), ip_address("fe80::1")))[1]
    assert (host.origin, host.road, host.reason) == (Origin.HOST, Road.RELAY, Reason(Code.LINK_LOCAL, "fe80::1"))


@pytest.mark.parametrize("firewall", Firewall)
def test_relay_keeps_its_reason_at_a_link_local_address(firewall: Firewall) -> None:
    found = planned(mapping("::"), HostFacts(firewall, no_redirect=NO_CGROUPS), SIX)
    assert next(routes_at(found, ip_address("fe80::1"))) == found.routes[0]
    assert found.routes[0].reason == Reason(Code.NO_REDIRECT, NO_CGROUPS)


@pytest.mark.parametrize(
    ("at", "connected_to"), [("::", "fd30::1"), ("0.0.0.0", "169.254.0.5"), ("192.0.2.5", "192.0.2.5")]
)
def test_clients_of_any_other_address_take_the_planned_road(at: str, connected_to: str) -> None:
    found = planned(mapping(at))
    assert tuple(routes_at(found, ip_address(connected_to))) == found.routes


@pytest.mark.parametrize("address", ["127.0.0.1", "127.255.0.3", "::1"])
def test_only_loopback_reaches_a_loopback_address(address: str) -> None:
    assert origins_reaching(ip_address(address)) == (Origin.LOOPBACK,)


@pytest.mark.parametrize("address", ["192.0.2.5", "fd30::1", "fe80::1"])
def test_all_other_origins_reach_any_other_address(address: str) -> None:
    assert origins_reaching(ip_address(address)) == (Origin.HOST, Origin.REMOTE, Origin.CONTAINER)


def test_plan_of_a_mapping_has_bridge_and_container_address() -> None:
    found = planned(mapping("::", "8000", "80"), of=BACK)
    assert (found.bridge, found.container_address, found.family) == ("gw-back", ip_address("fd31::2"), 6)
    assert planned(mapping("::"), of=FOUR).container_address == ip_address("172.28.0.2")
    assert planned(mapping("::"), of=FOUR).family == 6


@pytest.mark.parametrize("at", MATRIX)
@pytest.mark.parametrize(
    ("protocol", "ports", "steered"),
    [
        (Protocol.TCP, "8000", True),
        (Protocol.TCP, "8000-8001", True),
        (Protocol.TCP, "1-65535", True),
        (Protocol.UDP, "8000", False),
        (Protocol.UDP, "8000-8001", True),
        (Protocol.UDP, "1-65535", True),
        (Protocol.SCTP, "8000", False),
        (Protocol.SCTP, "8000-8001", False),
    ],
)
def test_shared_sockets_serve_mappings_that_the_kernel_can_steer(
    at: str, protocol: Protocol, ports: str, steered: bool
) -> None:
    """Not SCTP; not an IPv6 link-local address, whose port may be another mapping's on another interface; not a single
    UDP port, which may be published for broadcasts."""
    for firewall in Firewall:
        found = planned(mapping(at, ports, protocol=protocol), HostFacts(firewall))
        assert found.is_steered == (steered and at != "fe80::5")


def test_without_steering_no_mapping_is_steered() -> None:
    for at in MATRIX:
        for protocol in Protocol:
            for ports in ("8000", "8000-8010"):
                assert not planned(mapping(at, ports, protocol=protocol), NO_STEERING).is_steered


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("ports", ["53", "8000-8010"])
@pytest.mark.parametrize("at", MATRIX)
def test_held_ports_are_steered_if_any_can_be(at: str, ports: str, protocol: Protocol) -> None:
    """Also a single UDP port: dockerd has the socket that would receive broadcasts."""
    found = planned(held(at, ports, protocol=protocol))
    assert found.is_steered == (protocol is not Protocol.SCTP and at != "fe80::5")
    assert not planned(held(at, ports, protocol=protocol), NO_STEERING).is_steered
    without_raw = planned(held(at, ports, protocol=protocol), replace(NFTABLES, no_raw=NO_RAW))
    assert without_raw.is_steered == (protocol is Protocol.TCP and at != "fe80::5")


NOT_STEERED = {
    "no steering": (held("2001:db8::5"), NO_STEERING, NO_CGROUPS),
    "no raw sockets": (held("2001:db8::5", protocol=Protocol.UDP), replace(NFTABLES, no_raw=NO_RAW), NO_RAW),
    "sctp": (held("0.0.0.0", protocol=Protocol.SCTP), NFTABLES, "the kernel steers no SCTP to another socket"),
    "link-local": (held("fe80::5"), NFTABLES, "nothing is steered at the link-local address fe80::5"),
}


@pytest.mark.parametrize("name", NOT_STEERED)
@pytest.mark.parametrize("firewall", [Firewall.NFTABLES, Firewall.NONE])
def test_held_ports_that_cannot_be_steered_are_blocked_instead_of_relayed(name: str, firewall: Firewall) -> None:
    """The relay cannot bind a socket beside dockerd's; rules and the redirect do without one."""
    one, facts, why = NOT_STEERED[name]
    facts = replace(facts, firewall=firewall)
    usual, found = (planned(replace(one, is_held=is_held), facts, FOUR) for is_held in (False, True))
    assert Road.RELAY in usual.roads.used
    for before, after in zip(usual.routes, found.routes, strict=True):
        if before.road is Road.RELAY:
            assert (after.road, after.reason, after.seen_as) == (Road.BLOCKED, Reason(Code.HELD, why), SeenAs.NOBODY)
        else:
            assert after == before


def test_clients_of_a_link_local_address_of_held_ports_are_relayed_if_they_can_be_steered() -> None:
    roads = {}
    for facts in (NFTABLES, NO_STEERING):
        at_link_local = routes_at(planned(held("::", "8000", "80"), facts), ip_address("fe80::1"))
        roads[facts.no_steering] = {(route.road, route.reason.code) for route in at_link_local}
    assert roads == {"": {(Road.RELAY, Code.LINK_LOCAL)}, NO_CGROUPS: {(Road.BLOCKED, Code.HELD)}}


def test_link_local_address_with_a_zone_is_not_steered() -> None:
    assert not planned(mapping("fe80::5%eth0", "8000-8010")).is_steered


@pytest.mark.parametrize("ports", ["8000", "8000-8010"])
def test_ipv4_link_local_address_is_steered(ports: str) -> None:
    assert planned(mapping("169.254.0.5", ports)).is_steered


LEASE_MATRIX = {
    "0.0.0.0": ("rllll", "Fllll"),
    "::": ("4llll", "rllll"),
    "127.0.0.1": ("roooo", "Foooo"),
    "::1": ("4oooo", "roooo"),
    "192.0.2.5": ("ellll", "ellll"),
    "2001:db8::5": ("ellll", "ellll"),
    "fe80::5": ("eKKKK", "eKKKK"),
}
"""Host address of a lease: the cells of a container of IPv4, then of IPv6.  The firewall makes no difference."""


@pytest.mark.parametrize("lacking", ["", NO_CGROUPS], ids=["redirect", "no redirect"])
@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("firewall", Firewall)
@pytest.mark.parametrize("container", ["172.17.0.2", "fd17::2"])
@pytest.mark.parametrize("at", LEASE_MATRIX)
def test_lease_redirects_loopback_and_relays_the_rest(
    at: str, container: str, firewall: Firewall, protocol: Protocol, lacking: str
) -> None:
    cells = LEASE_MATRIX[at][":" in container]
    if protocol is Protocol.SCTP or lacking:
        cells = cells.translate(NEVER[0] if protocol is Protocol.SCTP else LACKING[0])
    facts = HostFacts(firewall, forwarding=frozenset(), may_forward=False, no_redirect=lacking)
    found = planned(lease(at, "8000", "80", protocol, container), facts)
    assert [(route.origin, route.neighbour) for route in found.routes] == COLUMNS
    assert [(route.road, route.seen_as, route.reason.code) for route in found.routes] == [CELLS[one] for one in cells]
    assert (found.bridge, str(found.container_address), found.is_nat) == ("", container, False)
    assert not found.is_steered


def test_lease_without_sockets_is_blocked_where_it_would_be_relayed() -> None:
    facts = HostFacts(Firewall.NONE, missing_protocols=frozenset({Protocol.SCTP}))
    found = planned(lease("0.0.0.0", protocol=Protocol.SCTP), facts)
    assert codes(found) == [Code.NO_SOCKETS] * 5
    assert {route.road for route in found.routes} == {Road.BLOCKED}


def test_lease_is_not_redirected_at_a_link_local_address() -> None:
    found = planned(lease("::", container="fd17::2"), NONE)
    at_link_local = list(routes_at(found, ip_address("fe80::1")))
    assert at_link_local[0].reason == Reason(Code.LINK_LOCAL, "fe80::1")
    assert [route.reason.code for route in at_link_local[1:]] == [Code.LEASE] * 4


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_network_whose_rules_are_dockerds_is_relayed(facts: HostFacts) -> None:
    """Whether forwarded packets would be dropped makes no difference, and excluded addresses are excluded."""
    facts = replace(facts, forward_droppers=((4, "ip filter FORWARD"),), excluded=frozenset({ip_address("192.0.2.6")}))
    found = planned(mapping("0.0.0.0", "8000", "80"), facts, replace(WEB, has_rules=False))
    usual = [route for route in found.routes if not route.only_at]
    assert [route.road for route in usual] == [Road.REDIRECT, *[Road.RELAY] * 4]
    assert {route.reason for route in usual[1:]} == {Reason(Code.DOCKERS_RULES, WEB.bridge)}
    assert {route.road for route in found.routes if route.only_at} == {Road.BLOCKED}
    assert (found.has_rules, found.is_steered) == (False, True)


def test_plan_decides_leases_beside_mappings() -> None:
    made = whole(NFTABLES, mapping("0.0.0.0"), lease("0.0.0.0", "8001", "80"))
    assert made.mappings == (planned(mapping("0.0.0.0")), planned(lease("0.0.0.0", "8001", "80")))


def test_plan_has_all_networks_and_mappings() -> None:
    made = whole(NFTABLES, mapping("0.0.0.0"), mapping("::"), networks=(WEB, INNER))
    assert [one.network for one in made.networks] == [WEB, INNER]
    assert made.mappings == (planned(mapping("0.0.0.0")), planned(mapping("::")))
    assert made.facts is NFTABLES


def test_mappings_of_a_kind_share_their_roads() -> None:
    one, other = planned(mapping("0.0.0.0", "80")), planned(mapping("0.0.0.0", "81", "8081"))
    assert one.roads is other.roads
    assert [found.routes[2].reason.fact for found in (one, other)] == ["172.30.0.2 port 80", "172.30.0.2 port 8081"]
