"""The API's HTTP server: how it answers what fails, limits its clients, and ends while they do not read."""

import asyncio
import fcntl
import json
import socket
import sys
import termios
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from gangway import log
from gangway.daemon import server as server_module
from gangway.daemon import streams
from gangway.daemon.api import application
from gangway.daemon.history import History
from gangway.daemon.server import _serve
from gangway.docker.client import AnswerRefused
from gangway.errors import Conflict, GangwayError, TimedOut
from gangway.relay.connection import RelayExited, RelayFailed, RelayHung


class Server:
    """A server over a stand-in for the daemon; `events` are those of its log."""

    def __init__(self, folder: Path, scope: ExitStack, is_for_reading: bool = False, **service: Any) -> None:
        self.events: list[log.Event] = []
        self.history = History()
        self.log = log.Log(self.events.append, lambda: 50.0)
        self._path, self._scope = str(folder / "api.sock"), scope
        worker, reader = (scope.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        listener = scope.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(self._path)
        listener.listen()
        listener.setblocking(False)
        parts = {"requests": SimpleNamespace(is_ready=True), "history": self.history, "names": dict}
        made: Any = SimpleNamespace(**parts, **service)
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
        await asyncio.wait([self.task])


async def answer_of(client: socket.socket) -> tuple[int, Any]:
    received, loop = b"", asyncio.get_running_loop()
    while part := await loop.sock_recv(client, 65536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def _unread_bytes(client: socket.socket) -> int:
    return int.from_bytes(fcntl.ioctl(client, termios.FIONREAD, bytes(4)), sys.byteorder)


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


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /openapi.json HTTP/1.1\r\nHost: gangway\r\n\r\n" * 200,
        b"POST /mappings HTTP/1.1\r\nHost: gangway\r\nContent-Length: 1000\r\n\r\n{",
    ],
    ids=["answers that are not read", "an incomplete request"],
)
def test_the_daemon_does_not_wait_for_clients_that_do_not_go_on(
    tmp_path: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_UNREAD_S", 0.1)

    async def test(scope: ExitStack) -> None:
        server = Server(tmp_path, scope, version=lambda: None)
        client = await server.connect(sent)
        before = -1
        while before != (before := _unread_bytes(client)):  # until the client's socket is full
            for _ in range(3):  # other clients are served meanwhile
                assert (await server.ask("GET", "/version"))[0] == 200
        async with asyncio.timeout(5):
            await server.end()

    run(test)


def test_what_is_being_carried_out_is_answered_before_the_daemon_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it takes longer than clients have for reading."""
    monkeypatch.setattr(server_module, "_UNREAD_S", 0.05)
    started, may_end = Event(), Event()

    def reload() -> list[str]:
        started.set()
        may_end.wait(10)
        return ["reloaded"]

    async def test(scope: ExitStack) -> None:
        server = Server(tmp_path, scope, reload=reload)
        client = await server.connect(b"POST /reload HTTP/1.0\r\n\r\n")
        await asyncio.to_thread(started.wait)
        asyncio.get_running_loop().call_later(0.3, may_end.set)
        await server.end()
        assert await answer_of(client) == (200, ["reloaded"])

    run(test)


def test_only_so_many_clients_may_follow_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MAX_STREAMS", 3)
    request = b"GET /events HTTP/1.0\r\n\r\n"

    async def test(scope: ExitStack) -> None:
        server, loop = Server(tmp_path, scope), asyncio.get_running_loop()
        followers = [await server.connect(request) for _ in range(3)]
        for follower in followers:
            assert (await loop.sock_recv(follower, 65536)).startswith(b"HTTP/1.0 200 OK")
        status, answer = await server.ask("GET", "/events")
        assert (status, answer) == (503, {"kind": "Busy", "error": "3 clients follow events already: end one of them"})
        followers[0].close()
        while b" 503 " in await loop.sock_recv(await server.connect(request), 4096):
            server.history.add(log.event("counted", "", {}))  # writing it shows that the client has gone
        await server.end()

    run(test)
