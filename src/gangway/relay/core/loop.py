"""The event loop of the relay process: epoll, timers, deferred calls, and descriptors to close.

It serves the control socket; clients are served by threads of the C library (`core.h`).

Kernel facts (epoll(7), fs/eventpoll.c):

* The number of a closed descriptor can be used again at once, while an event for the old socket is still in the batch
  of events that is being handled.  So nothing is closed within a batch: `close_later` removes the handler at once, and
  closes the descriptor after the batch.
* Sockets are level-triggered: one call for each report, so that one with much to read shares the loop with all others.
"""

import heapq
import select
import time
from collections.abc import Callable
from itertools import count
from typing import Protocol, cast

Handler = Callable[[int], None]
"""Called with the epoll event mask of a descriptor.  If it is a method of an `Abortable`, that is given up when the
handler raises; any other handler is removed: the loop goes on for everybody else."""

READABLE = select.EPOLLIN

# The number of events that one epoll_wait returns.
BATCH = 128


class Abortable(Protocol):
    """What an unexpected error in a handler ends, or leaves as it is."""

    def abort(self) -> str:
        """Give up, whatever the state is, and return what was done, for the log."""


class Timer:
    """A callback to be called once, unless it is cancelled before."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Cancel the call.  The timer's entry stays in the queue until it is due."""
        self.callback = None


class Loop:
    """One epoll set and one queue of timers.  `clock` returns monotonic seconds; tests supply their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._soon: list[tuple[Handler, int]] = []
        self._closing: list[Callable[[], None]] = []
        self._stopped = False
        self.on_error: Callable[[Exception, str], None] = _raise
        """Called after an unexpected error, with what was given up."""

    def add(self, fd: int, handler: Handler, events: int = READABLE) -> None:
        """Call `handler` with the event mask whenever one of `events` occurs on `fd`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events of `fd`; 0 leaves only errors."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Remove `fd` from the loop; it stays open."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close_later(self, fd: int, close: Callable[[], None]) -> None:
        """Remove a descriptor's handler at once, and call `close` after the batch (see the head of this file)."""
        self._handlers.pop(fd, None)
        self._closing.append(close)

    def call_soon(self, handler: Handler, events: int) -> None:
        """Call `handler(events)` in the next round, after the handlers of that round's events."""
        self._soon.append((handler, events))

    def call_in(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once, in `delay_s` seconds."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.clock() + delay_s, next(self._order), timer))
        return timer

    def stop(self) -> None:
        """Make `run` return after this round."""
        self._stopped = True

    def run(self) -> None:
        """Run rounds until `stop` is called."""
        self._stopped = False
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """Run one round: wait for events, then make all the calls that are due."""
        soon, self._soon = self._soon, []
        handlers = self._handlers
        for fd, events in self._epoll.poll(0 if soon else self._timeout_s(), BATCH):
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(events)
                except Exception as error:
                    self._abort(error, handler, fd)
        for handler, events in soon:
            try:
                handler(events)
            except Exception as error:
                self._abort(error, handler)
        if self._timers:
            self._call_due_timers()
        if self._closing:
            self._close()

    def close(self) -> None:
        """Close what waits to be closed, and the epoll set.  Registered descriptors remain with their owners."""
        self._close()
        self._epoll.close()

    def _abort(self, error: Exception, handler: Handler, fd: int = -1) -> None:
        """Give up what an unexpected error has happened in, and report it."""
        owner = getattr(handler, "__self__", None)
        if not hasattr(owner, "abort"):
            self.forget(fd)
            return self.on_error(error, "it is not called again")
        try:
            done = cast(Abortable, owner).abort()
        except Exception as another:
            done = f"giving up failed, too: {another!r}"
        return self.on_error(error, done)

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self.on_error(error, "it was not completed")

    def _timeout_s(self) -> float:
        """Return the seconds until the first timer is due, or -1 (no limit) without timers."""
        return max(0.0, self._timers[0][0] - self.clock()) if self._timers else -1

    def _call_due_timers(self) -> None:
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._guarded(callback)

    def _close(self) -> None:
        closing, self._closing = self._closing, []
        for close in closing:
            close()


def _raise(error: Exception, _done: str) -> None:
    raise error
