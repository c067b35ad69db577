"""What a person reads: the sentence for each reason, and the tables."""

from ipaddress import ip_address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.cli.views import explanation, print_mappings, print_network, print_networks, roads
from gangway.daemon.messages import ExplainAnswer, MappingAnswer, NetworkAnswer, RouteAnswer
from gangway.firewall import iptables, nftables
from gangway.model import Network, PortMapping, Protocol
from gangway.plan import Code, Firewall, HostFacts, Origin, Route, Source, asked_at, origins_of
from tests.unit.golden import assert_golden
from tests.unit.samples import (
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
    mapping,
    mappings,
    planned,
)

NO_SCTP = HostFacts(Firewall.NONE, missing=frozenset({Protocol.SCTP}))
HOST, HOST6 = "192.0.2.5", "2001:db8::5"
# For each reason: the mapping, which address is asked, the network, the facts.
ASKED: dict[Code, tuple[PortMapping, str, Network, HostFacts]] = {
    Code.TRANSLATED: (mapping("0.0.0.0", "8000", "80"), HOST, WEB, NFTABLES),
    Code.MASQUERADED: (mapping("::", "8000-8010"), HOST6, WEB, IPTABLES),
    Code.LOOPBACK: (mapping("0.0.0.0", "8000", "80"), "127.0.0.1", WEB, NFTABLES),
    Code.LINK_LOCAL: (mapping("::", "8000", "80"), "fe80::1", WEB, NFTABLES),
    Code.FAMILY: (mapping("::", "8000", "80"), HOST6, FOUR, NFTABLES),
    Code.NO_FIREWALL: (mapping("0.0.0.0", "8000", "80"), HOST, WEB, NONE),
    Code.NOT_FORWARDED: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        WEB,
        HostFacts(Firewall.NFTABLES, forwarding=frozenset(), may_forward=False),
    ),
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
    Code.LOOPBACK_ONLY: (mapping("127.0.0.1", "8000", "80"), "127.0.0.1", WEB, NFTABLES),
    Code.ELSEWHERE: (mapping(HOST, "8000", "80"), HOST, WEB, NFTABLES),
    Code.ISOLATED: (
        mapping("0.0.0.0", "8000", "80"),
        HOST,
        BACK,
        HostFacts(Firewall.NFTABLES, bridge_filtered=frozenset({4})),
    ),
    Code.NO_SOCKETS: (mapping("::", "8000", "80", Protocol.SCTP), HOST6, FOUR, NO_SCTP),
}


def answer(one: PortMapping, at: str, network: Network, facts: HostFacts) -> ExplainAnswer:
    """What the daemon answers, with the routes of all clients."""
    found = planned(one, facts, network)

    def rules(route: Route) -> tuple[str, ...]:
        if facts.firewall is Firewall.IPTABLES:
            return tuple(iptables.rules_met(found, route, network, "GANGWAY"))
        return tuple(nftables.rules_met(found, route, network))

    routes = [RouteAnswer.of(route, rules(route)) for route in asked_at(found, ip_address(at))]
    told = MappingAnswer.of(found, routes)
    gateways = list(map(str, network.gateways))
    return ExplainAnswer(at, one.host_ports.first, facts.firewall.value, network.name, gateways, told)


def explained(told: ExplainAnswer) -> str:
    return "\n".join(explanation(msgspec.to_builtins(told))) + "\n"


@pytest.mark.parametrize("code", Code)
def test_every_reason_has_a_sentence(code: Code) -> None:
    told = answer(*ASKED[code])
    told.mapping.routes = [route for route in told.mapping.routes if route.code == code]
    assert told.mapping.routes, "nobody gets this reason"
    assert_golden(f"{code.value}.explain", explained(told))


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_the_whole_explanation_of_a_host_address(facts: HostFacts) -> None:
    told = answer(mapping("0.0.0.0", "8000", "80"), HOST, WEB, facts)
    asking = origins_of(ip_address(HOST))
    told.mapping.routes = [route for route in told.mapping.routes if Origin(route.origin) in asking]
    assert_golden(f"{facts.firewall}.explain", explained(told))


@given(mappings(), st.sampled_from(HOST_ADDRESSES), NETWORKS, FACTS)
def test_whatever_is_asked_is_explained_with_its_facts(
    one: PortMapping, at: object, network: Network, facts: HostFacts
) -> None:
    told = answer(one, str(at), network, facts)
    lines = explained(told).splitlines()
    assert lines[0].endswith(f"/{one.protocol}")
    assert not [text for text in lines if "{" in text and not text.startswith("    ")]
    for route in told.mapping.routes:
        assert any(route.fact in text for text in lines)
        assert all(f"    {rule}" in lines for rule in route.rules)
    seen = [text for text in lines if text.startswith("  The container sees ")]
    assert len(seen) == sum(route.source != Source.NOBODY for route in told.mapping.routes)


def test_the_gateway_is_that_of_the_containers_family() -> None:
    for at, network, gateway in (("0.0.0.0", WEB, "172.30.0.1"), ("::", WEB, "fd30::1"), ("::", FOUR, "172.28.0.1")):
        told = answer(mapping(at), at, network, NONE)
        assert f"  The container sees the gateway, {gateway}." in explained(told).splitlines()


def test_an_origin_with_two_roads_shows_both() -> None:
    docker = HostFacts(Firewall.IPTABLES, own_bridge=False)
    told = msgspec.to_builtins(MappingAnswer.of(planned(mapping("0.0.0.0"), docker)))
    assert [roads(told, origin) for origin in Origin] == ["relay", "nat", "nat", "nat, relay"]


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """What was printed: lines of columns."""
    lines = capsys.readouterr().out.splitlines()
    return [[column.strip() for column in line.split("  ") if column.strip()] for line in lines]


def test_mappings_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = [planned(mapping("0.0.0.0", "8000", "80")), planned(mapping("::1", "53", protocol=Protocol.UDP))]
    print_mappings(msgspec.to_builtins([MappingAnswer.of(one) for one in found]))
    assert table(capsys) == [
        ["CONTAINER", "PUBLISHED", "LEADS TO", "LOOPBACK", "HOST", "REMOTE", "CONTAINER"],
        ["box", "0.0.0.0:8000", "172.30.0.2:80/tcp", "relay", "nat", "nat", "nat"],
        ["box", "[::1]:53", "[fd30::2]:53/udp", "relay", "blocked", "blocked", "blocked"],
    ]


def test_a_line_to_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/run/user/1000/" + "long/" * 30
    print_mappings(msgspec.to_builtins([MappingAnswer.of(planned(mapping("::", container=name)))]))
    assert table(capsys)[1][0] == name


def test_networks_are_a_table_of_what_is_not_usual(capsys: pytest.CaptureFixture[str]) -> None:
    answers = [NetworkAnswer.of(network, (endpoint(network),)) for network in (WEB, BACK, INNER)]
    answers[0].mtu = 9000
    print_networks(msgspec.to_builtins(answers))
    assert table(capsys) == [
        ["NETWORK", "BRIDGE", "SUBNETS", "GATEWAYS", "POLICY", "CONTAINERS"],
        ["web", "gw-web", "172.30.0.0/24, fd30::/64", "172.30.0.1, fd30::1", "mtu 9000", "1"],
        ["back", "gw-back", "172.31.0.0/24, fd31::/64", "172.31.0.1, fd31::1", "no masquerade, no icc", "1"],
        ["inner", "gw-inner", "172.29.0.0/24, fd29::/64", "172.29.0.1, fd29::1", "internal", "1"],
    ]


def test_a_network_is_shown_with_its_containers(capsys: pytest.CaptureFixture[str]) -> None:
    print_network(msgspec.to_builtins(NetworkAnswer.of(WEB, (endpoint(WEB), endpoint(WEB, "[bold]")))))
    lines = table(capsys)
    assert lines[1][4] == "-"
    assert lines[3:] == [
        ["CONTAINER", "ADDRESSES"],
        ["box", "172.30.0.2, fd30::2"],
        ["[bold]", "172.30.0.2, fd30::2"],
    ]
