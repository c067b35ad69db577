"""Single steps: what undoes each, what rules come when, what becomes of what was only found."""

import pytest

from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock, blocks
from gangway.model import Protocol
from gangway.plan import MappingPlan, NetworkPlan, Plan
from gangway.reconcile.diff import (
    Attachment,
    Change,
    Entries,
    Flows,
    Forwarding,
    HostPorts,
    Ports,
    Rewrite,
    State,
    Step,
    Target,
    Verb,
    diff,
    link_name,
    ports_of,
    redirects_of,
    steered_of,
)
from tests.unit.samples import (
    BACK,
    NFTABLES,
    NO_REDIRECT,
    NO_STEERING,
    NONE,
    SIX,
    WEB,
    endpoint,
    mapping,
    planned,
    whole,
)
from tests.unit.state_model import Host

LINK = Attachment(endpoint(WEB), WEB, "/run/netns/box", isolated=False)
ISOLATED = LINK._replace(isolated=True)
ONE, OTHER = planned(mapping("0.0.0.0", "80")), planned(mapping("0.0.0.0", "81"))
SMALL, SAME, LARGE = (whole(NFTABLES, networks=networks) for networks in ((WEB,), (BACK,), (WEB, BACK)))
PORT = HostPorts("tcp", "0.0.0.0", 80, 80)
TARGET, ELSEWHERE = (Target(address, 80, False) for address in ("172.30.0.2", "172.30.0.3"))
KEY, KEY2 = PortBlock("tcp", "0.0.0.0", 80, 80), PortBlock("tcp", "0.0.0.0", 82, 83)
HERE, THERE = (keys.Target(address, 80) for address in ("172.30.0.2", "172.30.0.3"))
BOTH, FOUR = frozenset({4, 6}), frozenset({4})


@pytest.mark.parametrize(
    ("step", "back"),
    [
        (Step(Verb.MAKE_BRIDGE, NetworkPlan(WEB, False), "b"), Step(Verb.DELETE_BRIDGE, NetworkPlan(WEB, False), "b")),
        (Step(Verb.ATTACH, LINK, "gw1"), Step(Verb.DETACH, LINK, "gw1")),
        (Step(Verb.KEEP, Ports(((PORT, TARGET),))), Step(Verb.DROP, Ports(((PORT, TARGET),)))),
        (Step(Verb.STEER, Entries(((KEY, True),))), Step(Verb.UNSTEER, Entries(((KEY, True),)))),
        (Step(Verb.ENTER, Entries(((KEY, HERE),))), Step(Verb.ERASE, Entries(((KEY, HERE),)))),
        (Step(Verb.REWRITE, Rewrite(None, SMALL)), Step(Verb.REWRITE, Rewrite(SMALL, None))),
        (Step(Verb.CHANGE, Change((ONE,), (OTHER,))), Step(Verb.CHANGE, Change((OTHER,), (ONE,)))),
        (Step(Verb.FORWARD, Forwarding(FOUR, BOTH)), Step(Verb.FORWARD, Forwarding(BOTH, FOUR))),
    ],
)
def test_what_undoes_a_step_is_undone_by_it(step: Step, back: Step) -> None:
    assert step.undo() == back
    assert back.undo() == step


def test_a_flow_that_is_forgotten_is_not_remembered() -> None:
    assert Step(Verb.FORGET, Flows((ONE,))).undo() is None


@pytest.mark.parametrize("verb", [Verb.DETACH, Verb.DELETE_BRIDGE])
def test_what_was_only_found_cannot_be_made_again(verb: Verb) -> None:
    assert Step(verb, None, "gw1").undo() is None


def test_what_was_only_found_is_taken_down_by_its_name() -> None:
    found = State({"gw-old": None}, {"gw1": None})
    assert list(diff(found, State())) == [Step(Verb.DETACH, None, "gw1"), Step(Verb.DELETE_BRIDGE, None, "gw-old")]


def test_what_was_found_and_is_wanted_stays() -> None:
    wanted = State({"gw-web": NetworkPlan(WEB, False)}, {"gw1": LINK})
    assert list(diff(State({"gw-web": None}, {"gw1": None}), wanted)) == []


def test_who_was_on_a_bridge_that_is_made_anew_is_attached_anew() -> None:
    wanted = State({"gw-web": NetworkPlan(WEB, False)}, {"gw1": LINK})
    steps = list(diff(State({}, {"gw1": None}), wanted))
    assert steps == [Step(Verb.MAKE_BRIDGE, NetworkPlan(WEB, False), "gw-web"), Step(Verb.ATTACH, LINK, "gw1")]


@pytest.mark.parametrize("wanted", [LINK, ISOLATED])
def test_an_end_is_isolated_as_its_attachment_says(wanted: Attachment) -> None:
    for before in (frozenset[str](), frozenset({"gw1"})):
        steps = list(diff(State(attachments={"gw1": None}, isolated=before), State(attachments={"gw1": wanted})))
        right = wanted.isolated == ("gw1" in before)
        assert steps == ([] if right else [Step(Verb.ISOLATE, wanted, "gw1")])


def test_a_port_that_leads_elsewhere_is_dropped_and_kept_anew() -> None:
    steps = list(diff(State(ports={PORT: TARGET}), State(ports={PORT: ELSEWHERE})))
    assert steps == [Step(Verb.DROP, Ports(((PORT, TARGET),))), Step(Verb.KEEP, Ports(((PORT, ELSEWHERE),)))]


def test_a_redirect_that_leads_elsewhere_is_erased_and_entered_anew() -> None:
    steps = list(diff(State(redirects={KEY: HERE, KEY2: HERE}), State(redirects={KEY: THERE, KEY2: HERE})))
    assert steps == [Step(Verb.ERASE, Entries(((KEY, HERE),))), Step(Verb.ENTER, Entries(((KEY, THERE),)))]


def test_ports_that_were_only_taken_are_steered_and_never_anybodys() -> None:
    steps = list(diff(State(steered={KEY: False, KEY2: True}), State(steered={KEY: True, KEY2: True})))
    assert steps == [Step(Verb.STEER, Entries(((KEY, True),)))]


def test_ports_are_steered_while_the_relay_has_them() -> None:
    """Nobody is brought to a relay that does not know the port yet, or not any more."""
    (pair,), steered = ports_of(ONE), dict(steered_of(ONE))
    steps = list(diff(State(), State(ports=dict([pair]), steered=steered, plan=SMALL)))
    keep, steer, rewrite = Ports((pair,)), Entries(tuple(steered.items())), Rewrite(None, SMALL)
    assert steps == [Step(Verb.KEEP, keep), Step(Verb.STEER, steer), Step(Verb.REWRITE, rewrite)]
    back = list(diff(State(ports=dict([pair]), steered=steered, plan=SMALL), State()))
    assert back == [step.undo() for step in reversed(steps)]


def test_a_port_gets_a_socket_of_its_own_when_it_is_steered_no_more() -> None:
    mapped = mapping("0.0.0.0", "80-81")
    by_one, by_two = (planned(mapped, facts) for facts in (NFTABLES, NO_STEERING))
    states = [State(ports=dict(ports_of(one)), steered=dict(steered_of(one))) for one in (by_one, by_two)]
    away, here, there = (
        Entries(tuple(steered_of(by_one))),
        Ports(tuple(ports_of(by_one))),
        Ports(tuple(ports_of(by_two))),
    )
    assert list(diff(*states)) == [Step(Verb.UNSTEER, away), Step(Verb.DROP, here), Step(Verb.KEEP, there)]
    assert list(diff(*reversed(states))) == [Step(Verb.DROP, there), Step(Verb.KEEP, here), Step(Verb.STEER, away)]


def test_a_steered_port_that_leads_elsewhere_is_steered_all_the_while() -> None:
    """It is nobody else's meanwhile."""
    ((port, target),), steered = ports_of(ONE), dict(steered_of(ONE))
    before, after = (State(ports={port: to}, steered=steered) for to in (target, target._replace(address="172.30.0.3")))
    host, steps = Host.of(before), list(diff(before, after))
    assert [step.verb for step in steps] == [Verb.DROP, Verb.KEEP]
    for step in steps:
        host.do(step)
        assert host.steered == steered
    assert host == Host.of(after)


def test_sockets_are_redirected_last_and_first_no_more() -> None:
    """Nobody is led to a container that is not attached yet, or not any more; until then the relay listens."""
    wanted = State({"gw-web": NetworkPlan(WEB, False)}, {"gw1": LINK}, ports={PORT: TARGET}, redirects={KEY: HERE})
    enter, erase = (Step(verb, Entries(((KEY, HERE),))) for verb in (Verb.ENTER, Verb.ERASE))
    assert list(diff(State(), wanted))[-2:] == [Step(Verb.KEEP, Ports(((PORT, TARGET),))), enter]
    assert list(diff(wanted, State()))[:2] == [erase, Step(Verb.DROP, Ports(((PORT, TARGET),)))]


def test_a_redirect_is_erased_before_rules_become_less() -> None:
    states = State(redirects={KEY: HERE}, plan=LARGE, forwarding=BOTH), State(redirects={KEY: THERE}, plan=SMALL)
    steps = [step.verb for step in diff(*states)]
    assert steps == [Verb.ERASE, Verb.FORWARD, Verb.REWRITE, Verb.ENTER]
    assert [step.verb for step in diff(*reversed(states))] == [Verb.ERASE, Verb.REWRITE, Verb.FORWARD, Verb.ENTER]


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [(None, SMALL, False), (SMALL, LARGE, False), (SMALL, SAME, False), (LARGE, SMALL, True), (SMALL, None, True)],
)
def test_rules_go_before_what_they_lead_to_and_come_after_it(
    before: Plan | None, after: Plan | None, first: bool
) -> None:
    steps = list(diff(State(ports={PORT: TARGET}, plan=before), State(ports={PORT: ELSEWHERE}, plan=after)))
    rewrite = Step(Verb.REWRITE, Rewrite(before, after))
    assert [step for step in steps if step.verb is Verb.REWRITE] == [rewrite]
    assert steps[0 if first else -1] == rewrite


def test_forwarding_is_switched_on_last_and_off_first() -> None:
    """It is on only while the rules that restrict it stand."""
    plans = State(plan=SMALL, forwarding=BOTH), State(forwarding=FOUR)
    assert next(iter(diff(*plans))) == Step(Verb.FORWARD, Forwarding(BOTH, FOUR))
    assert list(diff(*reversed(plans)))[-1] == Step(Verb.FORWARD, Forwarding(FOUR, BOTH))
    one_for_the_other = list(diff(State(forwarding=FOUR), State(forwarding=frozenset({6}))))
    assert [step.what for step in one_for_the_other] == [
        Forwarding(FOUR, frozenset()),
        Forwarding(frozenset(), frozenset({6})),
    ]


def test_a_steered_range_is_one_port_of_the_relays() -> None:
    """However long it is, and wherever it leads."""
    every = planned(mapping("0.0.0.0", "1-65535"))
    assert list(ports_of(every)) == [(HostPorts("tcp", "0.0.0.0", 1, 65535), Target("172.30.0.2", 1, True))]
    moved = planned(mapping("::", "8000-8002", "80-82", Protocol.UDP))
    assert list(ports_of(moved)) == [(HostPorts("udp", "::", 8000, 8002), Target("fd30::2", 80, True))]
    one = planned(mapping("192.0.2.5", "8000", "80"))
    assert list(ports_of(one)) == [(HostPorts("tcp", "192.0.2.5", 8000, 8000), Target("172.30.0.2", 80, True))]


@pytest.mark.parametrize(
    "unsteered",
    [
        planned(mapping("::", "8000-8002", "80-82"), NO_STEERING),
        planned(mapping("::", "8000-8002", "80-82", Protocol.SCTP)),
        planned(mapping("fe80::5", "8000-8002", "80-82")),
    ],
    ids=["no steering", "sctp", "link-local"],
)
def test_a_mapping_that_is_not_steered_has_a_port_of_the_relays_for_each_of_its_own(unsteered: MappingPlan) -> None:
    protocol, address = unsteered.mapping.protocol.value, str(unsteered.mapping.host_address)
    assert list(ports_of(unsteered)) == [
        (HostPorts(protocol, address, 8000 + number, 8000 + number), Target("fd30::2", 80 + number, False))
        for number in range(3)
    ]
    assert list(steered_of(unsteered)) == []


@pytest.mark.parametrize(("ports", "count"), [("8000", 1), ("8000-8010", 3), ("1-65534", 30), ("1-65535", 16)])
def test_a_steered_mapping_is_served_at_all_its_ports(ports: str, count: int) -> None:
    found = planned(mapping("192.0.2.5", ports, container="far"))
    at = found.mapping.host_ports
    assert dict(steered_of(found)) == dict.fromkeys(blocks("tcp", "192.0.2.5", at.first, at.last), True)
    assert len(list(steered_of(found))) == count


def test_a_mapping_has_the_redirects_of_its_blocks_of_ports() -> None:
    moved = planned(mapping("::", "8000-8010", "80-90"))
    assert list(redirects_of(moved)) == [
        (PortBlock("tcp", "::", 8000, 8007), keys.Target("fd30::2", 80)),
        (PortBlock("tcp", "::", 8008, 8009), keys.Target("fd30::2", 88)),
        (PortBlock("tcp", "::", 8010, 8010), keys.Target("fd30::2", 90)),
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
def test_a_mapping_that_no_socket_is_redirected_to_has_none(unredirected: MappingPlan) -> None:
    assert list(redirects_of(unredirected)) == []


def test_without_rules_a_mapping_of_one_address_has_a_redirect() -> None:
    ((block, _),) = redirects_of(planned(mapping("192.0.2.5"), NONE))
    assert block == PortBlock("tcp", "192.0.2.5", 8000, 8000)


def test_a_link_is_named_by_its_container_alone() -> None:
    names = {link_name(container) for container in ("box", "box2", "pid:1", "/run/netns/box", "ö" * 200)}
    assert len(names) == 5
    assert all(len(name) <= 15 and name.isalnum() for name in names)
    assert link_name("box") == link_name("box")
