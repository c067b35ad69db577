"""The event loop of the relay process: epoll, timers, deferred calls, and sockets to close.

It serves UDP and the control socket; byte streams have threads of their own (`core.h`).

Kernel facts (epoll(7), fs/eventpoll.c):

* The number of a closed descriptor can be used again at once, while an event for the old socket is still in the batch
  of events that is being handled.  So nothing is closed within a batch: `close_later` removes the handler at once, and
  closes the socket after the batch.
* Waking up costs more than polling again: some 20 µs until a core that was idle runs the process, more on a virtual
  machine, and twice for every request and answer.  So after a short wait the loop polls for up to `AWAKE_S` before it
  sleeps, and yields the core in between (sched_yield(2)).  A relay without traffic never does it.
* Sockets are level-triggered: one call for each report, so that one with much to read shares the loop with all others.
"""

import heapq
import os
import select
import time
from collections.abc import Callable
from itertools import count
from socket import SocketType
from typing import Protocol, cast

Handler = Callable[[int], None]
"""Called with the epoll event mask of a descriptor.  If it is a method of an `Abortable`, that is given up when the
handler raises; any other handler is removed: the loop goes on for everybody else."""

READABLE = select.EPOLLIN

# A wait shorter than this is short, and the loop polls for as long before it sleeps: a few times the cost of waking up.
AWAKE_S = 100e-6
# The number of events that one epoll_wait returns.  Descriptors of ended flows stay open until the batch is handled.
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
        self._at_end: list[Callable[[], None]] = []
        self._closing: list[SocketType] = []
        self._stopped = False
        self.on_error: Callable[[Exception, str], None] = _raise
        """Called after an unexpected error, with what was given up."""
        self._chatty = False
        """True if the last wait was short."""

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

    def close_later(self, sock: SocketType) -> None:
        """Remove a socket's handler at once, and close it after the batch (see the head of this file)."""
        self._handlers.pop(sock.fileno(), None)
        self._closing.append(sock)

    def call_soon(self, handler: Handler, events: int) -> None:
        """Call `handler(events)` in the next round, after the handlers of that round's events."""
        self._soon.append((handler, events))

    def call_at_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, at the end of this round."""
        self._at_end.append(callback)

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
        for fd, events in self._wait(0 if soon or self._at_end else self._timeout_s()):
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
        if self._at_end:
            at_end, self._at_end = self._at_end, []
            for callback in at_end:
                self._guarded(callback)
        if self._timers:
            self._call_due_timers()
        if self._closing:
            self._close()

    def fail(self, error: Exception, owner: Abortable) -> None:
        """Give up what an unexpected error has happened in, and report it."""
        try:
            done = owner.abort()
        except Exception as another:
            done = f"giving up failed, too: {another!r}"
        self.on_error(error, done)

    def close(self) -> None:
        """Close the sockets that wait to be closed, and the epoll set.  Registered sockets remain with their owners."""
        self._close()
        self._epoll.close()

    def _abort(self, error: Exception, handler: Handler, fd: int = -1) -> None:
        owner = getattr(handler, "__self__", None)
        if hasattr(owner, "abort"):
            return self.fail(error, cast(Abortable, owner))
        self.forget(fd)
        return self.on_error(error, "it is not called again")

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception as error:
            self.on_error(error, "it was not completed")

    def _wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Return the next batch of events; poll for a while first if the last one came quickly."""
        poll, clock = self._epoll.poll, self.clock
        began_s = clock()
        if self._chatty and timeout_s:
            while clock() - began_s < AWAKE_S:
                batch = poll(0, BATCH)
                if batch:
                    return batch
                os.sched_yield()
        batch = poll(timeout_s, BATCH)
        self._chatty = clock() - began_s < AWAKE_S
        return batch

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
        for sock in closing:
            sock.close()


def _raise(error: Exception, _done: str) -> None:
    raise error
