"""The daemon's process, from its first moment to its last.

What this file knows: what the daemon's parts are, and when it is over.  What it must not know: what they do.

How it works.  One loop listens to the API's socket, to signals and to the kernel's notices; one thread does the work.
After a notice, and after the last of a burst of them, that thread looks whether there is something to do; so it does
when the relay has ended.  Its descriptor tells that by a hang-up: whatever else comes by it is the thread's.  Only one
daemon can look after a network namespace: a name in its abstract unix sockets (unix(7)), which are the namespace's own,
goes to the first.
"""

import asyncio
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from gangway.daemon.api import application
from gangway.daemon.config import Config
from gangway.errors import Conflict, GangwayError, HostRefused, Unsupported
from gangway.host import probe
from gangway.host.events import Notices
from gangway.log import Log
from gangway.relay.client import Relay
from gangway.relay.privilege import raise_descriptor_limit
from gangway.state.database import Database
from gangway.state.requests import Requests

_LOCK = "\0gangway-daemon"
_UCRED = struct.Struct("iII")  # pid, uid, gid: unix(7)
# After a notice of the kernel's, one waits so long for more before one looks.
_SETTLE_S = 0.1
# What gives no notice is looked at so often: the legacy iptables, br_netfilter's switches, what could not be done.
_LOOK_S = 10.0
# A daemon that a command has started ends when there has been nothing to keep for so long.
_LINGER_S = 5.0


class Start(NamedTuple):
    """How a daemon is to run."""

    config: Config
    socket_path: Path
    until_idle: bool
    """It ends itself when nothing is left to keep."""
    log: Log


class Daemon:
    """A daemon that runs until a signal, or until it is idle."""

    def __init__(self, start: Start, service: Requests, notices: Notices, worker: ThreadPoolExecutor) -> None:
        self._start = start
        self._service = service
        self._notices = notices
        self._worker = worker
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._looks: dict[socket.socket, asyncio.TimerHandle] = {}
        self._end: asyncio.TimerHandle | None = None
        self._relay_fd: int | None = None
        self._hangups = select.epoll()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serves; `ready` is called when it does."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._over.set)
        for sock, check in (
            (self._notices.links, self._service.check),
            (self._notices.rules, self._service.check_rules),
        ):
            self._loop.add_reader(sock, self._noticed, sock, check)
        self._loop.add_reader(self._hangups, self._relay_ended)
        app = application(self._service, self._worker, self._start.log, self._changed)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        try:
            await web.UnixSite(runner, str(self._start.socket_path)).start()
            self._start.socket_path.chmod(0o660)
            ready()
            self._changed()
            self._loop.call_later(_LOOK_S, self._look_thoroughly)
            await self._over.wait()
        finally:
            await runner.cleanup()
            self._loop.remove_reader(self._hangups)
            self._hangups.close()

    def _noticed(self, sock: socket.socket, check: Callable[[], None]) -> None:
        self._notices.drain(sock)
        if sock not in self._looks:
            self._looks[sock] = self._loop.call_later(_SETTLE_S, self._look_now, sock, check)

    def _look_now(self, sock: socket.socket, check: Callable[[], None]) -> None:
        del self._looks[sock]
        self._run(check)

    def _look_thoroughly(self) -> None:
        self._run(self._service.check_thoroughly)
        self._loop.call_later(_LOOK_S, self._look_thoroughly)

    def _run(self, check: Callable[[], None]) -> None:
        self._loop.run_in_executor(self._worker, self._check, check).add_done_callback(lambda _: self._changed())

    def _check(self, check: Callable[[], None]) -> None:
        try:
            check()
        except GangwayError as error:
            self._start.log.warning("%s", error)
        except Exception as error:
            self._start.log.failure(error)

    def _changed(self) -> None:
        """There may be another relay now, and it may be over."""
        self._watch(self._service.relay_fd)
        if self._end is not None:
            self._end.cancel()
        if self._start.until_idle and self._service.is_idle:
            self._end = self._loop.call_later(_LINGER_S, self._end_if_idle)

    def _watch(self, relay_fd: int | None) -> None:
        """What the relay answers is not for us: only its end wakes us.  A new relay may have the old one's number."""
        if self._relay_fd is not None:
            with suppress(OSError):  # it is closed, and so it is not watched any more
                self._hangups.unregister(self._relay_fd)
        self._relay_fd = relay_fd
        if relay_fd is not None:
            with suppress(OSError):  # it is closed just now, and we are called again
                self._hangups.register(relay_fd, select.EPOLLRDHUP)

    def _relay_ended(self) -> None:
        self._watch(None)
        self._run(self._service.check)

    def _end_if_idle(self) -> None:
        """Asked of the thread that does the work: whatever is on its way there comes first."""
        asked = self._loop.run_in_executor(self._worker, lambda: self._service.is_idle)
        asked.add_done_callback(lambda answer: self._over.set() if answer.result() else None)


def run(start: Start, ready: Callable[[], None]) -> None:
    """Runs a daemon to its end; `ready` is called when it serves.  GangwayError: it cannot."""
    if not probe.is_root():
        raise Unsupported("the daemon changes links, rules and settings of this host: run it as root")
    raise_descriptor_limit()
    with ExitStack() as stack:
        _claim(start, stack)
        store = Database(Path(start.config.state))
        relay = Relay(Path(f"{start.socket_path}.relay"), start.config.relay_settings)
        worker = stack.enter_context(ThreadPoolExecutor(1, "worker"))
        notices = Notices()
        stack.callback(notices.close)
        service = worker.submit(Requests, start.config, store, relay, start.log).result()
        stack.callback(lambda: worker.submit(service.close).result())

        async def serve() -> None:
            await Daemon(start, service, notices, worker).run(ready)

        asyncio.run(serve())


def _holder_uid() -> int:
    """Whose process holds the lock: anybody can take a name in that space.  -1: nobody who listens."""
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(_LOCK)
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        except OSError:
            return -1
        return int(_UCRED.unpack(credentials)[1])


def _claim(start: Start, stack: ExitStack) -> None:
    """Makes sure that no other daemon looks after this network namespace, or has this socket."""
    lock = stack.enter_context(socket.socket(socket.AF_UNIX))
    try:
        lock.bind(_LOCK)
        lock.listen()
    except OSError:
        if _holder_uid() == os.geteuid():
            raise Conflict("another gangway daemon looks after this network namespace already") from None
        start.log.warning("another user's process has taken the name that keeps two daemons apart")
    path = start.socket_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with socket.socket(socket.AF_UNIX) as probing:
            probing.connect(str(path))
        raise Conflict(f"another daemon listens on {path}: give this one another --socket")
    except (FileNotFoundError, ConnectionRefusedError):
        path.unlink(missing_ok=True)
    except OSError as error:
        raise HostRefused(f"the socket {path} cannot be had: {error.strerror or error}") from None
    stack.callback(lambda: path.unlink(missing_ok=True))
