"""A holder of links and sockets within this process, in place of a relay."""

import os
from collections.abc import Sequence

from gangway.errors import HostRefused


class Holder:
    """Holds duplicates of what it is given, as a relay does (gangway.ebpf.program.LinkHolder)."""

    def __init__(self) -> None:
        self.fds: dict[str, list[int]] = {}
        self.shared: dict[tuple[str, int], list[int]] = {}
        self.running = True

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Hold these descriptors in place of the former ones.  HostRefused: it is stopped."""
        self._check_running()
        former, self.fds[name] = self.fds.get(name, []), [os.dup(fd) for fd in fds]
        _close(former)

    def held(self, name: str) -> list[int]:
        """Return duplicates of what is held, the caller's to close."""
        return [os.dup(fd) for fd in self.fds.get(name, [])]

    def share(self, protocol: str, family: int, fds: Sequence[int]) -> None:
        """Keep a socket, and for UDP the map `relay_binding`.  HostRefused: it is stopped."""
        self._check_running()
        former, self.shared[protocol, family] = self.shared.get((protocol, family), []), [os.dup(fd) for fd in fds]
        _close(former)

    def shared_count(self) -> int:
        """Return how many sockets are shared."""
        return len(self.shared)

    def is_running(self) -> bool:
        """Return whether it runs."""
        return self.running

    def stop(self) -> None:
        """End as a relay does that is killed: nothing that it was given stays open."""
        self.running = False
        for fds in (*self.fds.values(), *self.shared.values()):
            _close(fds)
        self.fds, self.shared = {}, {}

    def _check_running(self) -> None:
        if not self.running:
            raise HostRefused("the relay is stopped")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
