"""Prints `flow_table.h`: the states, events and transitions of `relay/flow.py`, for the core.  For `make build`."""

from gangway.relay.flow import CLOSED, TABLE, Action, DirectionState, Event, FlowState, Phase


def c_table() -> str:
    """Return the header's text."""
    states = sorted({state for state, _ in TABLE} | {CLOSED}, key=_name)
    actions = ", ".join(["NO_ACTION", *(one.name for one in Action)])
    rows = "\n".join(f"    [{_name(state)}] = {{{_row(state)}}}," for state in states)
    reads = "\n".join(f"    [{_name(state)}] = {{{_reads(state, 'up')}, {_reads(state, 'down')}}}," for state in states)
    return f"""\
/* Made from relay/flow.py by relay/core/table.py. */
enum state {{ {", ".join(map(_name, states))} }};
enum event {{ {", ".join(one.name for one in Event)}, EVENT_COUNT }};
enum action {{ {actions} }};

struct transition {{
    unsigned char state, action;
}};

/* The next state, and the action. */
static const struct transition TRANSITIONS[][EVENT_COUNT] __attribute__((unused)) = {{
{rows}
}};

/* The directions that are read from in a state. */
static const struct {{
    unsigned char up, down;
}} READS[] __attribute__((unused)) = {{
{reads}
}};
"""


def _name(state: FlowState) -> str:
    return "_".join(["STATE", *(one.name for one in state)]) if state.phase is Phase.RELAYING else state.phase.name


def _row(state: FlowState) -> str:
    cells = []
    for event in Event:
        after, actions = TABLE[state, event]
        action = actions[0].name if actions else "NO_ACTION"
        assert len(actions) <= 1, "the core carries out one action for an event"
        cells.append(f"[{event.name}] = {{{_name(after)}, {action}}}")
    return ", ".join(cells)


def _reads(state: FlowState, direction: str) -> int:
    return int(state.phase is Phase.RELAYING and getattr(state, direction) is DirectionState.FLOWING)


if __name__ == "__main__":
    print(c_table(), end="")
