"""The daemon's event loop at its end."""

import asyncio
import errno
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from gangway import runtime
from gangway.daemon import main
from gangway.daemon.config import Config, Docker
from gangway.daemon.history import History
from gangway.daemon.home import Home
from gangway.daemon.main import Daemon
from gangway.log import Log

NO_DOCKER = Docker()


def _nothing(*_: object) -> None: ...


def _quiet(scope: ExitStack) -> socket.socket:
    """Return a socket at which nothing arrives."""
    found, other = socket.socketpair()
    scope.enter_context(other)
    return scope.enter_context(found)


def _daemon(
    scope: ExitStack,
    worker: ThreadPoolExecutor,
    write: Callable[[str], object] = _nothing,
    is_idle: bool = False,
    docker: Docker = NO_DOCKER,
) -> Daemon:
    """Return a daemon over stand-ins: it has a relay that runs; `write` is given its log.

    If it `is_idle`, it has no network, and may end therefore.
    """
    checks = dict.fromkeys(("check", "check_rules"), _nothing)
    leases = SimpleNamespace(unclaimed=False, is_incomplete=False, is_settling=False)
    requests = SimpleNamespace(**checks, owners=frozenset, leases=leases)
    declared = SimpleNamespace(reload=_nothing, serve_new=_nothing, has_namespaces=False)
    relay = SimpleNamespace(exits=0, fileno=_quiet(scope).fileno)
    parts: Any = SimpleNamespace(
        config=Config(docker=docker),
        docker=None,
        serves_docker=docker.enabled,
        requests=requests,
        declared=declared,
        is_idle=is_idle,
        follows_docker=False,
        check=_nothing,
        stop_if_idle=lambda: True,
        dataplane=SimpleNamespace(relay=relay),
        check_limits=lambda: write("limits"),
        check_thoroughly=_nothing,
    )
    rules = SimpleNamespace(sock=_quiet(scope))
    notices: Any = SimpleNamespace(links=_quiet(scope), routes=_quiet(scope), rules=rules)
    load: Any = _nothing
    return Daemon(
        parts, notices, worker, Log(lambda event: write(event.text)), History(), until_idle=is_idle, load=load
    )


def test_a_check_that_ends_after_the_daemon_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    may_end, problems = Event(), list[str]()

    async def serve(scope: ExitStack, home: Home, worker: ThreadPoolExecutor) -> None:
        daemon = _daemon(scope, worker, problems.append)
        checking = daemon._run(lambda: _nothing(may_end.wait(10)))
        daemon._over.set()
        await daemon.run(home, lambda: None)
        may_end.set()
        await checking
        await asyncio.sleep(0)  # its callbacks

    with ExitStack() as scope, Home(None, (-1, -1)) as home, ThreadPoolExecutor(1) as worker:
        asyncio.run(serve(scope, home, worker))
    assert problems == []


def test_limits_are_checked_and_shortages_logged_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(main, "_CHECK_S", 0.01)
    lines: list[str] = []

    async def serve(scope: ExitStack, home: Home, worker: ThreadPoolExecutor) -> None:
        daemon = _daemon(scope, worker, lines.append)
        running = asyncio.create_task(daemon.run(home, lambda: None))
        while "limits" not in lines:
            await asyncio.sleep(0.01)
        for error in (OSError(errno.EMFILE, "too many"), OSError(errno.EMFILE, "too many"), ValueError("a fault")):
            context = {"message": "accept failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        daemon._over.set()
        await running

    with ExitStack() as scope, Home(None, (-1, -1)) as home, ThreadPoolExecutor(1) as worker:
        asyncio.run(serve(scope, home, worker))
    shortage, fault = (line for line in lines if line != "limits")
    assert shortage.startswith("commands wait for an answer: out of file descriptors: raise ")
    assert fault == "internal error: ValueError('a fault') in : accept failed"


def test_daemon_that_serves_docker_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without networks: it waits for Docker's."""
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(main, "_LINGER_S", 0.0)
    lines: list[str] = []

    async def serve(scope: ExitStack, home: Home, worker: ThreadPoolExecutor, docker: Docker) -> bool:
        """Return whether the daemon ends although no signal came."""
        daemon = _daemon(scope, worker, lines.append, True, docker)
        running = asyncio.create_task(daemon.run(home, lambda: None))
        while docker.enabled and not any("No such file or directory" in line for line in lines):
            await asyncio.sleep(0.01)
        ended, _ = await asyncio.wait([running], timeout=0.2 if docker.enabled else 10)
        daemon._over.set()
        await running
        return bool(ended)

    for docker in (Docker(), Docker(True, str(tmp_path / "docker.sock"))):
        with ExitStack() as scope, Home(None, (-1, -1)) as home, ThreadPoolExecutor(1) as worker:
            assert asyncio.run(serve(scope, home, worker, docker)) != docker.enabled


def test_docker_is_watched_while_a_container_has_a_published_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    async def serve(scope: ExitStack, home: Home, worker: ThreadPoolExecutor) -> None:
        daemon = _daemon(scope, worker, docker=Docker(False, str(tmp_path / "docker.sock")))
        parts: Any = daemon._parts
        running = asyncio.create_task(daemon.run(home, lambda: None))
        for _ in range(2):
            await asyncio.sleep(0.01)
            assert parts.docker is None
            parts.follows_docker = True
            daemon._changed()
            while parts.docker is None or "No such file or directory" not in parts.docker.problem:
                await asyncio.sleep(0.01)
            parts.follows_docker = False
            daemon._changed()
        daemon._over.set()
        await running

    with ExitStack() as scope, Home(None, (-1, -1)) as home, ThreadPoolExecutor(1) as worker:
        asyncio.run(serve(scope, home, worker))


def test_daemon_loads_the_http_library_only_when_it_is_needed() -> None:
    """One that serves launchers only never needs it, nor its megabytes."""
    code = "import sys, gangway.daemon.main, gangway.daemon.parts; print('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
