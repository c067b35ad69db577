"""The steps from one state to another: they lead there, in the right order, and can be undone."""

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gangway.reconcile.diff import Flows, State, Step, Verb, diff, ports_of, steered_of
from tests.unit.state_model import BRIDGES, ENDS, HERE, PLANNED, PORTS, STEERED, TARGETS, Host, attachment, states

# What comes at which place; an end that is there may have to be isolated where another is attached.
DOWN = (
    {Verb.ERASE},
    {Verb.FORWARD},
    {Verb.REWRITE, Verb.CHANGE},
    {Verb.UNSTEER},
    {Verb.DROP},
    {Verb.FORGET},
    {Verb.DETACH},
    {Verb.DELETE_BRIDGE},
)
UP = (
    {Verb.MAKE_BRIDGE},
    {Verb.ATTACH, Verb.ISOLATE},
    {Verb.KEEP},
    {Verb.STEER},
    {Verb.REWRITE, Verb.CHANGE},
    {Verb.FORGET},
    {Verb.FORWARD},
    {Verb.ENTER},
)
PAIRS = st.booleans().flatmap(lambda kind: st.tuples(states(kind), states(kind)))
FOUND = st.booleans().flatmap(lambda kind: st.tuples(states(kind, True), states(kind, True)))


def verbs(steps: Iterable[Step]) -> list[Verb]:
    return [step.verb for step in steps]


def is_in_order(steps: Iterable[Step], places: Iterable[set[Verb]]) -> bool:
    """Whether each step is one of the places', and none comes after one of a later place."""
    ranks = {verb: rank for rank, place in enumerate(places) for verb in place}
    found = [ranks.get(step.verb, -1) for step in steps]
    return -1 not in found and found == sorted(found)


@given(FOUND)
def test_the_steps_lead_from_one_state_to_the_other(pair: tuple[State, State]) -> None:
    before, after = pair
    host = Host.of(before)
    for step in diff(before, after):
        host.do(step)
    assert host == Host.of(after)


@given(FOUND)
def test_from_a_state_to_itself_there_is_nothing_to_do(pair: tuple[State, State]) -> None:
    assert list(diff(pair[0], pair[0])) == []


@given(PAIRS)
def test_undone_in_reverse_all_is_as_before(pair: tuple[State, State]) -> None:
    before, after = pair
    host = Host.of(before)
    steps = list(diff(before, after))
    for done in range(len(steps) + 1):
        for step in steps[:done]:
            host.do(step)
        for step in reversed(steps[:done]):
            back = step.undo()
            if back is not None:
                host.do(back)
        assert host == Host.of(before), f"after {verbs(steps[:done])}"


@given(FOUND)
def test_taking_down_comes_before_setting_up_each_in_its_order(pair: tuple[State, State]) -> None:
    before, after = pair
    steps = list(diff(before, after))
    cuts = range(len(steps) + 1)
    assert any(is_in_order(steps[:cut], DOWN) and is_in_order(steps[cut:], UP) for cut in cuts), verbs(steps)


@given(PAIRS)
def test_a_relay_that_comes_after_one_that_ended_gets_its_ports(pair: tuple[State, State]) -> None:
    """They were nobody else's meanwhile, and are steered when it has them."""
    after = pair[0]
    before = replace(after, ports={}, steered=dict.fromkeys(after.steered, False))
    host = Host.of(before)
    steps = list(diff(before, after))
    for step in steps:
        host.do(step)
    assert host == Host.of(after)
    assert verbs(steps) == [Verb.KEEP] * bool(after.ports) + [Verb.STEER] * bool(after.steered)


EVERYTHING = State(
    BRIDGES,
    {name: attachment(name) for name in ENDS},
    ports=dict.fromkeys(PORTS, TARGETS[0]) | dict(pair for one in STEERED for pair in ports_of(one)),
    steered=dict(pair for one in STEERED for pair in steered_of(one)),
    redirects=HERE,
    mappings=PLANNED,
    forwarding=frozenset({4, 6}),
)


def test_all_is_set_up_from_the_ground() -> None:
    steps = list(diff(State(), EVERYTHING))
    links = [*[Verb.MAKE_BRIDGE] * 2, *[Verb.ATTACH] * 3]
    # Sockets are redirected when all is there, and until then the relay listens.
    assert verbs(steps) == [*links, Verb.KEEP, Verb.STEER, Verb.CHANGE, Verb.FORGET, Verb.FORWARD, Verb.ENTER]
    # Only a flow of UDP can have begun, with whoever answered, before the port was published.
    assert [step.what for step in steps if step.verb is Verb.FORGET] == [Flows((PLANNED["0.0.0.0:53:53/udp"],))]


def test_all_is_taken_down_from_the_top() -> None:
    steps = list(diff(EVERYTHING, State()))
    # Flows are forgotten when neither rule nor relay can bring them back.
    links = [*[Verb.DETACH] * 3, *[Verb.DELETE_BRIDGE] * 2]
    assert verbs(steps) == [Verb.ERASE, Verb.FORWARD, Verb.CHANGE, Verb.UNSTEER, Verb.DROP, Verb.FORGET, *links]
    assert [step.what for step in steps if step.verb is Verb.FORGET] == [Flows(tuple(PLANNED.values()))]
