"""The loopback redirect: where it leads connections to published ports (redirect.bpf.c says how).

What this file knows: the redirect's maps.  What it must not know: which ports are published, and why.

While one daemon takes over from another, the programs of both are attached; the second one to run finds an address that
is no longer one to be redirected.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock, Target, unpack_target
from gangway.ebpf.loader import LoadedObject, ObjectFile
from gangway.ebpf.port_map import PortMap
from gangway.ebpf.program import LinkHolder, Program
from gangway.host.connected import Redirected
from gangway.inet import pack_address

OBJECT = ObjectFile(
    path=Path(__file__).with_name("redirect.bpf.o"),
    maps=(
        *("port_counts", "targets", "requested_tcp", "requested_udp", "unconnected", "other_ports"),
        *("own_addresses", "auto_bound", "excluded"),
    ),
    cgroup_programs=(
        *(f"{hook}{family}" for hook in ("connect", "sendmsg", "recvmsg", "getpeername") for family in "46"),
        "release",
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
        return {block: Target(*unpack_target(value, block.first)[:2]) for block, value in self._found().items()}

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

    def take_stale(self) -> list[Redirected]:
        """Return the sockets that lead where the requested address does not lead any more, and forget them."""
        with self._lock:
            if self._map is None:
                return []
            stale = [*self._find_stale(self._map)]
            lost = {(one.cookie, one.to[0]) for one in stale}
            for key, value in (
                [*self._map.loaded.entries("other_ports", keys.FLOW_BYTES, keys.PEER_BYTES)] if stale else ()
            ):
                flow, peer = keys.unpack_flow(key), keys.unpack_peer(value)
                if (flow.cookie, peer[0] if flow.peer[1] else flow.peer[0]) in lost:
                    self._map.loaded.delete("other_ports", key)
        return stale

    def _find_stale(self, port_map: PortMap) -> Iterator[Redirected]:
        leads_to: dict[tuple[str, bytes], keys.Peer | None] = {}
        for protocol in keys.PROTOCOLS:
            name = f"requested_{protocol}"
            for key, value in [*port_map.loaded.entries(name, keys.FLOW_BYTES, keys.PEER_BYTES)]:
                if (protocol, value) not in leads_to:
                    leads_to[protocol, value] = _find_target(port_map, protocol, keys.unpack_peer(value))
                flow = keys.unpack_flow(key)
                if flow.peer != leads_to[protocol, value] and port_map.loaded.delete(name, key):
                    yield Redirected(protocol, flow.cookie, flow.peer, keys.unpack_peer(value))

    def set_own_addresses(self, addresses: Callable[[], Collection[str]]) -> None:
        """Update the list of the host's own addresses; `addresses` is called only if they are redirected."""
        if self._map is None or not self._host_addresses:
            return
        own = frozenset(map(pack_address, filter(_can_be_redirected, addresses())))
        with self._lock:
            if own != self._own_addresses:
                self._require().loaded.set_keys("own_addresses", own, keys.ADDRESS_BYTES)
                self._own_addresses = own

    def _load(self, former_links: Sequence[int]) -> PortMap:
        loaded = LoadedObject(OBJECT, former_links, bytes([self._host_addresses]))
        self._own_addresses = frozenset()
        return PortMap(loaded, "targets", keys.TARGET_BYTES, keys.REDIRECT_ROWS, keys.redirect_spans)


def _find_target(port_map: PortMap, protocol: str, requested: keys.Peer) -> keys.Peer | None:
    """Return where an address and port lead, as the program finds it."""
    address, port = requested
    for at in (keys.unspecified(address), address):
        value = port_map.lookup(PortBlock(protocol, at, port, port))
        if value is not None:
            return unpack_target(value, port)[:2]
    return None


def _can_be_redirected(text: str) -> bool:
    """True unless it is loopback, which the program knows itself, or IPv6 link-local, which the relay serves."""
    address = ip_address(text)
    return not (address.is_loopback or (address.version == 6 and address.is_link_local))
