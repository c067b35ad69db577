"""What commands print: the sentences of `explain`, and tables."""

from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest
from gangway.ebpf.daemon_redirect import Redirects
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.pretend_redirect import Pretended

from gangway.cli.explain import explanation
from gangway.cli.tables import columns, print_checks, print_mappings, print_network, print_networks, roads
from gangway.daemon.messages import ExplainAnswer, MappingAnswer, NetworkAnswer, RouteAnswer
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.model import Network, PortMapping, Protocol
from gangway.plan import Code, Firewall, HostFacts, Origin, Road, Route, Source, asked_at, origins_of
from gangway.reconcile.diff import redirects_of
from gangway.relay.client import Relay
from gangway.relay.settings import Settings
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
LEASE = "lease"  # that traffic which Docker's rules leave
# For each reason: the mapping, the address that the client connects to, the network, the facts.
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
    """Return the daemon's answer, with the routes of all clients."""
    found = planned(one, facts, network)
    with patch("gangway.ebpf.daemon_redirect.Redirect", Pretended):
        redirects = Redirects(Relay(Path("/nowhere"), Settings()), wanted=True, of_host=True, lent_fd=lambda: None)
    redirects.enter(redirects_of(found))

    def rules(route: Route) -> tuple[str, ...]:
        if route.road is Road.REDIRECT:
            return (redirects.met(found, one.host_ports.first),)
        if facts.firewall is Firewall.IPTABLES:
            return tuple(iptables.rules_met(found, route, network, "GANGWAY"))
        return tuple(nftables.rules_met(found, route, network))

    routes = [RouteAnswer.of(route, rules(route)) for route in asked_at(found, ip_address(at))]
    told = MappingAnswer.of(found, redirects.count(found), routes)
    gateways = list(map(str, network.gateways))
    return ExplainAnswer(at, one.host_ports.first, facts.firewall.value, network.name, gateways, told)


def explained(told: ExplainAnswer) -> str:
    return "\n".join(explanation(msgspec.to_builtins(told))) + "\n"


@pytest.mark.parametrize("code", [code for code in Code if code.value != LEASE])
def test_every_reason_has_a_sentence(code: Code) -> None:
    told = answer(*ASKED[code])
    asking = origins_of(ip_address(told.host_address))
    told.mapping.routes = [
        route
        for route in told.mapping.routes
        if route.code == code and (Origin(route.origin) in asking or route.road == Road.BLOCKED)
    ]
    assert told.mapping.routes, "no route has this reason"
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
def test_a_redirected_route_shows_its_map_entry_and_the_gateway(at: str, facts: HostFacts, entry: str | None) -> None:
    told = answer(mapping("0.0.0.0", "8000", "80"), at, WEB, facts)
    asking = origins_of(ip_address(at))
    told.mapping.routes = [route for route in told.mapping.routes if Origin(route.origin) in asking]
    lines = explained(told).splitlines()
    assert [text.strip() for text in lines if "redirect map" in text] == ([] if entry is None else [entry])
    if entry is not None:
        place = lines.index(f"    {entry}")
        assert lines[place - 3].endswith(": redirect")
        assert lines[place - 1] == "  The container sees the gateway, 172.30.0.1."


def test_a_lease_is_explained_without_a_network() -> None:
    route = {"origin": "remote", "neighbour": False, "road": "relay", "code": LEASE, "fact": "", "source": "gateway"}
    words = {"container": "", "source": "lease", "protocol": "tcp", "host_address": "0.0.0.0", "host_ports": "8000"}
    words |= {"container_address": "172.17.0.2", "container_ports": "80"}
    answer = {"host_address": "::1", "host_port": 8000, "firewall": "none", "network": "", "gateways": []}
    assert list(explanation(answer | {"mapping": words | {"routes": [route | {"rules": []}]}})) == [
        "[::1]:8000/tcp is 0.0.0.0:8000 -> 172.17.0.2:80/tcp",
        "container -, source lease, firewall none",
        "",
        "remote: relay",
        "  Docker's own rules may carry the connection first; whatever they leave is relayed.",
        "  The container sees the gateway of its network.",
    ]


@pytest.mark.parametrize("facts", [NFTABLES, IPTABLES])
def test_the_whole_explanation_of_a_host_address(facts: HostFacts) -> None:
    told = answer(mapping("0.0.0.0", "8000", "80"), HOST, WEB, facts)
    asking = origins_of(ip_address(HOST))
    told.mapping.routes = [route for route in told.mapping.routes if Origin(route.origin) in asking]
    assert_golden(f"{facts.firewall}.explain", explained(told))


@given(mappings(), st.sampled_from(HOST_ADDRESSES), NETWORKS, FACTS)
def test_any_mapping_is_explained_with_its_facts(
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


def test_the_gateway_has_the_family_of_the_container() -> None:
    for at, network, gateway in (("0.0.0.0", WEB, "172.30.0.1"), ("::", WEB, "fd30::1"), ("::", FOUR, "172.28.0.1")):
        told = answer(mapping(at), at, network, NONE)
        assert f"  The container sees the gateway, {gateway}." in explained(told).splitlines()


def test_an_origin_with_two_roads_shows_both() -> None:
    docker = HostFacts(Firewall.IPTABLES, own_bridge=False)
    told = msgspec.to_builtins(MappingAnswer.of(planned(mapping("0.0.0.0"), docker)))
    assert [roads(told, origin) for origin in Origin] == ["redirect", "nat", "nat", "nat, relay"]


def table(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Return what was printed: rows of columns."""
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
        ["CONTAINER", "SOURCE", "PUBLISHED", "TARGET", "LOOPBACK", "HOST", "REMOTE", "CONTAINER"],
        ["box", "api", "0.0.0.0:8000", "172.30.0.2:80/tcp", "redirect", "nat", "nat", "nat"],
        ["box", "api", "[::1]:53", "[fd30::2]:53/udp", "redirect", "blocked", "blocked", "blocked"],
        ["box", "api", "0.0.0.0:80", "172.30.0.2:80/sctp", "relay", "nat", "nat", "nat"],
    ]


@pytest.mark.parametrize(("container", "shown"), [("", "-"), ("docker:web", "docker:web")])
def test_a_lease_is_shown_with_its_source(container: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = msgspec.to_builtins(MappingAnswer.of(planned(mapping("0.0.0.0", "8000", "80")), source="lease"))
    print_mappings([answer | {"container": container}])
    assert table(capsys)[1][:4] == [shown, "lease", "0.0.0.0:8000", "172.30.0.2:80/tcp"]


def test_a_row_printed_to_a_pipe_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/run/user/1000/" + "long/" * 30
    print_mappings(msgspec.to_builtins([MappingAnswer.of(planned(mapping("::", container=name)))]))
    assert table(capsys)[1][0] == name


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("A", "BB", ""), ("漢字", "[::1]:80", "x")]
    assert list(columns(rows)) == ["A     BB         ", "漢字  [::1]:80  x"]


def test_a_terminal_shows_the_same_rows_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then assumes a terminal
    monkeypatch.setenv("COLUMNS", "200")
    print_checks([{"check": "c", "holds": True, "note": "fine"}])
    assert capsys.readouterr().out.splitlines()[1:] == ["c      yes    fine"]


def test_cells_are_folded_in_a_narrow_terminal(
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


def test_the_table_of_networks_shows_unusual_policies(capsys: pytest.CaptureFixture[str]) -> None:
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
