"""The loopback redirect: where it leads connections to published ports (redirect.bpf.c says how).

What this file knows: the redirect's maps.  What it must not know: which ports are published, and why.

While one daemon takes over from another, the programs of both are attached; the second one to run finds an address that
is no longer one to be redirected.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock, Target, pack_address, unpack_target
from gangway.ebpf.loader import LoadedObject, ObjectFile
from gangway.ebpf.port_map import PortMap
from gangway.ebpf.program import LinkHolder, Program

OBJECT = ObjectFile(
    path=Path(__file__).with_name("redirect.bpf.o"),
    maps=("port_counts", "targets", "requested_tcp", "requested_udp", "own_addresses", "auto_bound"),
    cgroup_programs=tuple(
        f"{hook}{family}" for hook in ("connect", "sendmsg", "recvmsg", "getpeername") for family in "46"
    ),
)
DISABLED = "disabled by the configuration (redirect = false)"


class Redirect(Program):
    """The redirect of a network namespace; it takes over from the one whose links the relay holds.

    `host_addresses`: redirect also connections to the host's own addresses, not only to loopback.
    """

    def __init__(self, relay: LinkHolder, *, enabled: bool = True, host_addresses: bool = False) -> None:
        super().__init__(relay, "redirect")
        self._host_addresses = host_addresses
        self._own_addresses: frozenset[bytes] = frozenset()
        if enabled:
            self._start()
        else:
            self.unavailable = DISABLED
            self._hand_over()

    @property
    def auto_bound_fd(self) -> int | None:
        """The map of auto-bound ports, which stays the redirect's; None if it is unavailable."""
        with self._lock:
            return None if self._map is None else self._map.loaded.map_fd("auto_bound")

    def entries(self) -> dict[PortBlock, Target]:
        """Return all entries, as the kernel has them; none if it is unavailable."""
        return {block: unpack_target(value, block.first)._replace(uses=0) for block, value in self._found().items()}

    def add(self, entries: Mapping[PortBlock, Target]) -> None:
        """Add entries: all of them or none.  Unsupported: it is unavailable.  HostRefused: the kernel refused one."""
        with self._lock:
            self._require().update({block: keys.pack_target(block, target) for block, target in entries.items()})

    def lookup(self, protocol: str, address: str, port: int) -> Target | None:
        """Return where the kernel leads a port that is published at this address; None if it has no such entry."""
        with self._lock:
            value = None if self._map is None else self._map.lookup(PortBlock(protocol, address, port, port))
        return None if value is None else unpack_target(value, port)

    def count(self, blocks: Iterable[PortBlock]) -> int:
        """Return how often these entries were used: by connections, and by destinations of unconnected sockets."""
        with self._lock:
            values = [] if self._map is None else [self._map.lookup(block) for block in blocks]
        return sum(unpack_target(value, 0).uses for value in values if value is not None)

    def set_own_addresses(self, addresses: Callable[[], Collection[str]]) -> None:
        """Update the list of the host's own addresses; `addresses` is called only if they are redirected."""
        if self._map is None or not self._host_addresses:
            return
        own = frozenset(map(pack_address, filter(_can_be_redirected, addresses())))
        with self._lock:
            if own != self._own_addresses:
                loaded = self._require().loaded
                for former in set(loaded.keys("own_addresses", keys.ADDRESS_BYTES)) - own:
                    loaded.delete("own_addresses", former)
                for address in own:
                    loaded.update("own_addresses", address, b"\1")
                self._own_addresses = own

    def _load(self, former_links: Sequence[int]) -> PortMap:
        loaded = LoadedObject(OBJECT, former_links, bytes([self._host_addresses]))
        self._own_addresses = frozenset()
        return PortMap(loaded, "targets", keys.TARGET_BYTES, keys.redirect_spans)


def _can_be_redirected(text: str) -> bool:
    """True unless it is loopback, which the program knows itself, or IPv6 link-local, which the relay serves."""
    address = ip_address(text)
    return not (address.is_loopback or (address.version == 6 and address.is_link_local))
