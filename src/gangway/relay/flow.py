"""The life of one relayed connection, as a table.

What this file knows: the states that a connection between a client and its backend (the container) can be in, what can
happen to it, and what has to be done then.  What it must not know: sockets, pipes, epoll, bytes, time.

How it works.  A flow has two directions: *up* (client → backend) and *down* (backend → client).  Each ends by itself,
as TCP's half-close wants it.  `TABLE[state, event]` is total: it gives the next state and the actions for every state
that can be reached and every event, also for those that make no sense there (they change nothing: an event loop may
deliver what was overtaken by another event of the same round).  `stream.py` asks it at transitions only, never for
each transfer.

    CONNECTING ──connected──▶ RELAYING ──both directions ended──▶ CLOSED (orderly: both sides saw an end)
         │                        │
         └────failed, reset───────┴──reset, withdrawn──▶ CLOSED (both sides are reset)

A direction of a relaying flow:

    FLOWING ──stalled──▶ STALLED      the receiver takes no more; what was read is held, nothing further is read
       ▲  │                 │
       │  └──ended──▶ ENDED │         the end was read, and passed on
       └────drained─────────┘
"""

from enum import Enum, auto
from typing import NamedTuple


class Phase(Enum):
    """Where the flow as a whole is."""

    CONNECTING = auto()
    RELAYING = auto()
    CLOSED = auto()


class DirectionState(Enum):
    """What one direction does."""

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
    """What has to be done about it.

    CLOSE and RESET are the last thing that a flow asks for, and it asks for one of them once.
    """

    PUMP_UP = auto()
    PUMP_DOWN = auto()
    END_BACKEND = auto()
    END_CLIENT = auto()
    CLOSE = auto()
    RESET = auto()


class FlowState(NamedTuple):
    """A flow's phase and what its two directions do."""

    phase: Phase
    up: DirectionState
    down: DirectionState


Transition = tuple[FlowState, tuple[Action, ...]]

START = FlowState(Phase.CONNECTING, DirectionState.FLOWING, DirectionState.FLOWING)
OPEN = FlowState(Phase.RELAYING, DirectionState.FLOWING, DirectionState.FLOWING)
CLOSED = FlowState(Phase.CLOSED, DirectionState.ENDED, DirectionState.ENDED)

# An event of a direction: (what the direction must be doing, what it does then, what has to be done).
_UP = {
    Event.UP_STALLED: (DirectionState.FLOWING, DirectionState.STALLED, ()),
    Event.UP_DRAINED: (DirectionState.STALLED, DirectionState.FLOWING, (Action.PUMP_UP,)),
    Event.UP_ENDED: (DirectionState.FLOWING, DirectionState.ENDED, (Action.END_BACKEND,)),
}
_DOWN = {
    Event.DOWN_STALLED: (DirectionState.FLOWING, DirectionState.STALLED, ()),
    Event.DOWN_DRAINED: (DirectionState.STALLED, DirectionState.FLOWING, (Action.PUMP_DOWN,)),
    Event.DOWN_ENDED: (DirectionState.FLOWING, DirectionState.ENDED, (Action.END_CLIENT,)),
}
_ABORTS = {Event.CONNECT_FAILED, Event.CLIENT_RESET, Event.BACKEND_RESET, Event.UNPUBLISHED}


def transition(state: FlowState, event: Event) -> Transition:
    """The state after `event`, and what has to be done, in order.  Total; never raises."""
    if state.phase is Phase.CLOSED:
        return CLOSED, ()
    if state.phase is Phase.CONNECTING and event is Event.CONNECTED:
        return OPEN, ()
    if event in _ABORTS and not (event is Event.CONNECT_FAILED and state.phase is Phase.RELAYING):
        return CLOSED, (Action.RESET,)
    if state.phase is Phase.RELAYING:
        return _direction_transition(state, event)
    return state, ()


def _direction_transition(state: FlowState, event: Event) -> Transition:
    """`transition` for what concerns one direction of a relaying flow."""
    if event in _UP:
        needs, then, actions = _UP[event]
        after = state._replace(up=then)
        fits = state.up is needs
    elif event in _DOWN:
        needs, then, actions = _DOWN[event]
        after = state._replace(down=then)
        fits = state.down is needs
    else:
        return state, ()
    if not fits:
        return state, ()
    if after.up is DirectionState.ENDED and after.down is DirectionState.ENDED:
        return CLOSED, (Action.CLOSE,)
    return after, actions


def _reachable() -> dict[tuple[FlowState, Event], Transition]:
    """`transition` for every state that a flow can come to, computed once: a connection pays for a lookup."""
    table: dict[tuple[FlowState, Event], Transition] = {}
    unseen = {START}
    while unseen:
        state = unseen.pop()
        for event in Event:
            table[state, event] = transition(state, event)
        unseen = (unseen | {after for after, _ in table.values()}) - {known for known, _ in table}
    return table


TABLE = _reachable()
