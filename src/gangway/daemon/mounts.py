"""Notices of mounts: ip-netns(8), container engines and CNI mount each namespace that they name.

The kernel reports a changed mount table by POLLPRI of /proc/self/mountinfo (proc_pid_mounts(5)), after the change.
inotify would report the file that a namespace is mounted on, which ip-netns creates before.
"""

import asyncio
import select
from collections.abc import Callable
from contextlib import ExitStack

_MOUNTS = "/proc/self/mountinfo"
_SETTLE_S = 0.02  # a container engine mounts several file systems for a container


class MountWatch:
    """Calls `changed` in the loop when something was mounted or unmounted."""

    def __init__(self, loop: asyncio.AbstractEventLoop, changed: Callable[[], object]) -> None:
        self._loop, self._changed = loop, changed
        self._scope: ExitStack | None = None
        self._call: asyncio.TimerHandle | None = None

    def update(self, is_needed: bool) -> None:
        """Watch while that is needed."""
        if not is_needed:
            self.close()
        elif self._scope is None:
            self._scope = self._watch()

    def close(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._scope is not None:
            self._scope.close()
        self._call = self._scope = None

    def _watch(self) -> ExitStack:
        with ExitStack() as scope:
            # The file is always readable; the event loop waits for that only, so it waits for an epoll of our own.
            mounts, poll = scope.enter_context(open(_MOUNTS)), scope.enter_context(select.epoll())
            poll.register(mounts.fileno(), select.EPOLLPRI)
            self._loop.add_reader(poll, self._noticed, poll)
            scope.callback(self._loop.remove_reader, poll)
            return scope.pop_all()

    def _noticed(self, poll: select.epoll) -> None:
        poll.poll(0)
        if self._call is None:
            self._call = self._loop.call_later(_SETTLE_S, self._report)

    def _report(self) -> None:
        self._call = None
        self._changed()
