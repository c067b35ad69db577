"""Single steps: the inverse of each, when rules are rewritten, and what becomes of links that were only found."""

from dataclasses import replace

import pytest

from gangway.ebpf.keys import PortBlock, SteeringState, Target, blocks
from gangway.facts import HostFacts
from gangway.model import PortMapping, Protocol
from gangway.plan import MappingPlan, NetworkPlan, Plan
from gangway.reconcile.diff import (
    Bridge,
    Flows,
    Forwarding,
    Further,
    Isolation,
    Ports,
    Properties,
    Redirects,
    Rewrite,
    Rules,
    Steered,
    Step,
    Veth,
    diff,
)
from gangway.reconcile.properties import Kind, Property
from gangway.reconcile.state import Attachment, State, link_name, ports_of, redirects_of, steered_of
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from tests.unit.samples import (
    BACK,
    NFTABLES,
    NO_REDIRECT,
    NO_STEERING,
    NONE,
    SIX,
    WEB,
    endpoint,
    held,
    lease,
    mapping,
    planned,
    whole,
)
from tests.unit.state_model import NEIGHBOURS, Host, verb

LINK = Attachment(endpoint(WEB), WEB, "/run/netns/box", isolated=False)
ISOLATED = LINK._replace(isolated=True)
ONE, OTHER = planned(mapping("0.0.0.0", "80")), planned(mapping("0.0.0.0", "81"))
SMALL, SAME, LARGE = (whole(NFTABLES, networks=networks) for networks in ((WEB,), (BACK,), (WEB, BACK)))
PORT = HostPorts("tcp", "0.0.0.0", 80, 80)
SERVED, ELSEWHERE = (Serve(PORT, Destination(address, 80), Mode.OWN) for address in ("172.30.0.2", "172.30.0.3"))
KEY, KEY2 = PortBlock("tcp", "0.0.0.0", 80, 80), PortBlock("tcp", "0.0.0.0", 82, 83)
HERE, THERE = (Target(address, 80) for address in ("172.30.0.2", "172.30.0.3"))
BOTH, FOUR = frozenset({4, 6}), frozenset({4})


def steered(one: MappingPlan) -> dict[PortBlock, SteeringState]:
    """Return the steered blocks of a mapping, as a State has them."""
    return dict(steered_of(one))


@pytest.mark.parametrize(
    ("step", "inverse"),
    [
        (Bridge(None, NetworkPlan(WEB, False), "b"), Bridge(NetworkPlan(WEB, False), None, "b")),
        (Veth(None, LINK, "gw1"), Veth(LINK, None, "gw1")),
        (Ports((), (SERVED,)), Ports((SERVED,), ())),
        (Steered((), ((KEY, SteeringState.HELD),)), Steered(((KEY, SteeringState.HELD),), ())),
        (Redirects((), ((KEY, HERE),)), Redirects(((KEY, HERE),), ())),
        (Rewrite(None, SMALL), Rewrite(SMALL, None)),
        (Rules((ONE,), (OTHER,)), Rules((OTHER,), (ONE,))),
        (Forwarding(FOUR, BOTH), Forwarding(BOTH, FOUR)),
    ],
)
def test_inverse_of_the_inverse_is_the_step(step: Step, inverse: Step) -> None:
    assert step.inverse() == inverse
    assert inverse.inverse() == step


def test_flushed_flows_cannot_be_restored() -> None:
    assert Flows((ONE,), ()).inverse() is None


@pytest.mark.parametrize("kind", [Veth, Bridge])
def test_found_link_cannot_be_restored(kind: type[Step]) -> None:
    assert kind(None, None, "gw1").inverse() is None


def test_found_link_is_deleted_by_its_name() -> None:
    found = State({"gw-old": None}, {"gw1": None})
    assert list(diff(found, State())) == [Veth(None, None, "gw1"), Bridge(None, None, "gw-old")]


def test_found_link_that_is_wanted_stays() -> None:
    wanted = State({"gw-web": NetworkPlan(WEB, False)}, {"gw1": LINK})
    assert list(diff(State({"gw-web": None}, {"gw1": None}), wanted)) == []


def test_containers_join_a_new_bridge_as_they_are() -> None:
    port, address = Property("gw1", "", Kind.BRIDGE, "gw-web"), Property("gw-web", "", Kind.ADDRESS, "172.30.0.1/24")
    wanted = State({"gw-web": NetworkPlan(WEB, False)}, {"gw1": LINK}, properties=frozenset({port, address}))
    steps = list(diff(State({}, {"gw1": None}), wanted))
    assert steps == [Bridge(None, NetworkPlan(WEB, False), "gw-web"), Properties((), (port,))]


@pytest.mark.parametrize("wanted", [LINK, ISOLATED])
def test_veth_is_isolated_as_its_attachment_says(wanted: Attachment) -> None:
    for before in (frozenset[str](), frozenset({"gw1"})):
        steps = list(diff(State(attachments={"gw1": None}, isolated=before), State(attachments={"gw1": wanted})))
        right = wanted.isolated == ("gw1" in before)
        assert steps == ([] if right else [Isolation(not wanted.isolated, wanted.isolated, "gw1")])


def test_port_with_another_destination_is_removed_and_served_again() -> None:
    steps = list(diff(State(ports={PORT: SERVED}), State(ports={PORT: ELSEWHERE})))
    assert steps == [Ports((SERVED,), ()), Ports((), (ELSEWHERE,))]


def test_redirect_with_another_target_is_removed_and_added_again() -> None:
    steps = list(diff(State(redirects={KEY: HERE, KEY2: HERE}), State(redirects={KEY: THERE, KEY2: HERE})))
    assert steps == [Redirects(((KEY, HERE),), ()), Redirects((), ((KEY, THERE),))]


def test_reserved_ports_are_steered_without_being_freed() -> None:
    reserved, served = SteeringState.RESERVED, SteeringState.SERVED
    steps = list(diff(State(steered={KEY: reserved, KEY2: served}), State(steered={KEY: served, KEY2: served})))
    assert steps == [Steered((), ((KEY, served),))]


def test_ports_are_steered_only_while_the_relay_serves_them() -> None:
    """No client reaches a relay that does not serve the port yet, or no longer."""
    wanted = State(ports=dict(ports_of(ONE)), steered=steered(ONE), plan=SMALL)
    steps = list(diff(State(), wanted))
    assert steps == [
        Ports((), tuple(wanted.ports.values())),
        Steered((), tuple(steered_of(ONE))),
        Rewrite(None, SMALL),
    ]
    assert list(diff(wanted, State())) == [step.inverse() for step in reversed(steps)]


def test_port_gets_its_own_socket_when_it_is_no_longer_steered() -> None:
    mapped = mapping("0.0.0.0", "80-81")
    by_one, by_two = (planned(mapped, facts) for facts in (NFTABLES, NO_STEERING))
    states = [State(ports=dict(ports_of(one)), steered=steered(one)) for one in (by_one, by_two)]
    blocks_of_one = tuple(steered_of(by_one))
    shared, own = (tuple(served for _, served in ports_of(one)) for one in (by_one, by_two))
    assert list(diff(*states)) == [
        Steered(blocks_of_one, ()),
        Ports(shared, ()),
        Ports((), own),
    ]
    assert list(diff(*reversed(states))) == [
        Ports(own, ()),
        Ports((), shared),
        Steered((), blocks_of_one),
    ]


def test_steered_port_stays_reserved_while_its_destination_changes() -> None:
    ((port, served),) = ports_of(ONE)
    elsewhere = served._replace(to=Destination("172.30.0.3", served.to.first))
    before, after = (State(ports={port: one}, steered=steered(ONE)) for one in (served, elsewhere))
    host, steps = Host.of(before), list(diff(before, after))
    assert [verb(step) for step in steps] == ["-Ports", "+Ports"]
    for step in steps:
        host.do(step)
        assert host.steered == steered(ONE)
    assert host == Host.of(after)


def test_redirects_are_added_last_and_removed_first() -> None:
    """No client is led to a container that is not attached yet, or no longer; until then the relay listens."""
    wanted = State({"gw-web": NetworkPlan(WEB, False)}, {"gw1": LINK}, ports={PORT: SERVED}, redirects={KEY: HERE})
    add, remove = Redirects((), ((KEY, HERE),)), Redirects(((KEY, HERE),), ())
    assert list(diff(State(), wanted))[-2:] == [Ports((), (SERVED,)), add]
    assert list(diff(wanted, State()))[:2] == [remove, Ports((SERVED,), ())]


def test_rules_for_further_neighbours_are_there_while_the_link_is() -> None:
    """Without them the container would answer these clients directly, by that link."""
    wanted = State({"gw-back": NetworkPlan(BACK, False)}, {"gw1": LINK}, neighbours=frozenset(NEIGHBOURS))
    assert [verb(step) for step in diff(State(), wanted)] == ["+Bridge", "+Further", "+Veth"]
    assert [verb(step) for step in diff(wanted, State())] == ["-Veth", "-Further", "-Bridge"]
    assert Further(frozenset(), wanted.neighbours).inverse() == Further(wanted.neighbours, frozenset())


def test_a_further_link_is_made_last_of_what_its_clients_packets_take() -> None:
    """Flows are deleted before: a daemon that is killed in between leaves no link, and the next one does both."""
    further = LINK._replace(endpoint=replace(LINK.endpoint, is_first=False))
    wanted = State(attachments={"gw1": LINK, "gw2": further}, plan=SMALL, forwarding=BOTH)
    steps = [*diff(State(), wanted)]
    assert [(verb(one), one.name) for one in steps] == [
        ("+Veth", "gw1"),
        ("Rewrite", ""),
        ("+Veth", "gw2"),
        ("Forwarding", ""),
    ]


def test_redirects_are_removed_before_rules() -> None:
    states = State(redirects={KEY: HERE}, plan=LARGE, forwarding=BOTH), State(redirects={KEY: THERE}, plan=SMALL)
    first, *steps = (verb(step) for step in diff(*states))
    assert (first, steps) == ("-Redirects", ["Forwarding", "Rewrite", "+Redirects"])
    first, *steps = (verb(step) for step in diff(*reversed(states)))
    assert (first, steps) == ("-Redirects", ["Rewrite", "Forwarding", "+Redirects"])


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [(None, SMALL, False), (SMALL, LARGE, False), (SMALL, SAME, False), (LARGE, SMALL, True), (SMALL, None, True)],
)
def test_rules_are_removed_before_their_targets_and_added_after_them(
    before: Plan | None, after: Plan | None, first: bool
) -> None:
    steps = list(diff(State(ports={PORT: SERVED}, plan=before), State(ports={PORT: ELSEWHERE}, plan=after)))
    rewrite = Rewrite(before, after)
    assert [step for step in steps if isinstance(step, Rewrite)] == [rewrite]
    assert steps[0 if first else -1] == rewrite


def test_forwarding_is_enabled_last_and_disabled_first() -> None:
    """It is enabled only while the rules that restrict it are applied."""
    plans = State(plan=SMALL, forwarding=BOTH), State(forwarding=FOUR)
    assert next(iter(diff(*plans))) == Forwarding(BOTH, FOUR)
    assert list(diff(*reversed(plans)))[-1] == Forwarding(FOUR, BOTH)
    one_for_the_other = list(diff(State(forwarding=FOUR), State(forwarding=frozenset({6}))))
    assert one_for_the_other == [
        Forwarding(FOUR, frozenset()),
        Forwarding(frozenset(), frozenset({6})),
    ]


@pytest.mark.parametrize(
    ("one", "ports", "to"),
    [
        (mapping("0.0.0.0", "1-65535"), HostPorts("tcp", "0.0.0.0", 1, 65535), Destination("172.30.0.2", 1)),
        (
            mapping("::", "8000-8002", "80-82", Protocol.UDP),
            HostPorts("udp", "::", 8000, 8002),
            Destination("fd30::2", 80),
        ),
        (mapping("192.0.2.5", "8000", "80"), HostPorts("tcp", "192.0.2.5", 8000, 8000), Destination("172.30.0.2", 80)),
    ],
)
def test_steered_range_is_served_as_a_whole(one: PortMapping, ports: HostPorts, to: Destination) -> None:
    assert list(ports_of(planned(one))) == [(ports, Serve(ports, to, Mode.SHARED))]


@pytest.mark.parametrize(
    "unsteered",
    [
        planned(mapping("::", "8000-8002", "80-82"), NO_STEERING),
        planned(mapping("::", "8000-8002", "80-82", Protocol.SCTP)),
        planned(mapping("fe80::5", "8000-8002", "80-82")),
    ],
    ids=["no steering", "sctp", "link-local"],
)
def test_unsteered_range_is_served_port_by_port(unsteered: MappingPlan) -> None:
    protocol, address = unsteered.mapping.protocol.value, str(unsteered.mapping.host_address)
    ports = [HostPorts(protocol, address, port, port) for port in (8000, 8001, 8002)]
    assert list(ports_of(unsteered)) == [
        (one, Serve(one, Destination("fd30::2", 80 + number), Mode.OWN)) for number, one in enumerate(ports)
    ]
    assert list(steered_of(unsteered)) == []


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("ports", ["8000", "8000-8001"])
def test_held_ports_are_steered_and_not_reserved(protocol: str, ports: str) -> None:
    one = planned(held("0.0.0.0", ports, protocol=Protocol(protocol)))
    first, last = one.mapping.host_ports.first, one.mapping.host_ports.last
    wanted = HostPorts(protocol, "0.0.0.0", first, last)
    assert list(ports_of(one)) == [(wanted, Serve(wanted, Destination("172.30.0.2", first), Mode.HELD))]
    assert list(steered_of(one)) == [(PortBlock(*wanted), SteeringState.HELD)]


@pytest.mark.parametrize(
    ("one", "facts"),
    [
        (held("0.0.0.0"), NO_STEERING),
        (held("0.0.0.0", protocol=Protocol.SCTP), NFTABLES),
        (held("fe80::5", protocol=Protocol.UDP), NFTABLES),
    ],
    ids=["no steering", "sctp", "link-local"],
)
def test_no_socket_is_bound_where_held_ports_cannot_be_steered(one: PortMapping, facts: HostFacts) -> None:
    assert not [*ports_of(planned(one, facts)), *steered_of(planned(one, facts))]


def test_lease_is_served_by_its_own_socket() -> None:
    ports = HostPorts("tcp", "0.0.0.0", 8000, 8000)
    leased = planned(lease("0.0.0.0", "8000", "80"))
    assert list(ports_of(leased)) == [(ports, Serve(ports, Destination("172.17.0.2", 80), Mode.LEASED))]
    assert list(redirects_of(leased)) == [(PortBlock(*ports), Target("172.17.0.2", 80))]
    assert list(steered_of(leased)) == []


@pytest.mark.parametrize(("ports", "count"), [("8000", 1), ("8000-8010", 3), ("1-65534", 30), ("1-65535", 16)])
def test_steered_blocks_are_those_of_the_range(ports: str, count: int) -> None:
    found = planned(mapping("192.0.2.5", ports))
    at = found.mapping.host_ports
    served = SteeringState.SERVED
    assert list(steered_of(found)) == [(one, served) for one in blocks("tcp", "192.0.2.5", at.first, at.last)]
    assert len(list(steered_of(found))) == count


def test_redirects_of_a_mapping_are_those_of_its_blocks() -> None:
    moved = planned(mapping("::", "8000-8010", "80-90"))
    assert list(redirects_of(moved)) == [
        (PortBlock("tcp", "::", 8000, 8007), Target("fd30::2", 80)),
        (PortBlock("tcp", "::", 8008, 8009), Target("fd30::2", 88)),
        (PortBlock("tcp", "::", 8010, 8010), Target("fd30::2", 90)),
    ]


@pytest.mark.parametrize(
    "unredirected",
    [
        planned(mapping("0.0.0.0"), NO_REDIRECT),
        planned(mapping("0.0.0.0", protocol=Protocol.SCTP)),
        planned(mapping("0.0.0.0"), of=SIX),
        planned(mapping("192.0.2.5")),
        planned(mapping("fe80::5"), NONE),
    ],
    ids=["no redirect", "sctp", "family", "by rules", "link-local"],
)
def test_mapping_without_redirected_clients_has_no_redirects(unredirected: MappingPlan) -> None:
    assert list(redirects_of(unredirected)) == []


def test_without_a_firewall_a_mapping_of_one_address_is_redirected() -> None:
    ((block, _),) = redirects_of(planned(mapping("192.0.2.5"), NONE))
    assert block == PortBlock("tcp", "192.0.2.5", 8000, 8000)


def test_link_name_depends_on_the_container_and_its_further_network() -> None:
    names = {link_name(container) for container in ("box", "box2", "pid:1", "/run/netns/box", "ö" * 200)}
    names |= {link_name("box", "2"), link_name("box2", "2")}
    assert len(names) == 7
    assert all(len(name) <= 15 and name.isalnum() for name in names)
    assert link_name("box") == "gw7d64952bd69b"  # always: an upgrade keeps the link
