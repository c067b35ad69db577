"""What a person reads: the sentence for each reason, and the tables."""

from dataclasses import replace
from ipaddress import ip_address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.cli.tables import columns, explanation, print_checks, print_mappings, print_network, print_networks, roads
from gangway.daemon.messages import ExplainAnswer, MappingAnswer, NetworkAnswer, RouteAnswer
from gangway.ebpf.keys import Hit
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.model import Network, PortMapping, Protocol
from gangway.plan import Code, Firewall, HostFacts, MappingPlan, Origin, Road, Route, Source, asked_at, origins_of
from gangway.reconcile.executor import redirect_entry
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
    NO_CGROUPS,
    NO_REDIRECT,
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
    hit = Hit(str(found.container_address), one.container_ports.first, 0)

    def rules(route: Route) -> tuple[str, ...]:
        if route.road is Road.REDIRECT:
            return (redirect_entry(found, one.host_ports.first, hit, 0),)
        if facts.firewall is Firewall.IPTABLES:
            return tuple(iptables.matching_rules(found, route, network, "GANGWAY"))
        return tuple(nftables.matching_rules(found, route, network))

    routes = [RouteAnswer.of(route, rules(route)) for route in asked_at(found, ip_address(at))]
    told = MappingAnswer.of(found, 0, routes)
    gateways = list(map(str, network.gateways))
    return ExplainAnswer(at, one.host_ports.first, facts.firewall.value, network.name, gateways, told)


def explained(told: ExplainAnswer) -> str:
    return "\n".join(explanation(msgspec.to_builtins(told))) + "\n"


@pytest.mark.parametrize("code", Code)
def test_every_reason_has_a_sentence(code: Code) -> None:
    told = answer(*ASKED[code])
    asking = origins_of(ip_address(told.host_address))
    told.mapping.routes = [
        route
        for route in told.mapping.routes
        if route.code == code and (Origin(route.origin) in asking or route.road == Road.BLOCKED)
    ]
    assert told.mapping.routes, "nobody gets this reason"
    assert_golden(f"{code.value}.explain", explained(told))


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
def test_who_is_redirected_reads_the_entry_and_that_the_container_sees_the_gateway(
    at: str, facts: HostFacts, entry: str | None
) -> None:
    told = answer(mapping("0.0.0.0", "8000", "80"), at, WEB, facts)
    asking = origins_of(ip_address(at))
    told.mapping.routes = [route for route in told.mapping.routes if Origin(route.origin) in asking]
    lines = explained(told).splitlines()
    assert [text.strip() for text in lines if "redirect map" in text] == ([] if entry is None else [entry])
    if entry is not None:
        place = lines.index(f"    {entry}")
        assert lines[place - 3].endswith(": redirect")
        assert lines[place - 1] == "  The container sees the gateway, 172.30.0.1."


@pytest.mark.parametrize(
    ("found", "hit", "line"),
    [
        (
            planned(mapping("0.0.0.0", "8000", "80")),
            Hit("172.30.0.2", 80, 3),
            "redirect map: tcp 0.0.0.0:8000 -> 172.30.0.2:80; the mapping was used 7 times so far",
        ),
        (
            planned(mapping("::1", "8000")),
            Hit("fd30::2", 8000, 3),
            "redirect map: tcp [::1]:8000 -> [fd30::2]:8000; the mapping was used 7 times so far",
        ),
        (planned(mapping("::1", "8000")), None, "no entry in the redirect's map"),
    ],
)
def test_a_redirect_entry_is_shown_as_the_kernel_has_it(found: MappingPlan, hit: Hit | None, line: str) -> None:
    assert redirect_entry(found, 8000, hit, 7) == line


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
    assert [roads(told, origin) for origin in Origin] == ["redirect", "nat", "nat", "nat, relay"]


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """What was printed: lines of columns."""
    lines = capsys.readouterr().out.splitlines()
    return [[column.strip() for column in line.split("  ") if column.strip()] for line in lines]


def test_mappings_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        planned(mapping("0.0.0.0", "8000", "80")),
        planned(mapping("::1", "53", protocol=Protocol.UDP)),
        planned(mapping("0.0.0.0", "80", protocol=Protocol.SCTP)),
    ]
    print_mappings(msgspec.to_builtins([MappingAnswer.of(one) for one in found]))
    assert table(capsys) == [
        ["CONTAINER", "PUBLISHED", "LEADS TO", "LOOPBACK", "HOST", "REMOTE", "CONTAINER"],
        ["box", "0.0.0.0:8000", "172.30.0.2:80/tcp", "redirect", "nat", "nat", "nat"],
        ["box", "[::1]:53", "[fd30::2]:53/udp", "redirect", "blocked", "blocked", "blocked"],
        ["box", "0.0.0.0:80", "172.30.0.2:80/sctp", "relay", "nat", "nat", "nat"],
    ]


def test_a_line_to_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/run/user/1000/" + "long/" * 30
    print_mappings(msgspec.to_builtins([MappingAnswer.of(planned(mapping("::", container=name)))]))
    assert table(capsys)[1][0] == name


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("A", "BB", ""), ("漢字", "[::1]:80", "x")]
    assert list(columns(rows)) == ["A     BB         ", "漢字  [::1]:80  x"]


def test_a_terminal_gets_the_same_lines_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    print_checks([{"check": "c", "holds": True, "note": "fine"}])
    assert capsys.readouterr().out.splitlines()[1:] == ["c      yes    fine"]


def test_where_a_terminal_is_too_narrow_cells_are_folded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    print_checks([{"check": "c", "holds": True, "note": "as long as it takes"}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2
    assert (
        "".join(line.replace("c ", "").replace("yes", "").replace(" ", "") for line in lines[1:]) == "aslongasittakes"
    )


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
