"""The state table of a flow: it is complete, every state can end, and a flow ends once."""

from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.relay.flow import CLOSED, OPEN, START, TABLE, Action, DirectionState, Event, FlowState, Phase, transition

ABORTS = {Event.CLIENT_RESET, Event.BACKEND_RESET, Event.UNPUBLISHED}
LAST = {Action.CLOSE, Action.RESET}
REACHABLE = {state for state, _ in TABLE}
SEQUENCES = st.lists(st.sampled_from(Event), max_size=30)


class Played(NamedTuple):
    """One step of a flow's life."""

    before: FlowState
    event: Event
    after: FlowState
    actions: tuple[Action, ...]


def play(events: Iterable[Event], state: FlowState = START) -> list[Played]:
    """Apply `events` one after the other."""
    played = []
    for event in events:
        after, actions = TABLE[state, event]
        played.append(Played(state, event, after, actions))
        state = after
    return played


def actions_of(played: Iterable[Played]) -> list[Action]:
    """Return all actions, in order."""
    return [action for one in played for action in one.actions]


def test_table_covers_all_reachable_states_and_events() -> None:
    assert set(TABLE) == {(state, event) for state in REACHABLE for event in Event}
    assert {after for after, _ in TABLE.values()} | {START} == REACHABLE


def test_reachable_states_are_the_meaningful_ones() -> None:
    relaying = {FlowState(Phase.RELAYING, up, down) for up in DirectionState for down in DirectionState}
    assert {START, CLOSED} | relaying - {CLOSED._replace(phase=Phase.RELAYING)} == REACHABLE


@pytest.mark.parametrize("state", sorted(REACHABLE, key=str), ids=str)
def test_every_state_can_be_aborted(state: FlowState) -> None:
    ends = {TABLE[state, abort][0] for abort in ABORTS}
    assert ends == {CLOSED}


@pytest.mark.parametrize(
    "state", [state for state in sorted(REACHABLE, key=str) if state.phase is Phase.RELAYING], ids=str
)
def test_every_relaying_state_can_end_orderly(state: FlowState) -> None:
    ending = (Event.UP_DRAINED, Event.UP_ENDED, Event.DOWN_DRAINED, Event.DOWN_ENDED)
    played = play(ending, state)
    assert played[-1].after == CLOSED
    assert actions_of(played)[-1] is Action.CLOSE


@pytest.mark.parametrize("event", Event, ids=str)
def test_closed_flow_ignores_all_events(event: Event) -> None:
    assert TABLE[CLOSED, event] == (CLOSED, ())


@pytest.mark.parametrize(("state", "event"), sorted(TABLE, key=str), ids=str)
def test_table_agrees_with_transition(state: FlowState, event: Event) -> None:
    assert TABLE[state, event] == transition(state, event)


@pytest.mark.parametrize(("state", "event"), sorted(TABLE, key=str), ids=str)
def test_flow_is_closed_exactly_by_close_and_reset(state: FlowState, event: Event) -> None:
    after, actions = TABLE[state, event]
    closes = state is not CLOSED and state != CLOSED and after == CLOSED
    assert [action for action in actions if action in LAST] == list(actions if closes else ())
    assert len(actions) <= 1


@pytest.mark.parametrize(("state", "event"), sorted(TABLE, key=str), ids=str)
def test_abort_resets_both_sides(state: FlowState, event: Event) -> None:
    aborts = event in ABORTS or (event is Event.CONNECT_FAILED and state.phase is Phase.CONNECTING)
    _, actions = TABLE[state, event]
    assert (actions == (Action.RESET,)) is (aborts and state != CLOSED)


def test_connecting_ignores_events_of_directions() -> None:
    for event in Event:
        if event not in ABORTS | {Event.CONNECTED, Event.CONNECT_FAILED}:
            assert TABLE[START, event] == (START, ())
    assert TABLE[START, Event.CONNECTED] == (OPEN, ())


def test_half_close_does_not_affect_the_other_direction() -> None:
    ended, actions = TABLE[OPEN, Event.UP_ENDED]
    assert (ended, actions) == (OPEN._replace(up=DirectionState.ENDED), (Action.END_BACKEND,))
    stalled, _ = TABLE[ended, Event.DOWN_STALLED]
    assert TABLE[stalled, Event.DOWN_DRAINED] == (ended, (Action.PUMP_DOWN,))
    assert TABLE[ended, Event.DOWN_ENDED] == (CLOSED, (Action.CLOSE,))


@given(SEQUENCES)
def test_no_action_follows_close_or_reset(events: list[Event]) -> None:
    played = play(events)
    actions = actions_of(played)
    last = [place for place, action in enumerate(actions) if action in LAST]
    closed = bool(played) and played[-1].after == CLOSED
    assert last == ([len(actions) - 1] if closed else [])


@given(SEQUENCES)
def test_end_is_passed_on_once(events: list[Event]) -> None:
    actions = actions_of(play(events))
    assert actions.count(Action.END_BACKEND) <= 1
    assert actions.count(Action.END_CLIENT) <= 1


@given(SEQUENCES)
def test_every_end_is_passed_on(events: list[Event]) -> None:
    ends = {Event.UP_ENDED: Action.END_BACKEND, Event.DOWN_ENDED: Action.END_CLIENT}
    for before, event, _, actions in play(events):
        if event in ends and before.phase is Phase.RELAYING:
            flows = (before.up if event is Event.UP_ENDED else before.down) is DirectionState.FLOWING
            other_ended = DirectionState.ENDED in ((before.down,) if event is Event.UP_ENDED else (before.up,))
            expected = Action.CLOSE if other_ended else ends[event]
            assert actions == ((expected,) if flows else ())


@given(SEQUENCES)
def test_drained_direction_is_pumped_again_once(events: list[Event]) -> None:
    played = play(events)
    for stalled, drained, pump in (
        (Event.UP_STALLED, Event.UP_DRAINED, Action.PUMP_UP),
        (Event.DOWN_STALLED, Event.DOWN_DRAINED, Action.PUMP_DOWN),
    ):
        stalls = sum(one.event is stalled and one.after != one.before for one in played)
        drains = sum(one.event is drained and one.after != one.before for one in played)
        assert actions_of(played).count(pump) == drains
        assert stalls - drains in (0, 1)


@given(SEQUENCES)
def test_two_ends_close_orderly_and_aborts_reset(events: list[Event]) -> None:
    for before, event, after, actions in play(events):
        if before != CLOSED and after == CLOSED:
            orderly = event in (Event.UP_ENDED, Event.DOWN_ENDED)
            assert actions == ((Action.CLOSE,) if orderly else (Action.RESET,))
