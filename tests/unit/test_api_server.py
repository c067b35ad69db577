"""The API's HTTP server: how it answers what fails, limits its clients, and ends while they do not read."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gangway.daemon.api import application
from gangway.daemon.history import History
from gangway.daemon.server import _serve
from gangway.docker.client import AnswerRefused
from gangway.errors import Conflict, GangwayError, TimedOut
from gangway.log import Event, Log
from gangway.relay.connection import RelayExited, RelayFailed, RelayHung


class Server:
    """A server over a stand-in for the daemon; `events` are those of its log."""

    def __init__(self, folder: Path, scope: ExitStack, is_for_reading: bool = False, **service: Any) -> None:
        self.events: list[Event] = []
        self.log = Log(self.events.append, lambda: 50.0)
        self._path, self._scope = str(folder / "api.sock"), scope
        worker, reader = (scope.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        listener = scope.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(self._path)
        listener.listen()
        listener.setblocking(False)
        made: Any = SimpleNamespace(requests=SimpleNamespace(is_ready=True), history=History(), **service)
        app = application(made, worker, reader, self.log, lambda: None, is_for_reading)
        self.task = asyncio.get_running_loop().create_task(_serve(app, listener, self.log))

    async def connect(self, sent: bytes) -> socket.socket:
        """Return a client that has sent this."""
        client = self._scope.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(self._path)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(client, sent)
        return client

    async def ask(self, method: str, path: str) -> tuple[int, Any]:
        """Send a request; return the status and the answer."""
        return await answer_of(await self.connect(f"{method} {path} HTTP/1.0\r\n\r\n".encode()))

    async def end(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def answer_of(client: socket.socket) -> tuple[int, Any]:
    received, loop = b"", asyncio.get_running_loop()
    while part := await loop.sock_recv(client, 65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


Test = Callable[[ExitStack], Awaitable[None]]


def run(test: Test) -> None:
    async def limited() -> None:
        with ExitStack() as scope:
            async with asyncio.timeout(20):
                await test(scope)

    asyncio.run(limited())


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Conflict, 409, "Conflict"),
        (TimedOut, 503, "TimedOut"),
        (RelayFailed, 500, "HostRefused"),
        (RelayExited, 500, "HostRefused"),
        (RelayHung, 500, "HostRefused"),
        (AnswerRefused, 500, "HostRefused"),
    ],
)
def test_an_error_is_answered_by_the_nearest_documented_one(
    tmp_path: Path, error: type[GangwayError], status: int, kind: str
) -> None:
    def fail() -> None:
        raise error("the relay exited")

    async def test(scope: ExitStack) -> None:
        server = Server(tmp_path, scope, status=fail)
        assert await server.ask("GET", "/status") == (status, {"kind": kind, "error": "the relay exited"})
        assert [one.name for one in server.events] == ["refused"]
        await server.end()

    run(test)


def test_a_client_that_is_refused_again_and_again_does_not_fill_the_log(tmp_path: Path) -> None:
    async def test(scope: ExitStack) -> None:
        server = Server(tmp_path, scope, is_for_reading=True)
        for number in range(50):
            assert (await server.ask("POST", "/stop"))[0] == 403
            assert (await server.ask("GET", f"/nowhere/{number}"))[0] == 404
        assert [one.fields["kind"] for one in server.events] == ["Forbidden", "InvalidRequest"]
        await server.end()

    run(test)
