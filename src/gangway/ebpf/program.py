"""What both programs do: take over from the former daemon, and reattach what another program has detached.

What this file knows: which process holds the links.  What it must not know: what the programs do.

The relay outlives the daemon, so it holds the links: the next daemon gets them back from there and takes over the maps.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from threading import RLock
from typing import Protocol

from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock
from gangway.ebpf.port_map import PortMap
from gangway.errors import HostRefused, Unsupported
from gangway.inet import pack_address


class LinkHolder(Protocol):
    """What is needed of the relay.  HostRefused: it has ended, or refused."""

    def hold(self, name: str, fds: Sequence[int]) -> None:
        """Keep duplicates of these open, in place of the former ones of that name, in this and any later relay."""

    def held(self, name: str) -> list[int]:
        """Return the descriptors that it holds, the caller's to close; none if there is no relay."""

    def share(self, protocol: str, family: int, fds: Sequence[int]) -> None:
        """Give it duplicates of the socket that serves all steered ports of a protocol and family (4 or 6), and for UDP
        of the map `relay_binding`."""

    def shared_count(self) -> int:
        """Return how many of those sockets it has."""

    def is_running(self) -> bool:
        """Return whether it runs, or has not been needed yet."""


class Program(ABC):
    """A program for published ports, in the calling thread's network namespace.  Thread-safe.

    Subclasses call `_start` at the end of their constructor.
    """

    def __init__(self, relay: LinkHolder, name: str) -> None:
        self.unavailable = ""  # why the program cannot be used; empty if it can
        self._relay, self._name = relay, name
        self._lock = RLock()  # it is not held while the kernel's table of sockets is read
        self._map: PortMap | None = None
        self.excluded: Collection[str] | None = None
        """The addresses at which nothing is published; None: those that the former daemon has excluded."""

    def is_attached(self) -> bool:
        """Return False if another program has detached it; True also if it is unavailable."""
        with self._lock:
            return self._map is None or self._map.loaded.is_attached()

    def reattach(self) -> None:
        """Attach it again if another program has detached it.  Unsupported: that has become impossible."""
        with self._lock:
            former = self._map
            if former is None or former.loaded.is_attached():
                return
            self._map = None
            try:
                self._map = self._load(former.loaded.links)
                self._update_excluded()
            except (Unsupported, HostRefused) as error:
                self.unavailable = str(error)
                raise
            finally:
                self._hand_over()
                former.close()

    def exclude(self, addresses: Collection[str]) -> None:
        """Leave these addresses alone from now on, in place of those before.  HostRefused: the kernel refused one."""
        with self._lock:
            self.excluded = addresses
            self._update_excluded()

    def remove(self, blocks: Iterable[PortBlock]) -> None:
        """Remove entries, as far as they exist."""
        with self._lock:
            if self._map is not None:
                self._map.remove(blocks)

    def close(self) -> None:
        """Close all descriptors; while the relay runs, the program stays attached."""
        with self._lock:
            if self._map is not None:
                self._map.close()
                self._map = None

    @abstractmethod
    def _load(self, former_links: Sequence[int]) -> PortMap:
        """Load and attach it, with the maps of the former one.  Unsupported, HostRefused: that is not possible."""

    def _found(self) -> dict[PortBlock, bytes]:
        with self._lock:
            return {} if self._map is None else self._map.entries()

    def _start(self) -> None:
        former_links = self._relay.held(self._name)
        try:
            self._map = self._load(former_links)
            self._update_excluded()
        except (Unsupported, HostRefused) as error:
            self.unavailable = str(error)
        finally:
            for link in former_links:
                os.close(link)
        self._hand_over()

    def _update_excluded(self) -> None:
        if self._map is not None and self.excluded is not None:
            packed = frozenset(map(pack_address, self.excluded))
            self._map.loaded.set_keys("excluded", packed, keys.ADDRESS_BYTES)

    def _hand_over(self) -> None:
        """Let the relay hold the links, or release the former ones."""
        with suppress(HostRefused):  # then the program ends with this daemon
            self._relay.hold(self._name, self._map.loaded.links if self._map is not None else ())

    def _require(self) -> PortMap:
        if self._map is None:
            raise Unsupported(f"{self._name} is unavailable: {self.unavailable or 'it is closed'}")
        return self._map
