"""The last events of the daemon, for those who follow them.

Readers share one ring of events, and each has a position in it, so that nothing is kept here for a slow one: what the
ring has lost before it was read is counted, and the reader is told.  Events come from any thread, and none of them
waits.
"""

import syslog
from collections import deque
from collections.abc import Callable
from threading import Lock

from gangway.log import Event, event

_SIZE = 1000
_PAGE = 20  # how many events a reader gets at a time: what is sent and not read takes memory


class History:
    """The last `size` events."""

    def __init__(self, size: int = _SIZE) -> None:
        self._events: deque[Event] = deque(maxlen=size)
        self._count = 0  # of all events, those that are not kept any more included
        self._wakes: list[Callable[[], object]] = []
        self._lock = Lock()

    def add(self, happened: Event) -> None:
        with self._lock:
            self._events.append(happened)
            self._count += 1
            wakes, self._wakes = self._wakes, []
        for wake in wakes:
            wake()

    def after(self, position: int | None) -> tuple[list[Event], int]:
        """Return the next events after a position, and the position after them.  None: a new reader's, before all.

        If some are not kept any more, an event that says how many comes first.
        """
        with self._lock:
            first = self._count - len(self._events)
            start = first if position is None else max(position, first)
            found = [self._events[index] for index in range(start - first, len(self._events))[:_PAGE]]
        missed = 0 if position is None else start - position
        return [*([_missed(missed)] if missed else []), *found], start + len(found)

    def wake_after(self, position: int, wake: Callable[[], object]) -> None:
        """Call `wake` once, as soon as there is an event after a position: at once, or in the thread that adds it."""
        with self._lock:
            is_waiting = self._count <= position
            if is_waiting:
                self._wakes.append(wake)
        if not is_waiting:
            wake()

    def forget(self, wake: Callable[[], object]) -> None:
        """Do not call `wake` any more."""
        with self._lock:
            self._wakes = [one for one in self._wakes if one is not wake]


def as_server_sent(happened: Event) -> bytes:
    """Return an event as a message of the HTML standard's server-sent events."""
    return f"data: {happened.as_json()}\n\n".encode(errors="replace")


def _missed(count: int) -> Event:
    text = f"{count} events were missed: they came faster than they were read"
    return event("missed", text, {"missed": count}, syslog.LOG_WARNING)
