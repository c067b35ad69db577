"""The steps from one state to another: they lead there, in the right order, and can be undone."""

from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from gangway.ebpf.keys import SteeringState
from gangway.reconcile.diff import Flows, Step, diff
from gangway.reconcile.state import State, ports_of, steered_of
from tests.unit.state_model import (
    BRIDGES,
    DESTINATIONS,
    HERE,
    PLANNED,
    PORTS,
    STEERED,
    VETHS,
    Host,
    attachment,
    own,
    properties_of,
    states,
    verb,
)

_RESERVED, _SERVED = SteeringState.RESERVED, SteeringState.SERVED

# The kinds of steps of each place in the order.  A veth that stays may have to be isolated where others are attached.
REMOVING = (
    {"-Redirects"},
    {"Forwarding"},
    {"Rewrite", "Rules"},
    {"-Steered"},
    {"-Ports"},
    {"Flows"},
    {"-Veth"},
    {"-Further"},
    {"-Bridge"},
)
ADDING = (
    {"+Bridge"},
    {"+Further"},
    {"+Veth"},
    {"Properties"},
    {"Isolation"},
    {"+Ports"},
    {"+Steered"},
    {"Rewrite", "Rules"},
    {"Flows"},
    {"Forwarding"},
    {"+Redirects"},
)


def all_served(state: State) -> State:
    """Return the state without blocks that are only reserved: no daemon wants those."""
    found = {block: _SERVED if one is _RESERVED else one for block, one in state.steered.items()}
    return replace(state, steered=found)


def whole_links(state: State) -> State:
    """Return the state with all properties of its links: a daemon wants no others."""
    links = [one for one in (*state.bridges.values(), *state.attachments.values()) if one is not None]
    return replace(state, properties=frozenset().union(*map(properties_of, links)))


PAIRS = st.booleans().flatmap(lambda kind: st.tuples(states(kind), states(kind)))
FOUND = st.booleans().flatmap(
    lambda kind: st.tuples(states(kind, True), states(kind, True).map(all_served).map(whole_links))
)


def verbs(steps: Iterable[Step]) -> list[str]:
    return [verb(step) for step in steps]


def is_in_order(steps: Iterable[Step], places: Iterable[set[str]]) -> bool:
    """True if each step has a place, and none comes after one of a later place."""
    ranks = {kind: rank for rank, place in enumerate(places) for kind in place}
    found = [ranks.get(verb(step), -1) for step in steps]
    return -1 not in found and found == sorted(found)


@given(FOUND)
def test_steps_lead_from_one_state_to_the_other(pair: tuple[State, State]) -> None:
    before, after = pair
    host = Host.of(before)
    for step in diff(before, after):
        host.do(step)
    assert host == Host.of(after)


@given(FOUND)
def test_equal_states_have_no_difference(pair: tuple[State, State]) -> None:
    assert list(diff(pair[0], pair[0])) == []


@given(PAIRS)
def test_inverses_in_reverse_order_restore_the_state(pair: tuple[State, State]) -> None:
    before, after = pair
    host = Host.of(before)
    steps = list(diff(before, after))
    for done in range(len(steps) + 1):
        for step in steps[:done]:
            host.do(step)
        for step in reversed(steps[:done]):
            inverse = step.inverse()
            if inverse is not None:
                host.do(inverse)
        assert host == Host.of(before), f"after {verbs(steps[:done])}"


@given(FOUND)
def test_removing_comes_before_adding_each_in_its_order(pair: tuple[State, State]) -> None:
    before, after = pair
    steps = list(diff(before, after))
    cuts = range(len(steps) + 1)
    assert any(is_in_order(steps[:cut], REMOVING) and is_in_order(steps[cut:], ADDING) for cut in cuts), verbs(steps)


@given(PAIRS)
def test_new_relay_gets_the_ports_of_one_that_exited(pair: tuple[State, State]) -> None:
    """The ports stay reserved meanwhile, and are steered when the relay has them."""
    after = pair[0]
    before = replace(after, ports={}, steered=dict.fromkeys(after.steered, _RESERVED))
    host = Host.of(before)
    steps = list(diff(before, after))
    for step in steps:
        host.do(step)
    assert host == Host.of(after)
    assert verbs(steps) == ["+Ports"] * bool(after.ports) + ["+Steered"] * bool(after.steered)


EVERYTHING = State(
    BRIDGES,
    {name: attachment(name) for name in VETHS},
    ports={at: own(at, DESTINATIONS[0]) for at in PORTS} | dict(pair for one in STEERED for pair in ports_of(one)),
    steered=dict(pair for one in STEERED for pair in steered_of(one)),
    redirects=HERE,
    mappings=PLANNED,
    forwarding=frozenset({4, 6}),
)


def test_order_of_adding_everything() -> None:
    steps = list(diff(State(), EVERYTHING))
    links = [*["+Bridge"] * 2, *["+Veth"] * 3]
    # Sockets are redirected when all is there; until then the relay listens.
    assert verbs(steps) == [*links, "+Ports", "+Steered", "Rules", "Flows", "Forwarding", "+Redirects"]
    # Only UDP clients can have a tracked connection from before the port was published.
    assert [step for step in steps if isinstance(step, Flows)] == [Flows((), (PLANNED["0.0.0.0:53:53/udp"],))]


def test_order_of_removing_everything() -> None:
    steps = list(diff(EVERYTHING, State()))
    # Tracked connections are deleted when neither rule nor relay can bring them back.
    links = [*["-Veth"] * 3, *["-Bridge"] * 2]
    first = ["-Redirects", "Forwarding", "Rules", "-Steered"]
    assert verbs(steps) == [*first, "-Ports", "Flows", *links]
    assert [step for step in steps if isinstance(step, Flows)] == [Flows(tuple(PLANNED.values()), ())]
