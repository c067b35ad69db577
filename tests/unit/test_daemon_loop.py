"""The daemon's event loop at its end."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from gangway import runtime
from gangway.daemon.home import Home
from gangway.daemon.main import Daemon
from gangway.log import Log


def _nothing(*_: object) -> None: ...


def _quiet(scope: ExitStack) -> socket.socket:
    """Return a socket at which nothing arrives."""
    found, other = socket.socketpair()
    scope.enter_context(other)
    return scope.enter_context(found)


def _daemon(scope: ExitStack, worker: ThreadPoolExecutor) -> Daemon:
    """Return a daemon over stand-ins: it has a network, and a relay that runs."""
    checks = dict.fromkeys(("check", "check_rules", "check_thoroughly"), _nothing)
    leases = SimpleNamespace(unclaimed=False, is_incomplete=False, is_settling=False)
    requests = SimpleNamespace(**checks, is_idle=False, owners=frozenset, leases=leases)
    relay = SimpleNamespace(exits=0, fileno=_quiet(scope).fileno)
    parts: Any = SimpleNamespace(requests=requests, dataplane=SimpleNamespace(relay=relay))
    rules = SimpleNamespace(sock=_quiet(scope))
    notices: Any = SimpleNamespace(links=_quiet(scope), routes=_quiet(scope), rules=rules)
    load: Any = _nothing
    return Daemon(parts, notices, worker, Log(_nothing), until_idle=False, load=load)


def test_a_check_that_ends_after_the_daemon_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    may_end, problems = Event(), list[object]()

    async def serve(scope: ExitStack, home: Home, worker: ThreadPoolExecutor) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
        daemon = _daemon(scope, worker)
        checking = daemon._run(lambda: _nothing(may_end.wait(10)))
        daemon._over.set()
        await daemon.run(home, lambda: None)
        may_end.set()
        await checking
        await asyncio.sleep(0)  # its callbacks

    with ExitStack() as scope, Home(None, -1) as home, ThreadPoolExecutor(1) as worker:
        asyncio.run(serve(scope, home, worker))
    assert problems == []
