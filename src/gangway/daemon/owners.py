"""Watches the processes at whose end a container is detached, such as `gangway run`, by pidfds (pidfd_open(2))."""

import asyncio
import os
from collections.abc import Callable, Set

from gangway.host import netns


class OwnerWatch:
    """Calls `ended` in the loop when one of the processes has ended.

    Without pidfds (before Linux 5.3) nothing is called: the check that comes every few seconds notices the end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], object]) -> None:
        self._loop, self._ended = loop, ended
        self._pidfds: dict[str, int | None] = {}  # by `netns.process_identity`; None: it has ended

    def update(self, owners: Set[str]) -> None:
        """Watch these processes, and no others."""
        for owner in self._pidfds.keys() - owners:
            self._forget(owner)
            del self._pidfds[owner]
        for owner in owners - self._pidfds.keys():
            self._pidfds[owner] = None
            try:
                pidfd = os.pidfd_open(int(owner.split()[1]))
            except OSError:
                pidfd = -1
            if netns.has_process_ended(owner):
                self._loop.call_soon(self._ended)
            elif pidfd >= 0:
                self._pidfds[owner] = pidfd
                self._loop.add_reader(pidfd, self._notice, owner)
                continue
            if pidfd >= 0:
                os.close(pidfd)

    def close(self) -> None:
        self.update(frozenset())

    def _notice(self, owner: str) -> None:
        self._forget(owner)
        self._ended()

    def _forget(self, owner: str) -> None:
        pidfd = self._pidfds[owner]
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._pidfds[owner] = None
