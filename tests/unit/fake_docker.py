"""An API like Docker's, on a Unix socket, whose answers a test sets."""

import asyncio
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web


class FakeDocker:
    """Serves `networks` and `containers` for an `async with` block; `requests` are the paths that were asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.networks: list[dict[str, Any]] = []
        self.containers: dict[str, Any] = {}
        self.status: dict[str, int] = {}  # of a path, if it is not 200
        self.requests: list[str] = []
        self.query: dict[str, str] = {}  # of the request for events
        self._stream: asyncio.Queue[bytes] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/events", self._events)
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
        await self._runner.setup()
        self.path.unlink(missing_ok=True)
        await web.UnixSite(self._runner, str(self.path)).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_stream()
        await self._runner.cleanup()

    def send(self, data: bytes) -> None:
        """Send a part of the stream of events."""
        self._stream.put_nowait(data)

    @property
    def is_sent(self) -> bool:
        """True if all events have been sent."""
        return self._stream.empty()

    def happen(self, kind: str, action: str, subject: str, **attributes: str) -> None:
        """Send an event."""
        event = {"Type": kind, "Action": action, "Actor": {"ID": subject, "Attributes": attributes}, "time": 1}
        self.send(json.dumps(event).encode() + b"\n")

    def end_stream(self) -> None:
        self.send(b"")

    async def _events(self, request: web.Request) -> web.StreamResponse:
        self.query = dict(request.query)
        answer = web.StreamResponse(headers={"Server": "Docker/99.1 (linux)"})
        self._stream = asyncio.Queue()
        await answer.prepare(request)
        while data := await self._stream.get():
            await answer.write(data)
        return answer

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path
        self.requests.append(path)
        status = self.status.get(path, 200)
        if path == "/networks":
            said: Any = self.networks
        elif path == "/containers/json":
            said = [
                {"Id": name, **one, "State": "running" if one.get("State", {}).get("Running") else "exited"}
                for name, one in self.containers.items()
            ]
        else:
            said = self.containers.get(path.split("/")[2])
            status = 404 if said is None and status == 200 else status
        return web.json_response({"message": "it broke"} if status != 200 else said, status=status)
