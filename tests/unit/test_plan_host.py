"""What a plan needs of the host as a whole, and what holds for any mapping under any facts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.facts import Firewall, HostFacts
from gangway.model import Address, Network, PortMapping, Protocol
from gangway.plan import Origin, Road, SeenAs, assemble, plan_mapping, plan_network
from gangway.reach import routes_at
from gangway.reasons import Code
from tests.unit.samples import (
    APART,
    BACK,
    FACTS,
    FOUR,
    HOST_ADDRESSES,
    INNER,
    IPTABLES,
    NETWORKS,
    NFTABLES,
    NONE,
    WEB,
    endpoint,
    mappings,
    whole,
)

BOTH: frozenset[int] = frozenset({4, 6})
NEITHER: frozenset[int] = frozenset()


def families(*found: int) -> frozenset[int]:
    return frozenset(found)


@pytest.mark.parametrize("firewall", Firewall)
@pytest.mark.parametrize("filtered", [NEITHER, families(4), families(6), BOTH])
@pytest.mark.parametrize("network", [WEB, BACK], ids=["icc", "no icc"])
def test_bridge_isolates_unless_rules_can(network: Network, filtered: frozenset[int], firewall: Firewall) -> None:
    found = plan_network(network, HostFacts(firewall, bridge_filtered=filtered))
    assert found.network is network
    by_rules = filtered == BOTH and firewall is not Firewall.NONE
    assert found.isolate_ports == (network is BACK and not by_rules)
    seen = filtered if firewall is not Firewall.NONE else NEITHER
    assert found.untranslated == (seen if found.isolate_ports else NEITHER)


@pytest.mark.parametrize(
    ("facts", "networks", "wanted"),
    [
        (NFTABLES, (WEB,), BOTH),
        (IPTABLES, (FOUR,), families(4)),
        (NFTABLES, (FOUR, WEB), BOTH),
        (NFTABLES, (INNER,), NEITHER),
        (NFTABLES, (INNER, FOUR), families(4)),
        (NFTABLES, (), NEITHER),
        (NONE, (WEB,), NEITHER),
        (replace(NFTABLES, may_forward=False), (WEB,), NEITHER),
        (replace(NFTABLES, unforwardable=((6, "it is read-only"),)), (WEB,), families(4)),
    ],
)
def test_families_that_have_to_be_forwarded(
    facts: HostFacts, networks: tuple[Network, ...], wanted: frozenset[int]
) -> None:
    assert assemble(networks, frozenset(), (), facts).forwarding == wanted


@pytest.mark.parametrize("firewall", [Firewall.NFTABLES, Firewall.IPTABLES])
@pytest.mark.parametrize(
    ("forwarding", "switched_on", "networks", "closed"),
    [
        (BOTH, NEITHER, (WEB,), NEITHER),
        (NEITHER, NEITHER, (WEB,), BOTH),
        (BOTH, BOTH, (WEB,), BOTH),
        (families(6), NEITHER, (WEB,), families(4)),
        (BOTH, families(4), (WEB,), families(4)),
        (NEITHER, NEITHER, (FOUR,), families(4)),
        (NEITHER, NEITHER, (INNER,), NEITHER),
        (BOTH, families(6), (INNER,), families(6)),
    ],
)
def test_family_that_was_not_forwarded_before_is_closed(
    forwarding: frozenset[int],
    switched_on: frozenset[int],
    networks: tuple[Network, ...],
    closed: frozenset[int],
    firewall: Firewall,
) -> None:
    facts = HostFacts(firewall, forwarding=forwarding, switched_on=switched_on)
    assert assemble(networks, frozenset(), (), facts).closed == closed


def test_without_permission_to_forward_nothing_is_closed() -> None:
    assert whole(replace(NFTABLES, forwarding=NEITHER, may_forward=False)).closed == NEITHER


@pytest.mark.parametrize(
    ("facts", "routed"),
    [
        (NFTABLES, BOTH),
        (IPTABLES, BOTH),
        (NONE, NEITHER),
        (replace(NFTABLES, forwarding=NEITHER), BOTH),
        (replace(NFTABLES, forwarding=families(4), may_forward=False), families(4)),
        (replace(NFTABLES, forward_droppers=((4, "ip filter FORWARD"),)), families(6)),
        (replace(IPTABLES, forward_droppers=((4, "a"), (6, "b"))), NEITHER),
    ],
)
def test_families_in_which_incoming_connections_are_translated(facts: HostFacts, routed: frozenset[int]) -> None:
    assert whole(facts).translated == routed
    assert {family for family in BOTH if facts.why_not_translated(family) is None} == routed


@given(mappings(may_be_held=True), NETWORKS, FACTS)
def test_every_kind_of_client_has_one_route(one: PortMapping, network: Network, facts: HostFacts) -> None:
    routes = plan_mapping(one, endpoint(network), network, facts).routes
    kinds = [(route.origin, route.neighbour) for route in routes]
    assert sorted(kinds) == sorted([*((origin, False) for origin in Origin), (Origin.CONTAINER, True)])


@given(mappings(may_be_held=True), NETWORKS, FACTS)
def test_nat_needs_a_firewall_and_a_packet_of_the_same_family(
    one: PortMapping, network: Network, facts: HostFacts
) -> None:
    found = plan_mapping(one, endpoint(network), network, facts)
    through = [route for route in found.routes if route.road is Road.NAT]
    assert not (through and facts.firewall is Firewall.NONE)
    assert all(route.origin is not Origin.LOOPBACK for route in through)
    assert not (through and found.container_address.version != found.family)
    if facts.why_not_translated(found.family) is not None:
        assert all(route.origin is Origin.HOST for route in through)


@given(mappings(), NETWORKS, FACTS)
def test_blocked_are_clients_that_cannot_connect_and_protocols_without_sockets(
    one: PortMapping, network: Network, facts: HostFacts
) -> None:
    at = one.host_address
    able = plan_mapping(one, endpoint(network), network, replace(facts, missing_protocols=frozenset()))
    for route, with_sockets in zip(
        plan_mapping(one, endpoint(network), network, facts).routes, able.routes, strict=True
    ):
        outside = route.origin is not Origin.LOOPBACK
        cannot_connect = at.is_loopback if outside else not (at.is_loopback or int(at) == 0)
        no_sockets = with_sockets.road is Road.RELAY and one.protocol in facts.missing_protocols
        assert (route.road is Road.BLOCKED) == (cannot_connect or no_sockets)
        assert (with_sockets.road is Road.BLOCKED) == cannot_connect


@given(mappings(may_be_held=True), NETWORKS, FACTS)
def test_container_sees_the_gateway_except_by_nat(one: PortMapping, network: Network, facts: HostFacts) -> None:
    for route in plan_mapping(one, endpoint(network), network, facts).routes:
        by_nat = SeenAs.GATEWAY if route.neighbour else SeenAs.CLIENT
        sources = {
            Road.NAT: by_nat,
            Road.REDIRECT: SeenAs.GATEWAY,
            Road.RELAY: SeenAs.GATEWAY,
            Road.BLOCKED: SeenAs.NOBODY,
        }
        assert route.seen_as == sources[route.road]


@given(mappings(may_be_held=True), NETWORKS, FACTS)
def test_only_host_sockets_that_no_rule_serves_are_redirected(
    one: PortMapping, network: Network, facts: HostFacts
) -> None:
    found = plan_mapping(one, endpoint(network), network, facts)
    redirected = [route.origin for route in found.routes if route.road is Road.REDIRECT]
    assert found.is_redirected == bool(redirected)
    assert set(redirected) <= {Origin.LOOPBACK, Origin.HOST}
    assert Origin.HOST not in redirected or facts.firewall is Firewall.NONE
    if redirected:
        assert one.protocol is not Protocol.SCTP
        assert found.container_address.version <= found.family
        assert one.host_address.version == 4 or not one.host_address.is_link_local


@given(APART, NETWORKS, FACTS)
def test_without_the_redirect_only_redirected_routes_change(
    many: list[PortMapping], network: Network, facts: HostFacts
) -> None:
    able, unable = (whole(replace(facts, no_redirect=why), *many, networks=(network,)) for why in ("", "why not"))
    for with_it, without in zip(able.mappings, unable.mappings, strict=True):
        assert not without.is_redirected
        for before, after in zip(with_it.routes, without.routes, strict=True):
            assert after.road is not Road.REDIRECT
            # A reason to relay may be another one; without sockets for a relay there is no road.
            had_none = before.road in (Road.REDIRECT, Road.RELAY) and after.road in (Road.RELAY, Road.BLOCKED)
            assert after == before or had_none


@given(mappings(may_be_held=True), NETWORKS, FACTS)
def test_without_steering_only_held_mappings_lose_the_relay(
    one: PortMapping, network: Network, facts: HostFacts
) -> None:
    with_it, without = (
        plan_mapping(one, endpoint(network), network, replace(facts, no_steering=why, no_raw=""))
        for why in ("", "why not")
    )
    assert not without.is_steered
    if one.is_held:
        assert not any(route.road is Road.RELAY for route in without.routes)
        for before, after in zip(with_it.routes, without.routes, strict=True):
            is_lost = before.road is Road.RELAY
            assert is_lost == (after != before)
            assert after.reason.code is (Code.HELD if is_lost else before.reason.code)
    else:
        assert replace(with_it, is_steered=False) == without


@given(mappings(may_be_held=True), NETWORKS, FACTS, st.sampled_from(HOST_ADDRESSES))
def test_only_nat_and_redirect_change_at_an_address(
    one: PortMapping, network: Network, facts: HostFacts, connected_to: Address
) -> None:
    found = plan_mapping(one, endpoint(network), network, facts)
    for before, after in zip(found.routes, routes_at(found, connected_to), strict=True):
        no_relay = one.is_held and not found.is_steered
        instead = Road.BLOCKED if no_relay else Road.RELAY
        assert after == before or (before.road in (Road.NAT, Road.REDIRECT) and after.road is instead)
        assert (after.origin, after.neighbour) == (before.origin, before.neighbour)


@given(APART, st.lists(NETWORKS, unique=True, min_size=1), FACTS)
def test_mappings_are_decided_independently(many: list[PortMapping], networks: list[Network], facts: HostFacts) -> None:
    made = whole(facts, *many, networks=tuple(networks))
    box = endpoint(networks[0])
    assert made.mappings == tuple(plan_mapping(one, box, networks[0], facts) for one in many)
    assert made.networks == tuple(plan_network(network, facts) for network in networks)
    assert assemble(tuple(networks), made.further, made.mappings, facts) == made
