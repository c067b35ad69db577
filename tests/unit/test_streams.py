"""Events as API clients get them: also one that does not read for a while, and one that never does."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aiohttp import web

from gangway.daemon.history import History
from gangway.daemon.streams import Streams
from gangway.log import event

_REQUEST = b"GET /events HTTP/1.0\r\n\r\n"
_COUNT, _KEPT = 3000, 20  # more events than a socket holds, and than are kept


def _connect(path: Path, scope: ExitStack) -> socket.socket:
    sock = scope.enter_context(socket.socket(socket.AF_UNIX))
    sock.connect(str(path))
    sock.sendall(_REQUEST)
    sock.setblocking(False)
    return sock


def _events(received: bytes) -> Iterator[dict[str, Any]]:
    for line in received.splitlines():
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def test_a_client_that_does_not_read_learns_what_it_has_missed_and_delays_nobody(tmp_path: Path) -> None:
    history, streams = History(_KEPT), Streams()

    async def read(sock: socket.socket, last: int) -> list[dict[str, Any]]:
        received, loop = b"", asyncio.get_running_loop()
        while f'"number": {last}'.encode() not in received:
            received += await loop.sock_recv(sock, 1 << 20)
        return [*_events(received)]

    async def follow(request: web.Request) -> web.StreamResponse:
        return await streams.send(request, history)

    async def serve(scope: ExitStack) -> None:
        app = web.Application()
        app.router.add_get("/events", follow)

        async def end(_app: web.Application) -> None:
            streams.end()

        app.on_shutdown.append(end)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.UnixSite(runner, str(tmp_path / "socket")).start()
        history.add(event("counted", "first", {"number": -1}))
        slow, never, quick = (_connect(tmp_path / "socket", scope) for _ in range(3))
        assert [one["number"] for one in await read(quick, -1)] == [-1]
        for number in range(_COUNT):
            history.add(event("counted", "x" * 1000, {"number": number}))
            await asyncio.sleep(0)
        assert (await read(quick, _COUNT - 1))[-1]["number"] == _COUNT - 1
        first, *seen = await read(slow, _COUNT - 1)
        assert first["number"] == -1
        missed = [one["missed"] for one in seen if one["event"] == "missed"]
        assert missed
        assert sum(missed) + len(seen) - len(missed) == _COUNT
        async with asyncio.timeout(5):  # though one of them has not read anything yet
            await runner.cleanup()
            while await asyncio.get_running_loop().sock_recv(never, 1 << 20):
                pass

    with ExitStack() as scope:
        asyncio.run(serve(scope))
