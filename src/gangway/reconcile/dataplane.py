"""What carries traffic besides rules: the relay, the steering of ports to it, and the loopback redirect.

What this file knows: how the three go together.  What it must not know: what is published, and why.

Requests and leases run in different threads, so a change holds `lock`; none takes more than some milliseconds.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from threading import RLock

from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError, HostRefused
from gangway.host import sockets
from gangway.host.saved_settings import SavedSettings
from gangway.inet import format_host
from gangway.plan import MappingPlan
from gangway.reconcile.state import State, redirects_of
from gangway.relay.client import RelayClient
from gangway.relay.protocol import HostPorts, Mode, Serve

TW_REUSE = "net.ipv4.tcp_tw_reuse"
"""The relay's connections to a container come from one address, and its side keeps TIME_WAIT for 60 s: 28,000
ephemeral ports are used up in seconds.  At 1 the kernel uses such a port again after a second, where TCP timestamps
make that safe (ip-sysctl.rst, RFC 6191)."""
Reserved = Mapping[HostPorts, Sequence[int]]
"""Ports that are reserved already, each with the descriptors that the relay needs to serve it."""


class DataPlane:
    """The relay, steering and redirect of one network namespace."""

    def __init__(self, relay: RelayClient, steering: Steering, redirect: Redirect, settings: SavedSettings) -> None:
        self.lock = RLock()
        self.relay = relay
        self.steering = steering
        self.redirect = redirect
        self._settings = settings
        self.reuse_ports = True
        """Set `net.ipv4.tcp_tw_reuse` while the relay runs."""

    def close(self) -> None:
        """Close descriptors; while a relay runs, everything goes on."""
        self.redirect.close()
        self.steering.close()
        self.relay.close()

    def is_intact(self) -> bool:
        """True if nobody else has detached a program."""
        return self.redirect.is_attached() and self.steering.is_attached()

    def found(self) -> State:
        """Return what the kernel and the relay have, without what belongs to leases."""
        with self.lock:
            redirects, steered = self.redirect.entries(), self.steering.entries()
            served = self.relay.served() if self.relay.is_running() else []
        leased = {
            (one.ports.protocol, address, one.ports.first)
            for one in served
            if one.mode is Mode.LEASED
            for address in _addresses(one.ports)
        }
        return State(
            ports={one.ports: one for one in served if one.mode is not Mode.LEASED},
            steered=steered,
            redirects={block: to for block, to in redirects.items() if block[:3] not in leased},
        )

    def stop_if_unused(self) -> None:
        """Stop a relay that serves nothing, and restore the setting that it needed."""
        with self.lock:
            if not (self.relay.is_running() and self.relay.served()):
                self._settings.restore(TW_REUSE)
                self.relay.stop()

    def serve(self, ports: Iterable[Serve], reserved: Reserved) -> None:
        """Have the relay serve ports, all or none; each is reserved first unless it is already."""
        if self.reuse_ports:
            with suppress(HostRefused):  # many short connections will run out of ports then, and nothing else
                self._settings.set(TW_REUSE, "1")
        done: list[Serve] = []
        try:
            for port in ports:
                with self.lock:
                    self._serve(port, reserved.get(port.ports))
                done.append(port)
        except GangwayError:
            self.remove(done)
            raise

    def remove(self, ports: Iterable[Serve]) -> None:
        """Have the relay serve ports no longer, and free them."""
        for port in ports:
            with self.lock:
                self.relay.remove(port.ports)
                if port.mode is Mode.SHARED:
                    self.steering.release(*port.ports)

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

    def _serve(self, port: Serve, reserved: Sequence[int] | None) -> None:
        if reserved is not None:
            return self.relay.serve(port, reserved)
        if port.mode is not Mode.SHARED:
            with sockets.bind_port(port.ports.protocol, port.ports.address, port.ports.first) as sock:
                return self.relay.serve(port, [sock.fileno()])
        reservation = self.steering.reserve(*port.ports)
        try:
            return self.relay.serve(port)
        except GangwayError:
            reservation.close()
            raise


def _addresses(leased: HostPorts) -> tuple[str, ...]:
    """Return the addresses that a lease's redirects may have: a socket at `::` may serve IPv4 clients, too."""
    return (leased.address, "0.0.0.0") if leased.address == "::" else (leased.address,)
