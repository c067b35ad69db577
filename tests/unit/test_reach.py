"""Which routes the clients of one address and port take: mapping, address and origin need not fit together."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gangway.facts import Detour, Firewall, HostFacts, LostSource
from gangway.model import PortMapping
from gangway.plan import Origin, Road, Route, SeenAs
from gangway.reach import routes_past, routes_to
from gangway.reasons import Code, Reason
from tests.unit.samples import IPTABLES, NFTABLES, NONE, WEB, mapping, planned

OWN, SECOND = "192.0.2.5", "198.51.100.5"
RULE = Reason(Code.SOURCE_ROUTED, "from 198.51.100.5/32 lookup 101")
AT_SECOND = frozenset({ip_address(SECOND)})
DETOURS, LOST = (Detour("up1", 4, AT_SECOND, RULE),), (LostSource(ip_address(SECOND), AT_SECOND, RULE),)


def roads(at: str, origin: Origin, one: PortMapping, facts: HostFacts = NFTABLES) -> list[Road]:
    return [route.road for route in routes_to(planned(one, facts), ip_address(at), one.host_ports.first, origin)]


@pytest.mark.parametrize("at", ["127.0.0.1", "127.9.9.9", "::1"])
@pytest.mark.parametrize("origin", [Origin.REMOTE, Origin.CONTAINER])
def test_no_client_elsewhere_reaches_the_hosts_loopback(origin: Origin, at: str) -> None:
    one = mapping("::" if ":" in at else "0.0.0.0")
    found = list(routes_to(planned(one), ip_address(at), 8000, origin))
    assert {(route.origin, route.road, route.seen_as) for route in found} == {(origin, Road.BLOCKED, SeenAs.NOBODY)}
    assert {route.reason for route in found} == {Reason(Code.OWN_LOOPBACK, at)}
    assert len(found) == 1 + (origin is Origin.CONTAINER)


@pytest.mark.parametrize("origin", [Origin.LOOPBACK, Origin.HOST])
def test_a_process_of_the_host_takes_the_road_of_the_address(origin: Origin) -> None:
    assert roads("127.0.0.1", origin, mapping("0.0.0.0")) == [Road.REDIRECT]
    assert roads(OWN, origin, mapping("0.0.0.0")) == [Road.NAT]


def test_a_port_of_a_moved_range_has_its_own_target() -> None:
    found = routes_to(planned(mapping("0.0.0.0", "9000-9009", "50-59")), ip_address(OWN), 9004, Origin.REMOTE)
    assert [route.reason.fact for route in found] == ["172.30.0.2 port 54"]


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_clients_of_a_second_uplink_are_relayed(facts: HostFacts) -> None:
    facts = replace(facts, detours=DETOURS, lost_sources=LOST)
    for one in (mapping("0.0.0.0"), mapping(SECOND)):
        assert roads(SECOND, Origin.REMOTE, one, facts) == [Road.RELAY]
        assert roads(SECOND, Origin.HOST, one, facts) == [Road.RELAY]
        assert roads(SECOND, Origin.CONTAINER, one, facts) == [Road.NAT, Road.NAT]
    assert roads(OWN, Origin.REMOTE, mapping("0.0.0.0"), facts) == [Road.NAT]
    assert roads(OWN, Origin.HOST, mapping("0.0.0.0"), facts) == [Road.NAT]


def test_all_addresses_together_show_the_usual_road_and_the_exception() -> None:
    facts = replace(NFTABLES, detours=DETOURS, lost_sources=LOST)
    assert roads("0.0.0.0", Origin.REMOTE, mapping("0.0.0.0"), facts) == [Road.NAT, Road.RELAY]
    assert roads("::", Origin.REMOTE, mapping("::"), facts) == [Road.NAT]


def test_relay_cannot_answer_containers_from_an_address_that_a_rule_routes() -> None:
    facts = replace(NONE, lost_sources=LOST)
    assert roads(SECOND, Origin.CONTAINER, mapping("0.0.0.0"), facts) == [Road.BLOCKED, Road.BLOCKED]
    assert roads(OWN, Origin.CONTAINER, mapping("0.0.0.0"), facts) == [Road.RELAY, Road.RELAY]


@pytest.mark.parametrize("firewall", [Firewall.NFTABLES, Firewall.IPTABLES])
def test_container_that_answers_elsewhere_sees_the_gateway(firewall: Firewall) -> None:
    facts = HostFacts(firewall, answers_elsewhere=frozenset({ip_address("172.30.0.2")}))
    found = {route.origin: route for route in planned(mapping("0.0.0.0"), facts, WEB).routes if not route.neighbour}
    for origin in (Origin.HOST, Origin.REMOTE, Origin.CONTAINER):
        route = found[origin]
        assert (route.road, route.seen_as) == (Road.NAT, SeenAs.GATEWAY)
        assert route.reason == Reason(Code.ANSWERS_ELSEWHERE, "172.30.0.2 port 8000")
    assert planned(mapping("::"), facts).routes[2].seen_as is SeenAs.CLIENT, "its other address is not affected"


def _past(at: str, *published: str) -> Route:
    (route,) = routes_past([mapping(one) for one in published], ip_address(at), Origin.HOST)
    return route


def test_a_port_that_is_published_at_other_addresses_is_blocked() -> None:
    assert _past(OWN, "127.0.0.1").reason == Reason(Code.LOOPBACK_ONLY, "127.0.0.1")
    assert _past(OWN, SECOND).reason == Reason(Code.ELSEWHERE, SECOND)
    assert _past(OWN, "127.0.0.1", SECOND).reason == Reason(Code.ELSEWHERE, f"127.0.0.1 and {SECOND}")
    assert _past(OWN, SECOND).road is Road.BLOCKED
