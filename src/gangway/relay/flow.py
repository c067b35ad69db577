"""The life of one relayed connection, as a table of states and events.

This file does not know sockets, pipes, epoll, bytes or time; the core (`core/flow.c`) reports events to it and carries
out the actions: `make build` makes its table from `TABLE`.

How it works.  A flow joins a client's connection with one to the backend (the container).  It has two directions: *up*
(client → backend) and *down* (backend → client).  Each direction ends on its own, as TCP's half-close requires.
`TABLE[state, event]` gives the next state and the actions for every reachable state and every event.  An event that
makes no sense in a state changes nothing: another event of the same round of the event loop may have overtaken it.
The core uses the table at transitions only, not for each transfer.

    CONNECTING ──connected──▶ RELAYING ──both directions ended──▶ CLOSED (orderly: both sides saw an end)
         │                        │
         └────failed, reset───────┴──reset, unpublished──▶ CLOSED (both sides are reset)

A direction of a relaying flow:

    FLOWING ──stalled──▶ STALLED      the receiver's buffer is full; data is held, nothing more is read
       ▲  │                 │
       │  └──ended──▶ ENDED │         the end was read, and passed on
       └────drained─────────┘
"""

from enum import Enum, auto
from typing import NamedTuple


class Phase(Enum):
    """The phase of the flow as a whole."""

    CONNECTING = auto()
    RELAYING = auto()
    CLOSED = auto()


class DirectionState(Enum):
    """The state of one direction."""

    FLOWING = auto()
    STALLED = auto()
    ENDED = auto()


class Event(Enum):
    """What can happen to a flow."""

    CONNECTED = auto()
    CONNECT_FAILED = auto()
    UP_STALLED = auto()
    UP_DRAINED = auto()
    UP_ENDED = auto()
    DOWN_STALLED = auto()
    DOWN_DRAINED = auto()
    DOWN_ENDED = auto()
    CLIENT_RESET = auto()
    BACKEND_RESET = auto()
    UNPUBLISHED = auto()


class Action(Enum):
    """What a transition requires to be done.

    A flow ends with either CLOSE or RESET: one of them, once, as its last action.
    """

    PUMP_UP = auto()
    PUMP_DOWN = auto()
    END_BACKEND = auto()
    END_CLIENT = auto()
    CLOSE = auto()
    RESET = auto()


class FlowState(NamedTuple):
    """The state of a flow: its phase, and the state of each direction."""

    phase: Phase
    up: DirectionState
    down: DirectionState


Transition = tuple[FlowState, tuple[Action, ...]]

START = FlowState(Phase.CONNECTING, DirectionState.FLOWING, DirectionState.FLOWING)
OPEN = FlowState(Phase.RELAYING, DirectionState.FLOWING, DirectionState.FLOWING)
CLOSED = FlowState(Phase.CLOSED, DirectionState.ENDED, DirectionState.ENDED)

# For each event of a direction: the direction, the state that it applies to, the state after it, and the actions.
_STEPS: dict[Event, tuple[str, DirectionState, DirectionState, tuple[Action, ...]]] = {
    Event.UP_STALLED: ("up", DirectionState.FLOWING, DirectionState.STALLED, ()),
    Event.UP_DRAINED: ("up", DirectionState.STALLED, DirectionState.FLOWING, (Action.PUMP_UP,)),
    Event.UP_ENDED: ("up", DirectionState.FLOWING, DirectionState.ENDED, (Action.END_BACKEND,)),
    Event.DOWN_STALLED: ("down", DirectionState.FLOWING, DirectionState.STALLED, ()),
    Event.DOWN_DRAINED: ("down", DirectionState.STALLED, DirectionState.FLOWING, (Action.PUMP_DOWN,)),
    Event.DOWN_ENDED: ("down", DirectionState.FLOWING, DirectionState.ENDED, (Action.END_CLIENT,)),
}
_ABORTS = {Event.CONNECT_FAILED, Event.CLIENT_RESET, Event.BACKEND_RESET, Event.UNPUBLISHED}


def transition(state: FlowState, event: Event) -> Transition:
    """Return the state after `event` and the actions, in order.  Defined for all arguments; never raises."""
    if state.phase is Phase.CLOSED:
        return CLOSED, ()
    if state.phase is Phase.CONNECTING and event is Event.CONNECTED:
        return OPEN, ()
    if event in _ABORTS and not (event is Event.CONNECT_FAILED and state.phase is Phase.RELAYING):
        return CLOSED, (Action.RESET,)
    if state.phase is not Phase.RELAYING or event not in _STEPS:
        return state, ()
    direction, required, following, actions = _STEPS[event]
    if getattr(state, direction) is not required:
        return state, ()
    after = state._replace(up=following) if direction == "up" else state._replace(down=following)
    if after.up is DirectionState.ENDED and after.down is DirectionState.ENDED:
        return CLOSED, (Action.CLOSE,)
    return after, actions


def _reachable() -> dict[tuple[FlowState, Event], Transition]:
    """Compute `transition` for every reachable state and every event, so that each connection only pays for lookups."""
    table: dict[tuple[FlowState, Event], Transition] = {}
    unseen = {START}
    while unseen:
        state = unseen.pop()
        for event in Event:
            table[state, event] = transition(state, event)
        unseen = (unseen | {after for after, _ in table.values()}) - {known for known, _ in table}
    return table


TABLE = _reachable()
