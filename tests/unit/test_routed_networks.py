"""Networks in the gateway mode `routed`: clients connect to the containers' own addresses, at published ports."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from gangway.errors import Conflict
from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables import render as iptables
from gangway.firewall.nft import render as nftables
from gangway.firewall.nft.transaction import TABLE
from gangway.model import Network, PortMapping, Protocol
from gangway.plan import Origin, Road, SeenAs
from gangway.reconcile.diff import Flows, diff
from gangway.reconcile.state import State, ports_of, redirects_of, steered_of
from gangway.state.port_index import PortIndex
from tests.unit.samples import (
    DIRECT,
    IPTABLES,
    NFTABLES,
    NO_STEERING,
    NONE,
    WEB,
    admitting,
    held,
    mapping,
    planned,
    routed,
    whole,
)

PREFIX = "GANGWAY"
OFF = frozenset[int]()
HALF = replace(DIRECT, name="half", routed=frozenset({6}))
OPEN = "host routed, remote routed, container routed, near routed"
CLOSED = "host routed, remote blocked, container blocked, near routed"


def roads(one: PortMapping, facts: HostFacts, of: Network) -> str:
    """Return the road of each kind of client but loopback's, which is always blocked."""
    found = planned(one, facts, of).routes
    assert [route.road for route in found if route.origin is Origin.LOOPBACK] == [Road.BLOCKED]
    assert all(route.seen_as is (SeenAs.CLIENT if route.road is Road.ROUTED else SeenAs.NOBODY) for route in found)
    kinds = ("near" if route.neighbour else route.origin.value for route in found[1:])
    return ", ".join(f"{kind} {route.road}" for kind, route in zip(kinds, found[1:], strict=True))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    ("facts", "of", "expected"),
    [
        (NFTABLES, DIRECT, OPEN),
        (IPTABLES, DIRECT, OPEN),
        (NONE, DIRECT, OPEN),
        (replace(NFTABLES, obey_input=True), DIRECT, OPEN),
        (replace(NFTABLES, forwarding=OFF), DIRECT, OPEN),
        (NO_STEERING, DIRECT, OPEN),
        (NFTABLES, replace(DIRECT, icc=False), OPEN.replace("near routed", "near blocked")),
        (NFTABLES, replace(DIRECT, internal=True), CLOSED),
        (replace(NFTABLES, forwarding=OFF, may_forward=False), DIRECT, CLOSED),
        (replace(NONE, forwarding=OFF), DIRECT, CLOSED),
        (replace(NFTABLES, unforwardable=((4, "off"), (6, "off"))), DIRECT, CLOSED),
        (replace(NFTABLES, forward_droppers=((4, "a"), (6, "b"))), DIRECT, CLOSED),
    ],
)
def test_road_of_each_kind_of_client(family: int, facts: HostFacts, of: Network, expected: str) -> None:
    assert roads(routed(family=family, of=of), facts, of) == expected


def test_reason_names_what_is_in_the_way() -> None:
    facts = HostFacts(Firewall.IPTABLES, forwarding=frozenset({4}), may_forward=False)
    for one, at, why in ((routed(), facts, None), (routed(family=6), facts, "net.ipv6.conf.all.forwarding is off")):
        remote = planned(one, at, DIRECT).routes[2]
        assert remote.reason.fact == (why or "172.27.0.2 port 8000")


def test_one_family_is_routed_and_the_other_translated() -> None:
    by_nat, direct = planned(mapping("0.0.0.0", "80"), of=HALF), planned(routed("80", 6, of=HALF), of=HALF)
    assert (by_nat.is_nat, by_nat.is_opened) == (True, False)
    assert (direct.is_nat, direct.is_opened) == (False, True)
    assert nftables.change((), [by_nat, direct]).adds == {
        "ports4": ["tcp . 80 : 172.27.0.2 . 80"],
        "opened6": ["tcp . fd27::2 . 80 . ::/0"],
    }


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("facts", [NFTABLES, NO_STEERING, NONE])
def test_host_serves_nothing_at_a_containers_address(protocol: Protocol, facts: HostFacts) -> None:
    found = planned(routed("8000-8001", protocol=protocol), facts, DIRECT)
    assert [*ports_of(found), *steered_of(found), *redirects_of(found)] == []
    added = diff(State(), State(mappings={str(found.mapping): found}))
    assert not [step for step in added if isinstance(step, Flows)], "no flow can be on another road"


def test_a_range_is_one_element_and_one_rule() -> None:
    found = planned(routed("20000-21999"), of=DIRECT)
    assert nftables.change((), [found]).text() == (
        f"add element {TABLE} opened4 {{ tcp . 172.27.0.2 . 20000-21999 . 0.0.0.0/0 }}\n"
    )
    assert nftables.change([found], ()) == nftables.change((), [found]).inverse()
    assert iptables.rules_of(found, 6, PREFIX) == {}
    assert iptables.rules_of(found, 4, PREFIX) == {
        "filter": ["-A GANGWAY -d 172.27.0.2/32 -o gw-direct -p tcp -m tcp --dport 20000:21999 -j ACCEPT"]
    }


@pytest.mark.parametrize(
    ("one", "elements", "sources"),
    [
        (routed("80"), ["0.0.0.0/0"], [""]),
        (admitting(routed("80"), "10.0.0.0/8", "192.0.2.5/32"), ["10.0.0.0/8", "192.0.2.5/32"], None),
        (admitting(routed("80"), "fd00::/8"), [], []),
        (admitting(routed("80", 6), "fd00::/8", "10.0.0.0/8"), ["fd00::/8"], None),
    ],
)
def test_only_admitted_clients_are_let_in(one: PortMapping, elements: list[str], sources: list[str] | None) -> None:
    found, family = planned(one, of=DIRECT), one.host_address.version
    adds = nftables.change((), [found]).adds
    opened = {f"opened{family}": [f"tcp . {one.host_address} . 80 . {subnet}" for subnet in elements]}
    assert {name: texts for name, texts in adds.items() if texts} == {
        name: texts for name, texts in opened.items() if texts
    }
    sources = [f" -s {subnet}" for subnet in elements] if sources is None else sources
    to = f"-d {one.host_address}/{32 if family == 4 else 128} -o gw-direct -p tcp -m tcp --dport 80 -j ACCEPT"
    assert iptables.rules_of(found, family, PREFIX) == {"filter": [f"-A GANGWAY{source} {to}" for source in sources]}


def test_internal_network_opens_nothing() -> None:
    found = planned(routed(), of=replace(DIRECT, internal=True))
    assert nftables.change((), [found]).text() == ""
    assert iptables.rules_of(found, 4, PREFIX) == {}


def test_port_published_at_the_host_does_not_open_the_containers_address() -> None:
    """With iptables, what comes in is not dropped before the rule that lets translated connections in."""
    for of, state in ((DIRECT, " -m conntrack --ctstate DNAT"), (WEB, "")):
        accepted, *_ = iptables.rules_of(planned(mapping("0.0.0.0", "8000", "80"), of=of), 4, PREFIX)["filter"]
        assert accepted.endswith(f" -o {of.bridge} -p tcp -m tcp --dport 80{state} -j ACCEPT")


@pytest.mark.parametrize("order", [(DIRECT, WEB), (WEB, DIRECT)])
def test_containers_of_other_networks_are_let_in_by_published_ports_only(order: tuple[Network, ...]) -> None:
    """With iptables another network's bridge may send anything to anywhere, by a rule that has to come later."""
    rules = next(
        one.rules for one in iptables.render(whole(IPTABLES, networks=order), 4, PREFIX) if one.name == "filter"
    )
    closed = next(rule for rule in rules if rule.endswith("DROP"))
    assert "! -i gw-direct -o gw-direct " in closed
    assert rules.index(closed) < rules.index("-A FORWARD -i gw-web ! -o gw-web -j ACCEPT")


def test_matching_rules_of_clients_elsewhere() -> None:
    found = planned(routed("80"), of=DIRECT)
    by_nft = [tuple(nftables.matching_rules(found, route, DIRECT, 80)) for route in found.routes]
    by_iptables = [tuple(iptables.matching_rules(found, route, DIRECT, PREFIX)) for route in found.routes]
    assert by_nft[2] == (
        "forward: oifname @bridges jump direct",
        "direct: oifname @routed4 meta l4proto { tcp, udp, sctp } meta l4proto . ip daddr . th dport . ip saddr "
        "@opened4 accept { tcp . 172.27.0.2 . 80 . 0.0.0.0/0 }",
    )
    assert by_iptables[2] == (
        "filter: -A FORWARD -o gw-direct -j GANGWAY",
        "filter: -A GANGWAY -d 172.27.0.2/32 -o gw-direct -p tcp -m tcp --dport 80 -j ACCEPT",
    )
    for matching in (by_nft, by_iptables):
        assert [bool(rules) for rules in matching] == [False, False, True, True, False]


def test_ports_of_the_host_and_of_a_container_are_different_ports() -> None:
    index, direct = PortIndex(), routed("80")
    everywhere = held("0.0.0.0", "80")
    for first, second in ((direct, everywhere), (everywhere, direct)):
        index.add(first)
        index.add(second)
        assert index.at(Protocol.TCP, direct.host_address, 80) == direct
        assert index.at(Protocol.TCP, ip_address("192.0.2.5"), 80) == everywhere
        with pytest.raises(Conflict):
            index.add(replace(direct, container="other"))
        index.remove(first)
        index.remove(second)
