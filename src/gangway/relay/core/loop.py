"""The event loop of a relay process: epoll, timers, what was left for the next round, sockets to close.

What this file knows: descriptors and whom to call when something happens to them.  What it must not know: flows,
leases, protocols.

Some facts about epoll that the relay leans on (epoll(7), fs/eventpoll.c):

* Sockets of flows are registered once, edge-triggered, for everything.  A level-triggered set would look at each
  socket that was reported a second time in the following epoll_wait, and a flow that stalls would cost an epoll_ctl
  each time it stops and goes on.  The price is that whoever is called must use up the edge: read until the kernel has
  no more, or ask to be called `again`.
* "No more" need not be EAGAIN.  A read of a stream that returns less than was asked for has emptied the queue, and
  whatever comes after it makes a new edge (epoll(7), Q9).  The one thing that such a read may leave behind is an end
  that came together with the data: it made no edge of its own.  EPOLLRDHUP tells: it is in the event if the end had
  arrived when epoll_wait looked, and if it arrived later, it makes an edge.
* TCP's urgent data is the other case: a read stops in front of it.  EPOLLPRI is in the event then, and the relay
  reads on as at an end.  (The urgent byte itself is lost, as it is through docker-proxy.)
* An edge reports the whole state of the socket, so EPOLLOUT is in nearly every event.  But an edge *because* of room to
  write comes only after a write that found none (SOCK_NOSPACE), so an idle flow is not woken by acknowledgements.
* A descriptor's number may be taken again as soon as it is closed, and an event for the old socket may still be in
  the batch that is being worked on.  So nothing is closed inside a batch: `close_later` forgets the handler at once,
  and the socket goes when the batch is done.
* To be woken costs more than to look again: some 20 µs until a core that went idle runs the process, more on a
  virtual machine, and twice in every request and answer.  So when the last wait was short, the next one begins with
  looking, for `AWAKE_S` at most, and leaves the core to whoever else wants it in between (sched_yield(2)).  It takes
  less processor time for an exchange than going to sleep does, and a relay without traffic never does it.
* Listening sockets are level-triggered: one accept for each report, no accept that only finds EAGAIN, and a listener
  with a long queue shares the loop with everybody else.
"""

import heapq
import os
import select
import time
from collections.abc import Callable
from itertools import count
from typing import Protocol

Handler = Callable[[int], None]
"""Called with the epoll event mask of a descriptor."""

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
FAILED = select.EPOLLERR
ENDED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLPRI
EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET

# How long a wait may take to count as short, and how long one stays awake for the next: some times what waking up
# costs.
AWAKE_S = 100e-6
# How many events one epoll_wait takes.  A batch is also the time for which a descriptor stays open after its flow is
# gone.
BATCH = 128


class Closable(Protocol):
    """A socket, to the loop."""

    def close(self) -> None: ...

    def fileno(self) -> int: ...


class Timer:
    """A call that is to be made once; `cancel` takes it back."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Takes the call back.  Its place in the queue goes when its time comes."""
        self.call = None


class Loop:
    """One epoll set and one queue of timers.  `clock` gives seconds, monotonic; tests turn their own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()
        self._again: list[tuple[Handler, int]] = []
        self._at_end: list[Callable[[], None]] = []
        self._closing: list[Closable] = []
        self._stopped = False
        self.chatty = False
        """The last wait was short.  Whoever moves bulk says no: it waits for room and pages, not for an answer."""

    def add(self, fd: int, ready: Handler, events: int = EDGES) -> None:
        """Calls `ready` with the event mask whenever one of `events` happens to `fd`."""
        self._handlers[fd] = ready
        self._epoll.register(fd, events)

    def set_handler(self, fd: int, ready: Handler) -> None:
        """From now on it is `ready` that is called for `fd`; the kernel is not asked."""
        self._handlers[fd] = ready

    def modify(self, fd: int, events: int) -> None:
        """Waits for other events of `fd`; 0 leaves only errors."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """`fd` stays open and is somebody else's from now on."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close_later(self, closable: Closable) -> None:
        """Forgets a socket at once and closes it when the batch is done (see the head of this file)."""
        self._handlers.pop(closable.fileno(), None)
        self._closing.append(closable)

    def call_soon(self, ready: Handler, events: int) -> None:
        """Calls `ready(events)` in the next round, after everybody else had a turn."""
        self._again.append((ready, events))

    def call_at_end(self, call: Callable[[], None]) -> None:
        """Makes one call when everybody had a turn in this round."""
        self._at_end.append(call)

    def call_in(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Makes one call in `delay_s` seconds."""
        timer = Timer(call)
        heapq.heappush(self._timers, (self.clock() + delay_s, next(self._order), timer))
        return timer

    def stop(self) -> None:
        """`run` returns after this round."""
        self._stopped = True

    def run(self) -> None:
        """Goes round until `stop`."""
        self._stopped = False
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """One round: waits for events, then makes all the calls that are due."""
        again, self._again = self._again, []
        handlers = self._handlers
        for fd, events in self._wait(0 if again or self._at_end else self._patience_s()):
            ready = handlers.get(fd)
            if ready is not None:
                ready(events)
        for ready, events in again:
            ready(events)
        if self._at_end:
            self._end()
        if self._timers:
            self._ring()
        if self._closing:
            self._close()

    def close(self) -> None:
        """Closes what was left to close, and the epoll set.  The sockets still in it are their owners' to close."""
        self._close()
        self._epoll.close()

    def _wait(self, patience_s: float) -> list[tuple[int, int]]:
        """The next batch of events; awake for a while if the last one came quickly (see the head of this file)."""
        poll, clock = self._epoll.poll, self.clock
        began_s = clock()
        if self.chatty and patience_s:
            while clock() - began_s < AWAKE_S:
                batch = poll(0, BATCH)
                if batch:
                    return batch
                os.sched_yield()
        batch = poll(patience_s, BATCH)
        self.chatty = clock() - began_s < AWAKE_S
        return batch

    def _patience_s(self) -> float:
        """How long epoll may wait, in seconds: until the first timer, for ever (-1) without one."""
        return max(0.0, self._timers[0][0] - self.clock()) if self._timers else -1

    def _end(self) -> None:
        at_end, self._at_end = self._at_end, []
        for call in at_end:
            call()

    def _ring(self) -> None:
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                call()

    def _close(self) -> None:
        closing, self._closing = self._closing, []
        for closable in closing:
            closable.close()
