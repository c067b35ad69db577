"""What `gangway explain` prints: a sentence for each reason, with its facts, and the rules that a client matches."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.cli.views import explanation
from gangway.daemon.messages import ExplainAnswer, MappingAnswer, RouteAnswer
from gangway.ebpf.keys import PortBlock, Target
from gangway.facts import Detour, Firewall, HostFacts, LostSource
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.model import Network, PortMapping, Protocol, any_address
from gangway.plan import MappingPlan, Origin, Road, Route, SeenAs
from gangway.reach import origins_reaching, routes_past, routes_to
from gangway.reasons import Code, Reason
from gangway.reconcile.dataplane import DataPlane
from gangway.reconcile.state import redirects_of
from tests.unit.golden import assert_golden
from tests.unit.samples import (
    BACK,
    DIRECT,
    FACTS,
    FOUR,
    HOST_ADDRESSES,
    IPTABLES,
    NETWORKS,
    NFTABLES,
    NO_CGROUPS,
    NO_REDIRECT,
    NO_STEERING,
    NONE,
    WEB,
    held,
    lease,
    mapping,
    mappings,
    planned,
    routed,
)

OFF, HOST4 = Reason(Code.NOT_FORWARDED_FROM, "net.ipv4.conf.up0.forwarding"), ip_address("192.0.2.5")
READ_ONLY = "net.ipv4.ip_forward is off and cannot be written (Read-only file system)"
RULE = Reason(Code.SOURCE_ROUTED, "from 192.0.2.5/32 lookup 101")
NO_SCTP = HostFacts(Firewall.NONE, missing_protocols=frozenset({Protocol.SCTP}))
HOST, HOST6 = "192.0.2.5", "2001:db8::5"
# For each reason: the mapping, the address that the client connects to, the network, the facts.
EXAMPLES: dict[Code, tuple[PortMapping, str, Network, HostFacts]] = {
    Code.TRANSLATED: (mapping("0.0.0.0", "8000", "80"), HOST, WEB, NFTABLES),
    Code.MASQUERADED: (mapping("::", "8000-8010"), HOST6, WEB, IPTABLES),
    Code.REDIRECTED: (mapping("0.0.0.0", "8000-8010", "80-90"), "127.0.0.1", WEB, NFTABLES),
    Code.REDIRECTED_AS_IPV4: (mapping("::", "8000", "80"), "::1", FOUR, IPTABLES),
    Code.NO_REDIRECT: (mapping("0.0.0.0", "8000", "80"), "127.0.0.1", WEB, NO_REDIRECT),
    Code.LOOPBACK: (mapping("0.0.0.0", "8000", "80", Protocol.SCTP), "127.0.0.1", WEB, NFTABLES),
    Code.LINK_LOCAL: (mapping("::", "8000", "80"), "fe80::1", WEB, NFTABLES),
    Code.FAMILY: (mapping("::", "8000", "80"), HOST6, FOUR, NFTABLES),
    Code.NO_FIREWALL: (mapping("0.0.0.0", "8000", "80"), HOST, WEB, NONE),
    Code.NOT_FORWARDED: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        HostFacts(Firewall.NFTABLES, forwarding=frozenset(), may_forward=False),
    ),
    Code.UNFORWARDABLE: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        replace(NFTABLES, forwarding=frozenset({6}), unforwardable=((4, READ_ONLY),)),
    ),
    Code.OBEY_INPUT: (mapping("0.0.0.0", "8000", "80"), HOST, WEB, replace(NFTABLES, obey_input=True)),
    Code.NOT_FORWARDED_FROM: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        replace(NFTABLES, detours=(Detour("up0", 4, frozenset({HOST4}), OFF),)),
    ),
    Code.EXCLUDED: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        replace(NFTABLES, exclude=(HOST,), excluded=frozenset({HOST4})),
    ),
    Code.SOURCE_ROUTED: (
        mapping(HOST, "8000", "80"),
        HOST,
        WEB,
        replace(
            NFTABLES,
            detours=(Detour("up0", 4, frozenset({HOST4}), RULE),),
            lost_sources=(LostSource(HOST4, frozenset({HOST4}), RULE),),
        ),
    ),
    Code.ANSWER_LOST: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        replace(NONE, lost_sources=(LostSource(HOST4, frozenset({HOST4}), RULE),)),
    ),
    Code.ANSWERS_ELSEWHERE: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        replace(NFTABLES, answers_elsewhere=frozenset({ip_address("172.30.0.2")})),
    ),
    Code.OWN_LOOPBACK: (mapping("0.0.0.0", "8000", "80"), "127.0.0.1", WEB, NFTABLES),
    Code.FORWARD_DROPPED: (
        mapping("::", "8000", "80"),
        HOST6,
        WEB,
        HostFacts(Firewall.NFTABLES, forward_droppers=((6, "ip6 filter FORWARD"),)),
    ),
    Code.OWN_BRIDGE: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        HostFacts(Firewall.IPTABLES, own_bridge=False),
    ),
    Code.LOOPBACK_ONLY: (mapping("127.0.0.1", "8000", "80"), HOST, WEB, NFTABLES),
    Code.ELSEWHERE: (mapping(HOST, "8000", "80"), "127.0.0.1", WEB, NFTABLES),
    Code.ISOLATED: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        BACK,
        HostFacts(Firewall.NFTABLES, bridge_filtered=frozenset({4})),
    ),
    Code.NO_SOCKETS: (mapping("::", "8000", "80", Protocol.SCTP), HOST6, FOUR, NO_SCTP),
    Code.HELD: (held(HOST6, "8000", "80"), HOST6, FOUR, NO_STEERING),
    Code.ROUTED: (routed("8000", 6), "fd27::2", DIRECT, NFTABLES),
    Code.CLOSED: (
        routed("8000"),
        "172.27.0.2",
        DIRECT,
        HostFacts(Firewall.NFTABLES, forward_droppers=((4, "ip filter FORWARD"),)),
    ),
    Code.DOCKERS_RULES: (mapping("0.0.0.0", "8000", "80"), HOST, replace(WEB, has_rules=False), NFTABLES),
    Code.LEASE: (lease("0.0.0.0", "8000", "80"), HOST, WEB, NONE),
}


class Entries:
    """The redirect's entries for a mapping, which were never used."""

    def __init__(self, planned: MappingPlan) -> None:
        self._entries = dict(redirects_of(planned))

    def lookup(self, protocol: str, address: str, port: int) -> Target | None:
        """Return where a port is led; None if there is no entry."""
        for block, target in self._entries.items():
            if (block.protocol, block.address) == (protocol, address) and block.first <= port <= block.last:
                return Target(target.address, target.port + port - block.first)
        return None

    def count(self, _blocks: Iterable[PortBlock]) -> int:
        """Return 0."""
        return 0


def answer(one: PortMapping, at: str, network: Network, facts: HostFacts) -> ExplainAnswer:
    """Return the daemon's answer, with the routes of all clients."""
    found = planned(one, facts, network)
    nothing: Any = None
    entries: Any = Entries(found)
    dataplane = DataPlane(nothing, nothing, entries, nothing)

    def rules(route: Route) -> tuple[str, ...]:
        if route.road is Road.REDIRECT:
            return (dataplane.matching(found, one.host_ports.first),)
        if not found.has_rules:
            return ()
        if facts.firewall is Firewall.IPTABLES:
            return tuple(iptables.matching_rules(found, route, network, "GANGWAY"))
        return tuple(nftables.matching_rules(found, route, network, one.host_ports.first))

    address, port = ip_address(at), one.host_ports.first
    if address.is_unspecified or one.host_address in (address, any_address(address)):
        decided = [route for origin in Origin for route in routes_to(found, address, port, origin)]
    else:
        decided = [route for origin in Origin for route in routes_past([one], address, origin)]
    routes = [RouteAnswer.of(route, rules(route)) for route in decided]
    name, gateways = network.name, list(map(str, network.gateways))
    if found.mapping.source.value == "lease":
        name, gateways = "", []
    answered = MappingAnswer.of(found, dataplane.redirected(found), routes=routes)
    return ExplainAnswer(at, one.host_ports.first, facts.firewall.value, name, gateways, answered)


def test_clients_on_further_networks_are_seen_as_the_gateway() -> None:
    for road in ("nat", "relay"):
        facts = NFTABLES if road == "nat" else NONE
        answered = msgspec.structs.replace(answer(mapping("0.0.0.0"), "0.0.0.0", WEB, facts), further_networks=["back"])
        said = "  Of clients on back, which it is on, too, it sees the gateway."
        assert explained(answered).count(said) == (road == "nat")


def explained(answered: ExplainAnswer) -> str:
    return "\n".join(explanation(msgspec.to_builtins(answered))) + "\n"


@pytest.mark.parametrize("code", list(Code))
def test_every_reason_has_a_sentence(code: Code) -> None:
    found = answer(*EXAMPLES[code])
    origins = origins_reaching(ip_address(found.host_address))
    found.mapping.routes = [
        route
        for route in found.mapping.routes
        if route.code == code and (Origin(route.origin) in origins or route.road == Road.BLOCKED)
    ]
    assert found.mapping.routes, "no route has this reason"
    assert_golden(f"{code.value}.explain", explained(found))


@pytest.mark.parametrize(
    ("at", "facts", "entry"),
    [
        ("127.0.0.1", NFTABLES, "redirect map: tcp 0.0.0.0:8000 -> 172.30.0.2:80; the mapping was used 0 times so far"),
        (HOST, NONE, "redirect map: tcp 0.0.0.0:8000 -> 172.30.0.2:80; the mapping was used 0 times so far"),
        (HOST, NFTABLES, None),
        ("127.0.0.1", NO_REDIRECT, None),
        (HOST, replace(NONE, no_redirect=NO_CGROUPS), None),
    ],
)
def test_a_redirected_route_shows_its_map_entry_and_the_gateway(at: str, facts: HostFacts, entry: str | None) -> None:
    found = answer(mapping("0.0.0.0", "8000", "80"), at, WEB, facts)
    origins = origins_reaching(ip_address(at))
    found.mapping.routes = [route for route in found.mapping.routes if Origin(route.origin) in origins]
    lines = explained(found).splitlines()
    assert [text.strip() for text in lines if "redirect map" in text] == ([] if entry is None else [entry])
    if entry is not None:
        place = lines.index(f"    {entry}")
        assert lines[place - 3].endswith(": redirect")
        assert lines[place - 1] == "  The container sees the gateway, 172.30.0.1."


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_the_whole_explanation_of_a_host_address(facts: HostFacts) -> None:
    found = answer(mapping("0.0.0.0", "8000", "80"), HOST, WEB, facts)
    origins = origins_reaching(ip_address(HOST))
    found.mapping.routes = [route for route in found.mapping.routes if Origin(route.origin) in origins]
    assert_golden(f"{facts.firewall}.explain", explained(found))


@given(mappings(may_be_held=True), st.sampled_from(HOST_ADDRESSES), NETWORKS, FACTS)
def test_any_mapping_is_explained_with_its_facts(
    one: PortMapping, at: object, network: Network, facts: HostFacts
) -> None:
    found = answer(one, str(at), network, facts)
    lines = explained(found).splitlines()
    assert lines[0].endswith(f"/{one.protocol}")
    assert not [text for text in lines if "{" in text and not text.startswith("    ")]
    for route in found.mapping.routes:
        assert any(route.fact in text for text in lines)
        assert all(f"    {rule}" in lines for rule in route.rules)
    seen = [text for text in lines if text.startswith("  The container sees ")]
    assert len(seen) == sum(route.seen_as != SeenAs.NOBODY for route in found.mapping.routes)


def test_the_gateway_has_the_family_of_the_container() -> None:
    for at, network, gateway in (("0.0.0.0", WEB, "172.30.0.1"), ("::", WEB, "fd30::1"), ("::", FOUR, "172.28.0.1")):
        found = answer(mapping(at), at, network, NONE)
        assert f"  The container sees the gateway, {gateway}." in explained(found).splitlines()
