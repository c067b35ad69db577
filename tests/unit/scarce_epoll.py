"""An epoll set that has no watches left."""

import errno
import os
import select
from typing import Any

from gangway.relay.core.loop import Loop


class ScarceEpoll:
    """Stands for a loop's epoll set; `left` is how many descriptors can still be watched."""

    def __init__(self, loop: Loop, left: int = 0) -> None:
        self.left = left
        self._epoll = loop._epoll
        loop._epoll = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def register(self, fd: int, events: int = select.EPOLLIN) -> None:
        if not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(fd, events)
        self.left -= 1

    def unregister(self, fd: int) -> None:
        self._epoll.unregister(fd)
        self.left += 1
