"""What carries traffic besides rules: the relay, the steering of ports to it, and the loopback redirect.

What this file knows: how the three go together.  What it must not know: what is published, and why.

Requests and leases run in different threads, so each change of a port is made under a lock; none takes more than some
milliseconds.  Only leases change what belongs to leases: the rest of gangway neither finds nor removes it.
"""

import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from threading import RLock

from gangway.ebpf.keys import PortBlock, Target, blocks
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError, HostRefused, PortInUse
from gangway.host import connected, sockets
from gangway.host.saved_settings import SavedSettings
from gangway.inet import format_host
from gangway.model import Address
from gangway.plan import MappingPlan
from gangway.reconcile.repairs import relay_restarted
from gangway.reconcile.state import State, ports_of, redirects_of
from gangway.relay.client import RelayClient
from gangway.relay.protocol import LEASES, HostPorts, Mode, Serve
from gangway.relay.sockets import Counters

TW_REUSE = "net.ipv4.tcp_tw_reuse"
"""The relay's connections to a container come from one address, and its side keeps TIME_WAIT for 60 s: 28,000
local ports are used up in seconds.  At 1 the kernel uses such a port again after a second, where TCP timestamps
make that safe (ip-sysctl.rst, RFC 6191)."""
WITHOUT_TW_REUSE = "many short connections to one container may use up the local ports, and are refused then"
Reserved = Mapping[HostPorts, Sequence[int]]
"""Ports that are reserved already, each with the descriptors that the relay needs to serve it."""


class DataPlane:
    """The relay, steering and redirect of one network namespace."""

    def __init__(self, relay: RelayClient, steering: Steering, redirect: Redirect, settings: SavedSettings) -> None:
        self._lock = RLock()
        self.relay = relay
        self.steering = steering
        self.redirect = redirect
        self._settings = settings
        self.reuse_ports = True  # set `net.ipv4.tcp_tw_reuse` while the relay runs
        self._is_reuse_set = False
        self._restored: dict[str, int] = {}
        """For `networks` and `leases`: how many relays had exited when the next one was given the ports of these."""
        self._leased: set[PortBlock] = set()  # the redirect's entries that belong to leases
        self._raw: dict[int, socket.socket] = {}  # by family, what the relay answers from UDP ports with that are held

    def close(self) -> None:
        """Close descriptors; while a relay runs, ports stay published."""
        self.redirect.close()
        self.steering.close()
        self.relay.close()
        for sock in self._raw.values():
            sock.close()

    def found(self) -> State:
        """Return what the kernel and the relay have, without what belongs to leases, also an earlier daemon's."""
        with self._lock:
            redirects, steered = self.redirect.entries(), self.steering.entries()
            served = self.relay.served() if self.relay.is_running() else []
            leased = self._leased.union(*(lease_blocks(one.ports) for one in served if one.mode in LEASES))
        return State(
            ports={one.ports: one for one in served if one.mode not in LEASES},
            steered=steered,
            redirects={block: to for block, to in redirects.items() if block not in leased},
        )

    def exclude(self, addresses: Iterable[Address]) -> None:
        """Serve nobody at these addresses from now on: no redirect, no steering, no relay."""
        texts = sorted(map(str, addresses))
        self.redirect.exclude(texts)
        self.steering.exclude(texts)
        self.relay.exclude(texts)

    def leased(self) -> list[Serve]:
        """Return the leased ports that the relay serves, those of an earlier daemon included."""
        with self._lock:
            return self.relay.leased() if self.relay.is_running() else []

    def restarted(self, whose: str, exits: int) -> str:
        """Record that `networks` or `leases` have their ports served after the exit of so many relays.

        Return what to log when both have: the relay was restarted; else an empty text.
        """
        with self._lock:
            self._restored[whose] = exits
            exited = self.relay.last_exit
            if exited is None or any(self._restored.get(one) != self.relay.exits for one in ("networks", "leases")):
                return ""
            served = {one.ports[:1] + one.ports[2:] for one in self.relay.served()}
            self.relay.last_exit = None
        count = sum(last - first + 1 for _, first, last in served)
        return f"{relay_restarted(exited.reason, count)} after {time.monotonic() - exited.at_s:.2f} s"

    def restore_if_unused(self) -> bool:
        """Restore the setting that the relay needs, if it serves nothing; False if it serves something."""
        with self._lock:
            if self.relay.is_running() and self.relay.served():
                return False
            self._is_reuse_set = False
            self._settings.restore(TW_REUSE)
        return True

    def stop_if_unused(self) -> bool:
        """Stop a relay that serves nothing; False if it serves something."""
        with self._lock:
            if self.restore_if_unused():
                self.relay.stop()
                return True
        return False

    def serve(self, ports: Iterable[Serve], reserved: Reserved) -> None:
        """Have the relay serve ports, all or none; each is reserved first unless it is already, or held."""
        done: list[Serve] = []
        try:
            for port in ports:
                with self._lock:
                    self._serve(port, reserved.get(port.ports))
                done.append(port)
        except GangwayError:
            self.remove(done)
            raise

    def remove(self, ports: Iterable[Serve]) -> None:
        """Stop serving ports by the relay, and free them."""
        for port in ports:
            with self._lock:
                self.relay.remove(port.ports)
                if port.mode is Mode.SHARED:
                    self.steering.release(*port.ports)

    def add_redirects(self, redirects: Mapping[PortBlock, Target]) -> None:
        """Add or change entries of the redirect; sockets that were redirected to a former target are ended."""
        self.redirect.add(redirects)
        self._end_stale_sockets()

    def remove_redirects(self, redirects: Iterable[PortBlock]) -> None:
        """Remove entries of the redirect, except those of leases: one may have been granted since they were found.

        Sockets that were redirected by them are ended.
        """
        with self._lock:
            self.redirect.remove(block for block in redirects if block not in self._leased)
        self._end_stale_sockets()

    def serve_lease(self, port: Serve, redirects: Mapping[PortBlock, Target], fds: Sequence[int]) -> None:
        """Serve a lease's port by the socket in `fds`, and redirect its clients: both or neither."""
        with self._lock:
            self._serve(port, fds)
            self._leased |= redirects.keys()
            try:
                if redirects:
                    self.redirect.add(redirects)
            except GangwayError:
                self.remove_lease(port, redirects)
                raise

    def remove_lease(self, port: Serve, redirects: Collection[PortBlock]) -> None:
        """Stop serving a lease's port and redirecting its clients; if one of these fails, the other is done, too."""
        with self._lock:
            self._leased.difference_update(redirects)
            try:
                self.redirect.remove(redirects)
            finally:
                self.relay.remove(port.ports)
        self._end_stale_sockets()

    def matching(self, planned: MappingPlan, port: int) -> str:
        """Describe the entry of the redirect that a client of a mapping's port matches, as the kernel has it."""
        mapping = planned.mapping
        hit = self.redirect.lookup(mapping.protocol.value, str(mapping.host_address), port)
        if hit is None:
            return "no entry in the redirect's map"
        source, target = f"{format_host(mapping.host_address)}:{port}", f"{format_host(hit.address)}:{hit.port}"
        uses = self.redirected(planned)
        return f"redirect map: {mapping.protocol} {source} -> {target}; the mapping was used {uses} times so far"

    def redirected(self, planned: MappingPlan) -> int:
        """Return how often sockets were redirected to a mapping: connections, and peers of unconnected sockets."""
        return self.redirect.count(block for block, _ in redirects_of(planned))

    def relayed(self, found: Iterable[MappingPlan]) -> list[Counters]:
        """Return, for each mapping, what the relay has counted of its ports since it serves them."""
        counted: Mapping[HostPorts, Counters] = {}
        with suppress(GangwayError):  # it has exited
            counted = self.relay.counted() if self.relay.is_running() else {}
        return [_total(counted[ports] for ports, _ in ports_of(planned) if ports in counted) for planned in found]

    def _end_stale_sockets(self) -> None:
        """End the sockets that lead where they would not be redirected any more.

        Without the lock: it takes milliseconds to find the processes that have them.
        """
        if stale := self.redirect.take_stale():
            connected.end(stale)

    def _serve(self, port: Serve, reserved: Sequence[int] | None) -> None:
        if self.reuse_ports and not self._is_reuse_set:
            if self._settings.is_intact(TW_REUSE):  # else another program has changed it since an earlier daemon did
                try:
                    self._settings.set(TW_REUSE, "1")
                except HostRefused as error:
                    self._settings.warn(f"{error}: {WITHOUT_TW_REUSE}")
            self._is_reuse_set = True
        if reserved is not None:
            return self.relay.serve(port, reserved)
        if port.mode is Mode.HELD:
            return self.relay.serve(port, self._answering(port.ports))
        if port.mode is not Mode.SHARED:
            with self._bound(port.ports) as sock:
                return self.relay.serve(port, [sock.fileno()])
        reservation = self.steering.reserve(*port.ports)
        try:
            return self.relay.serve(port)
        except GangwayError:
            reservation.close()
            raise

    def _bound(self, ports: HostPorts) -> socket.socket:
        """Return a socket bound to a port.  A relay that was replaced keeps its own, whoever serves the port now."""
        try:
            return sockets.bind_port(ports.protocol, ports.address, ports.first)
        except PortInUse:
            if (former := self.relay.former_socket(ports)) is None:
                raise
            return former

    def _answering(self, held: HostPorts) -> list[int]:
        """Return the descriptors that the relay needs to answer from ports that another program's sockets have."""
        if held.protocol != "udp":
            return []
        family = 6 if ":" in held.address else 4
        if family not in self._raw:
            self._raw[family] = sockets.open_raw(family)
        return [self._raw[family].fileno()]


def _total(counted: Iterable[Counters]) -> Counters:
    return Counters._make(map(sum, zip(Counters(), *counted, strict=True)))


def lease_blocks(leased: HostPorts) -> Iterator[PortBlock]:
    """Yield the redirect's entries that a lease may have: a socket at `::` may serve IPv4 clients, too."""
    for address in (leased.address, "0.0.0.0") if leased.address == "::" else (leased.address,):
        yield from blocks(*leased._replace(address=address))
