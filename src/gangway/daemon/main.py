"""The daemon's process, from its start to its end.

What this file knows: what the daemon's parts are, and when it ends.  What it must not know: what the parts do.

One event loop waits for API clients, signals and the kernel's notifications; one worker thread carries requests out,
another one answers questions, and one serves docker-proxy launchers (`leases`).  After a notification, and after the
last of a burst of them, the worker checks whether something has to be repaired; so it does when the relay has exited.
What few daemons need is loaded when it is first needed: the HTTP server by the first API client, netlink and nftables
by the first network.
"""

import asyncio
import select
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gangway.daemon import audit, supervisor
from gangway.daemon.config import Loaded
from gangway.daemon.history import History
from gangway.daemon.home import Home
from gangway.daemon.leases import LeaseServer
from gangway.daemon.messages import ReloadAnswer
from gangway.daemon.mounts import MountWatch
from gangway.daemon.owners import OwnerWatch
from gangway.daemon.parts import Parts
from gangway.errors import Conflict, GangwayError, HostRefused
from gangway.host import probe
from gangway.host.events import Notices
from gangway.limits import exhausted
from gangway.log import Log
from gangway.relay.privilege import raise_descriptor_limit
from gangway.state.adopted import Adopted

if TYPE_CHECKING:
    from gangway.daemon.operations import Service

# After a notification from the kernel, how long to wait for more before checking.
_SETTLE_S = 0.1
_SETTLE_ROUTES_S = 0.5  # a router's routes may change all the time
# The same, if no rule of ours was changed or deleted, but elements, or a chain of another program.
_SETTLE_RULES_S = 0.3
# After a check of rules, how many times as long as it took to wait before the next one.
_REST = 4.0
# How often to check what sends no notification: legacy iptables, br_netfilter's settings, what could not be done.
_CHECK_S = 10.0
# How long the relay, and a daemon that a command or launcher has started, stay when there is nothing to look after:
# dockerd starts launchers one after the other, and `docker restart` ends the last before it starts the next.
_LINGER_S = 5.0

Load = Callable[[], Loaded]
"""Reads the settings."""


class Daemon:
    """A daemon that runs until a signal or, if `until_idle`, until there is nothing to look after."""

    def __init__(
        self,
        parts: Parts,
        notices: Notices,
        worker: ThreadPoolExecutor,
        log: Log,
        history: History,
        until_idle: bool,
        load: Load,
    ) -> None:
        self._parts, self._notices, self._worker = parts, notices, worker
        self._log, self._until_idle, self._load = log, until_idle, load
        self._history = history
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._checks: dict[socket.socket, asyncio.TimerHandle] = {}
        self._rules_check: asyncio.TimerHandle | None = None
        self._are_rules_checked = False  # now, by the worker
        self._rules_again = False  # they have changed since that check began
        self._rules_since_s: float | None = None  # the monotonic time of the first change that is not checked yet
        self._rules_due = 0.0  # when rules may be checked again
        self._end: asyncio.TimerHandle | None = None
        self._relay_fd: int | None = None
        self._relay_exits = 0
        self._hangups = select.epoll()
        self._owners = OwnerWatch(self._loop, lambda: self._run(self._parts.requests.check))
        self._mounts = MountWatch(self._loop, lambda: self._run(self._parts.declared.serve_new))
        self._tasks: list[asyncio.Task[None]] = []
        self._watching: asyncio.Task[None] | None = None  # if Docker is watched
        self._leases: LeaseServer

    async def run(self, home: Home, ready: Callable[[], None]) -> None:
        """Serve; `ready` is called when it does."""
        requests = self._parts.requests
        self._loop.set_exception_handler(self._failed)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._over.set)
        self._loop.add_signal_handler(signal.SIGHUP, self._run, self._reload_or_log)
        for sock, settle_s in ((self._notices.links, _SETTLE_S), (self._notices.routes, _SETTLE_ROUTES_S)):
            self._loop.add_reader(sock, self._notified, sock, self._parts.check, settle_s)
        self._loop.add_reader(self._notices.rules.sock, self._rules_changed)
        self._loop.add_reader(self._hangups, self._relay_exited)
        changed = partial(self._loop.call_soon_threadsafe, self._changed)
        self._leases = LeaseServer(home.leases, requests.leases, self._log, changed)
        self._leases.start()
        self._tasks = [self._loop.create_task(self._serve_api(home))]
        try:
            await self._loop.run_in_executor(self._worker, self._guarded, self._parts.declared.reload)
            ready()
            supervisor.notify(supervisor.READY)
            self._keep_alive()
            self._changed()
            self._loop.call_later(_CHECK_S, self._check_thoroughly)
            await self._over.wait()
        finally:
            supervisor.notify(supervisor.STOPPING)
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
            self._leases.close()
            self._loop.remove_reader(self._hangups)
            self._hangups.close()
            self._owners.close()
            self._mounts.close()

    async def _serve_api(self, home: Home) -> None:
        """Serve the API from its first client on, until cancelled."""
        arrived = asyncio.Event()
        listeners = home.api, home.reading
        for listener in listeners:
            self._loop.add_reader(listener, arrived.set)
        try:
            await arrived.wait()
        finally:
            for listener in listeners:
                self._loop.remove_reader(listener)
        from gangway.daemon.server import serve

        await serve(home, self._service(), self._worker, self._log, self._changed)

    def _service(self) -> "Service":
        """Return what the API serves."""
        from gangway.daemon.operations import Service

        def names() -> Awaitable[dict[str, str]]:
            from gangway.docker.client import names_by_address

            return names_by_address(self._parts.config.docker.socket)

        parts = self._parts
        return Service(
            requests=parts.requests,
            ports=parts.ports,
            declared=parts.declared,
            commands=parts.commands,
            checks=parts.checks,
            names=names,
            handover=parts.handover,
            status=parts.status,
            settings=parts.settings,
            down=parts.down,
            version=parts.version,
            health=parts.health,
            history=self._history,
            reload=self._reload,
            stop=self._stop,
            take_down=self._take_down,
        )

    def _update_watcher(self) -> None:
        """Watch Docker while that is necessary."""
        is_needed = self._parts.serves_docker or self._parts.follows_docker
        if is_needed and self._watching is None:
            self._watching = self._loop.create_task(self._watch_docker())
            self._tasks = [*(task for task in self._tasks if not task.done()), self._watching]
        elif self._watching is not None and not is_needed:
            self._watching.cancel()
            self._watching, self._parts.docker = None, None

    async def _watch_docker(self) -> None:
        """Serve Docker's networks and ports, or let published ports follow its containers, until cancelled."""
        from gangway.docker.watcher import Watcher  # needs the HTTP client

        parts = self._parts
        parts.docker = Watcher(parts.config.docker.socket, self._adopt, self._log, parts.serves_docker)
        await parts.docker.run()

    async def _adopt(self, adopted: Adopted) -> None:
        """Serve what Docker has, in the worker thread.  GangwayError: to be tried again."""
        try:
            await self._loop.run_in_executor(self._worker, self._parts.adopt, adopted)
        except GangwayError:
            raise
        except Exception as error:
            self._log.failure(error)
            raise HostRefused("internal error; the log has the details") from None
        finally:
            self._changed()

    def _keep_alive(self) -> None:
        """Tell a service manager that this loop runs, as often as it wants to know."""
        if (interval_s := supervisor.watchdog_s()) is not None:
            supervisor.notify(supervisor.ALIVE)
            self._loop.call_later(interval_s, self._keep_alive)

    def _stop(self) -> None:
        """End the daemon.  Conflict: whoever has started it would start it again."""
        if supervisor.is_supervised():
            raise Conflict(
                "a service manager runs this daemon: use systemctl restart gangway, or systemctl stop gangway"
            )
        self._loop.call_soon_threadsafe(self._over.set)

    def _take_down(self) -> list[str]:
        """Remove everything of gangway's, and end the daemon; return what was removed."""
        removed = self._parts.take_down()
        self._loop.call_soon_threadsafe(self._over.set)
        return removed

    def _reload(self) -> ReloadAnswer:
        """Read the settings again, open the log files again, which may have been renamed, and serve what is declared.

        InvalidRequest, HostRefused: the former settings are in use.
        """
        supervisor.notify(supervisor.reloading())
        try:
            loaded = self._load()
            self._parts.reload(loaded)
        except OSError as error:
            raise HostRefused(f"the log cannot be opened again: {error}") from None
        finally:
            supervisor.notify(supervisor.READY)
        return ReloadAnswer(list(loaded.warnings), self._parts.declared.reload())

    def _reload_or_log(self) -> None:
        try:
            self._reload()
        except GangwayError as error:
            self._log.warning(f"settings not reloaded: {error}", event="not-reloaded")

    def _notified(self, sock: socket.socket, check: Callable[[float], None], settle_s: float) -> None:
        if self._notices.drain(sock) and sock not in self._checks:
            since = partial(check, time.monotonic())
            self._checks[sock] = self._loop.call_later(settle_s, self._check_now, sock, since)

    def _rules_changed(self) -> None:
        """Check deleted rules at once: until they are written again, new connections are not translated.

        All checks together take a fraction of the time only, however often rules change.
        """
        notices = self._notices.rules
        if notices.is_pending():
            self._rules_again = self._are_rules_checked
            self._rules_since_s = self._rules_since_s or time.monotonic()
            due = max(self._rules_due, self._loop.time() + (0.0 if notices.is_urgent() else _SETTLE_RULES_S))
            if not self._are_rules_checked and (self._rules_check is None or due < self._rules_check.when()):
                if self._rules_check is not None:
                    self._rules_check.cancel()
                self._rules_check = self._loop.call_at(due, self._check_rules)

    def _check_rules(self) -> None:
        began = self._loop.time()
        self._rules_check, self._are_rules_checked, self._rules_again = None, True, False

        def done(_: "asyncio.Future[None]") -> None:
            self._are_rules_checked = False
            self._rules_due = self._loop.time() + _REST * (self._loop.time() - began)
            if self._rules_again:
                self._rules_changed()

        check = partial(self._parts.requests.check_rules, self._rules_since_s)
        self._rules_since_s = None
        self._run(check).add_done_callback(done)

    def _check_now(self, sock: socket.socket, check: Callable[[], None]) -> None:
        del self._checks[sock]
        self._run(check)

    def _check_thoroughly(self) -> None:
        self._run(self._parts.check_limits)
        self._run(self._parts.check_thoroughly)
        self._loop.call_later(_CHECK_S, self._check_thoroughly)

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what asyncio reports; it accepts API clients again a second after it had no descriptor for one."""
        error = context.get("exception")
        if isinstance(error, OSError) and (reason := exhausted(error)):
            self._log.lasting(f"commands wait for an answer: {reason}")
        elif error is not None:
            self._log.unexpected(error, str(context["message"]))
        else:
            self._log.warning(f"internal error: {context['message']}")

    def _run(self, check: Callable[[], None]) -> "asyncio.Future[None]":
        running = self._loop.run_in_executor(self._worker, self._guarded, check)
        running.add_done_callback(lambda _: self._changed())
        return running

    def _guarded(self, check: Callable[[], object]) -> None:
        try:
            check()
        except GangwayError as error:
            self._log.warning(str(error))
        except Exception as error:
            self._log.failure(error)

    def _changed(self) -> None:
        """Watch the relay, which may be another one now, the owners of containers, and Docker; schedule the daemon's
        end if nothing is left to manage."""
        if self._over.is_set():
            return  # a check may end after the daemon, which watches nothing any more
        relay = self._parts.dataplane.relay
        self._watch(relay.fileno())
        if relay.exits > self._relay_exits:  # a thread may have started another one before we were notified
            self._relay_exits = relay.exits
            self._serve_again()
        self._owners.update(self._parts.requests.owners())
        self._mounts.update(self._parts.declared.has_namespaces)
        self._update_watcher()
        if not self._parts.is_idle:
            if self._end is not None:
                self._end.cancel()
            self._end = None
        elif self._end is None:
            self._end = self._loop.call_later(_LINGER_S, self._stop_if_idle)

    def _watch(self, relay_fd: int | None) -> None:
        """Watch for the relay's exit only: its answers are read by the threads that send the requests."""
        if self._relay_fd is not None:
            with suppress(OSError):  # a closed descriptor is no longer watched
                self._hangups.unregister(self._relay_fd)
        self._relay_fd = relay_fd
        if relay_fd is not None:
            with suppress(OSError):  # it is being closed, and we are called again
                self._hangups.register(relay_fd, select.EPOLLRDHUP)

    def _relay_exited(self) -> None:
        """Serve the ports again; this exit may have been counted already, or will be by the first who looks."""
        self._watch(None)
        self._relay_exits = max(self._relay_exits + 1, self._parts.dataplane.relay.exits)
        self._serve_again()

    def _serve_again(self) -> None:
        self._leases.restore()
        self._run(self._parts.requests.check)

    def _stop_if_idle(self) -> None:
        """Stop the relay in the worker thread, after the requests that came before, and then perhaps the daemon."""
        self._loop.run_in_executor(self._worker, self._parts.stop_if_idle).add_done_callback(self._end_if_stopped)

    def _end_if_stopped(self, stopped: "asyncio.Future[bool]") -> None:
        if not stopped.result():  # launchers may still have to take their leases again
            self._end = None
            self._changed()
        elif self._until_idle and not self._parts.serves_docker:
            self._over.set()


def run(
    loaded: Loaded,
    socket_path: str | None,
    log: Log,
    until_idle: bool,
    ready: Callable[[], None],
    load: Load,
    declared: Path,
) -> bool:
    """Run a daemon to its end; `ready` is called when it serves.  Return True if it ended because it was idle.

    GangwayError: it cannot run.  `socket_path` is where API clients connect; None: in the runtime folder.  `load` reads
    the settings again, after a SIGHUP.  `declared` is the folder with the files of what is declared.
    """
    raise_descriptor_limit()
    history = History()
    log.add_writer(history.add)
    with ExitStack() as stack:
        home = stack.enter_context(Home(socket_path, loaded.config.group_ids, until_idle))
        worker = stack.enter_context(ThreadPoolExecutor(1, "worker"))
        notices = stack.enter_context(closing(Notices()))
        parts = worker.submit(Parts, loaded, home, log, notices, declared).result()
        stack.callback(lambda: worker.submit(parts.close).result())
        if not until_idle and probe.is_root():  # an operator learns at once that the firewall cannot be used
            worker.submit(lambda: parts.requests.facts).result()

        def serves() -> None:
            ready()
            log.write(audit.started(parts.status()))
            log.write(audit.settings(loaded.config))

        async def serve() -> bool:
            await Daemon(parts, notices, worker, log, history, until_idle, load).run(home, serves)
            return (until_idle or home.is_left_for_good) and parts.is_idle

        home.is_abandoned = asyncio.run(serve())
        log.info("daemon stopped" + ("" if home.is_abandoned else ": ports stay published"), event="stopped")
    return home.is_abandoned
