"""Sends events to API clients as they happen: server-sent events (html.spec.whatwg.org, 9.2)."""

import asyncio
from contextlib import suppress

from aiohttp import web

from gangway.daemon.history import History, as_server_sent
from gangway.errors import Busy

_SILENT_S = 30.0  # how long nothing is sent: a client that is gone is noticed, and one that waits knows that we live
_COMMENT = b": no event\n\n"
_MAX_STREAMS = 64  # on each socket


class Streams:
    """The clients that follow events.

    One that does not read what it was sent delays nobody else, but its connection buffers some 150 KB.  Therefore
    their number is limited.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def check_room(self) -> None:
        """Busy: there are as many streams as there may be."""
        if len(self._tasks) >= _MAX_STREAMS:
            raise Busy(f"{len(self._tasks)} clients follow events already: end one of them")

    async def send(self, request: web.Request, history: History) -> web.StreamResponse:
        """Send all events that are kept, and then each new one, until the client or the daemon ends."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await response.prepare(request)
            position = None
            while True:
                events, position = history.after(position)
                await response.write(b"".join(map(as_server_sent, events)) or _COMMENT)
                await _next(history, position)
        finally:
            self._tasks.discard(task)

    def end(self) -> None:
        """End all streams: the daemon ends."""
        for task in self._tasks:
            task.cancel()


async def _next(history: History, position: int) -> None:
    """Wait for an event after a position, or until something should be sent in any case."""
    arrived, loop = asyncio.Event(), asyncio.get_running_loop()

    def wake() -> None:
        with suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(arrived.set)

    history.wake_after(position, wake)
    try:
        async with asyncio.timeout(_SILENT_S):
            await arrived.wait()
    except TimeoutError:
        pass
    finally:
        history.forget(wake)
