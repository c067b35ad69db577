"""Follows Docker's networks and containers, and states what there is of them: with their ports, or without.

It subscribes to events first and then looks at everything, so that nothing is missed in between.  Then each event has
only what it concerns read again; events that came together are handled together, and none waits for more.  While the
API cannot be read, what was last stated stays: containers may outlive their dockerd (`live-restore`).
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable

from gangway.docker.activation import would_start_dockerd
from gangway.docker.client import AnswerRefused, DockerClient, Event, Events
from gangway.docker.wanted import View
from gangway.errors import GangwayError, HostRefused
from gangway.log import Log
from gangway.state.adopted import Adopted

_FIRST_RETRY_S, _LAST_RETRY_S = 0.5, 5.0
_SOCKET_CHECK_S = 0.25  # how often to look whether dockerd has made its socket, while the API cannot be read
_ADOPT_RETRY_S = 1.0
_ADOPT_AGAIN_S = 10.0  # what could not be published may be possible by now: a port is free again

Adopt = Callable[[Adopted], Awaitable[None]]
"""Serves all that is given, and nothing else of Docker's.  GangwayError: it could not; to be tried again."""


class Watcher:
    """Watches one dockerd.  `has_rules`: its networks and ports are to be served; False: dockerd serves them itself."""

    def __init__(self, path: str, adopt: Adopt, log: Log, has_rules: bool = True) -> None:
        self._path, self._adopt, self._log, self._has_rules = path, adopt, log, has_rules
        self._what = "Docker's networks and ports" if has_rules else "Docker's containers"
        self._view = View(has_rules)
        self._running: set[str] = set()
        self._engine = ""  # name and version
        self.summary = ""
        """What is followed: the engine, and how much it has."""
        self._unread = "not read yet"
        self._unserved = ""
        self._problems: frozenset[str] = frozenset()

    @property
    def problem(self) -> str:
        """Why not everything of Docker's is served; empty if it is."""
        return self._unread or self._unserved or "; ".join(sorted(self._problems))

    async def run(self) -> None:
        """Watch until cancelled."""
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                if would_start_dockerd(self._path):
                    raise HostRefused(f"Docker's API {self._path}: cannot be read (dockerd is stopped)")
                async with DockerClient(self._path) as client, client.events() as events:
                    await self._look(client, events)
                    delay_s = _FIRST_RETRY_S
                    await self._follow(client, events)
            except GangwayError as error:
                self._report_unread(str(error))
            except Exception as error:
                self._log.failure(error)
                self._report_unread("internal error; the log has the details")
            delay_s = await self._pause(delay_s)

    async def _look(self, client: DockerClient, events: Events) -> None:
        """Read everything."""
        view = View(self._has_rules)
        view.use_networks(await client.networks())
        containers = await client.containers()
        for one in containers:
            view.name_container(one.id, one.name)
        running = {one.id for one in containers if one.state in ("running", "paused")}
        await self._read(client, view, running)
        self._view, self._running = view, running
        self._unread, self._engine = "", events.engine
        self._summarize()
        self._log.info("%s are followed: %s", self._what, self.summary)

    async def _follow(self, client: DockerClient, events: Events) -> None:
        """State what there is, and again after each change.  GangwayError: the API cannot be read any more."""
        while True:
            await self._state()
            try:
                async with asyncio.timeout(_ADOPT_RETRY_S if self._unserved else _ADOPT_AGAIN_S):
                    changes = await events.read()
            except TimeoutError:
                continue
            await self._handle(client, changes)

    async def _handle(self, client: DockerClient, changes: Iterable[Event]) -> None:
        """Read what changed.

        A container is not read before its start: dockerd answers questions about one that starts when it has started.
        """
        stale: set[str] = set()
        for change in changes:
            one = change.container
            if change.container_name:
                self._view.name_container(one, change.container_name)
            if change.action == "start":
                self._running.add(one)
            elif change.action == "die":
                self._running.discard(one)
                self._view.stop_container(one)
            elif change.action == "destroy":
                self._view.remove_container(one)
            stale.add(one)
        if "" in stale:
            self._view.use_networks(await client.networks())
        await self._read(client, self._view, stale & self._running)

    async def _read(self, client: DockerClient, view: View, containers: Iterable[str]) -> None:
        """Read these containers, several at a time."""

        async def read(container_id: str) -> None:
            try:
                found = await client.container(container_id)
            except AnswerRefused as error:
                self._log.lasting(str(error))
                return
            if found is None:
                view.remove_container(container_id)
            else:
                view.use_container(found)

        await asyncio.gather(*map(read, containers))

    async def _state(self) -> None:
        """State what there is; log what prevents some of it."""
        self._summarize()
        problems = frozenset(self._view.problems if self._has_rules else ())
        for text in sorted(problems - self._problems):
            self._log.warning(text)
        self._problems = problems
        try:
            await self._adopt(self._view.adopted)
            self._unserved = ""
        except GangwayError as error:
            self._unserved = f"{self._what} are not served: {error}"
            self._log.lasting(f"{self._unserved}: retried")

    def _summarize(self) -> None:
        adopted = self._view.adopted
        has = f"{_count(len(adopted.networks), 'network')}, {_count(len(adopted.containers), 'running container')}"
        self.summary = f"{self._engine} at {self._path}: {has}"

    def _report_unread(self, reason: str) -> None:
        if reason != self._unread:
            self._log.warning(f"{reason}: retried")
        self._unread = reason

    async def _pause(self, delay_s: float) -> float:
        """Wait, but no longer than until dockerd makes a socket; return how long to wait the next time."""
        former = _identity(self._path)
        for _ in range(int(delay_s / _SOCKET_CHECK_S)):
            await asyncio.sleep(_SOCKET_CHECK_S)
            if _identity(self._path) not in (None, former):
                return _FIRST_RETRY_S
        return min(2 * delay_s, _LAST_RETRY_S)


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
