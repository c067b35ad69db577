"""A daemon's parts over fakes of what they change: the relay, the two eBPF programs, the firewall's driver.

Everything else is real: the database, links and sysctls of the network namespace that the test runs in.
"""

import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from gangway.daemon.config import Config
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.down import Down
from gangway.ebpf.keys import PortBlock, SteeringState, Target, blocks
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError, HostRefused, Unsupported
from gangway.facts import Firewall, HostFacts
from gangway.firewall.base import Driver
from gangway.host.connected import Redirected
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Links
from gangway.host.reserved_ports import ReservedPorts
from gangway.host.rule_notices import RuleNotices
from gangway.host.saved_settings import SavedSettings
from gangway.log import Log
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, Plan
from gangway.reconcile.containers import Looked
from gangway.reconcile.controller import Controller
from gangway.reconcile.dataplane import DataPlane
from gangway.reconcile.executor import Executor
from gangway.reconcile.observe import Chains, Observer
from gangway.reconcile.state import State
from gangway.relay.client import Exit, RelayClient
from gangway.relay.protocol import LEASES, HostPorts, Serve
from gangway.state.adoption import Adoption
from gangway.state.database import Database
from gangway.state.leases import Leases
from gangway.state.registry import Registry
from gangway.state.requests import Requests
from tests.unit.fake_host import FakeGuard


class Calls:
    """The calls of the fakes, in order; a call fails while its name is in `errors`."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.errors: dict[str, GangwayError] = {}

    def record(self, name: str) -> None:
        """Record a call, or fail."""
        self.names.append(name)
        if name in self.errors:
            raise self.errors[name]

    def fail(self, *names: str) -> None:
        """Let these calls fail from now on; all others work."""
        self.errors = {name: HostRefused(f"{name} failed") for name in names}

    def count(self, name: str) -> int:
        """Return how often a call was made."""
        return self.names.count(name)


class FakeRelay:
    """A relay that keeps the sockets that it is given open."""

    pid: int | None = None

    def __init__(self, calls: Calls) -> None:
        self.exits = 0
        self.last_exit: Exit | None = None
        self.ports: dict[HostPorts, Serve] = {}
        self.descriptors: dict[HostPorts, list[int]] = {}
        self.pruned: list[set[HostPorts]] = []  # what was wanted, each time that replaced relays were pruned
        self._calls = calls
        self._running = True

    def serve(self, port: Serve, fds: Sequence[int] = ()) -> None:
        self._calls.record("relay.serve")
        self._forget(port.ports)
        self._running, self.ports[port.ports] = True, port
        self.descriptors[port.ports] = [os.dup(fd) for fd in fds]

    def start(self) -> None:
        self._calls.record("relay.start")

    def remove(self, ports: HostPorts) -> None:
        self._calls.record("relay.remove")
        self._forget(ports)

    def former_socket(self, ports: HostPorts) -> None:
        """No relay was replaced."""

    def prune(self, wanted: Collection[HostPorts]) -> None:
        self.pruned.append(set(wanted))

    def served(self) -> list[Serve]:
        return list(self.ports.values())

    def leased(self) -> list[Serve]:
        return [one for one in self.ports.values() if one.mode in LEASES]

    def is_running(self) -> bool:
        return self._running

    def exclude(self, addresses: Sequence[str]) -> None:
        self._calls.record("relay.exclude")

    def stop(self) -> None:
        self._calls.record("relay.stop")

    def kill(self) -> None:
        """End as a relay does that is killed: its ports are free."""
        for ports in tuple(self.ports):
            self._forget(ports)
        self._running, self.exits, self.last_exit = False, self.exits + 1, Exit(time.monotonic(), "signal 9")

    def _forget(self, ports: HostPorts) -> None:
        self.ports.pop(ports, None)
        for fd in self.descriptors.pop(ports, ()):
            os.close(fd)


class FakeRedirect(Redirect):
    """A redirect that is a dict."""

    def __init__(self, calls: Calls) -> None:
        self.unavailable = ""
        self.targets: dict[PortBlock, Target] = {}
        self._calls = calls

    def entries(self) -> dict[PortBlock, Target]:
        return dict(self.targets)

    def add(self, entries: Mapping[PortBlock, Target]) -> None:
        self._calls.record("redirect.add")
        if self.unavailable:
            raise Unsupported(self.unavailable)
        self.targets |= entries

    def remove(self, blocks: Iterable[PortBlock]) -> None:
        self._calls.record("redirect.remove")
        for block in blocks:
            self.targets.pop(block, None)

    def lookup(self, protocol: str, address: str, port: int) -> Target | None:
        for block, target in self.targets.items():
            if block[:2] == (protocol, address) and block.first <= port <= block.last:
                return Target(target.address, target.port + port - block.first)
        return None

    def count(self, blocks: Iterable[PortBlock]) -> int:
        return len([block for block in blocks if block in self.targets])

    def take_stale(self) -> list[Redirected]:
        return []

    def set_own_addresses(self, addresses: Callable[[], Collection[str]]) -> None:
        self._calls.record("redirect.set_own_addresses")

    def exclude(self, addresses: Collection[str]) -> None:
        self._calls.record("redirect.exclude")

    def reattach(self) -> None:
        self._calls.record("redirect.reattach")


class FakeSteering(Steering):
    """Steering that is a dict; it refuses to reserve the ports in `refused`."""

    def __init__(self, calls: Calls) -> None:
        self.unavailable = ""
        self.steered: dict[PortBlock, SteeringState] = {}
        self.refused: dict[HostPorts, GangwayError] = {}
        self._calls = calls

    def start(self) -> None:
        self._calls.record("steering.start")

    def exclude(self, addresses: Collection[str]) -> None:
        self._calls.record("steering.exclude")

    def entries(self) -> dict[PortBlock, SteeringState]:
        return dict(self.steered)

    def reserve(self, protocol: str, address: str, first: int, last: int) -> ExitStack:
        self._calls.record("steering.reserve")
        ports = HostPorts(protocol, address, first, last)
        if ports in self.refused:
            raise self.refused[ports]
        for block in blocks(*ports):
            if self.steered.get(block) is not SteeringState.SERVED:
                self.steered[block] = SteeringState.RESERVED
        reservation = ExitStack()
        reservation.callback(self.release, *ports)
        return reservation

    def release(self, protocol: str, address: str, first: int, last: int) -> None:
        for block in blocks(protocol, address, first, last):
            if self.steered.get(block) is SteeringState.RESERVED:
                del self.steered[block]

    def add(self, entries: Mapping[PortBlock, SteeringState]) -> None:
        self._calls.record("steering.add")
        self.steered |= entries

    def remove(self, blocks: Iterable[PortBlock]) -> None:
        self._calls.record("steering.remove")
        for block in blocks:
            self.steered.pop(block, None)

    def reattach(self) -> None:
        self._calls.record("steering.reattach")

    def reclaim_auto_bound(self) -> None:
        self._calls.record("steering.reclaim_auto_bound")


class FakeDriver(Driver):
    """A firewall whose rules are the plan that was written last, and the mappings that were changed since."""

    def __init__(self, calls: Calls, notices: RuleNotices) -> None:
        super().__init__(notices, FakeGuard())
        self.plan: Plan | None = None
        self.mappings: set[str] = set()
        self.further: frozenset[Neighbours] = frozenset()
        self.intact = True
        self._calls = calls

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        self._calls.record("driver.rewrite")
        self.notices.forget()
        self.plan, self.mappings, self.intact = plan, {str(one.mapping) for one in plan.mappings}, True
        self.further = plan.further

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        self._calls.record("driver.change")
        self.mappings -= {str(one.mapping) for one in removed}
        self.mappings |= {str(one.mapping) for one in added}

    def change_further(self, removed: Collection[Neighbours], added: Collection[Neighbours]) -> None:
        self._calls.record("driver.change_further")
        assert self.further.issuperset(removed)
        assert self.further.isdisjoint(added)
        self.further = self.further.difference(removed).union(added)

    def has_rules_of(self, plan: Plan) -> bool:
        return self.intact

    def remove(self, before: Plan | None = None) -> None:
        self._calls.record("driver.remove")
        self.plan, self.mappings, self.further = None, set(), frozenset()


class FakeObserver(Observer):
    """An observer that is given the facts about the host."""

    given = HostFacts(Firewall.NFTABLES, forwarding=frozenset({4, 6}))

    def facts(self, switched_on: frozenset[int]) -> HostFacts:
        lease_facts = self.lease_facts()
        return replace(self.given, no_redirect=lease_facts.no_redirect, no_steering=lease_facts.no_steering)

    def chains(self, anew: bool = False) -> Chains:
        return {4: {}, 6: {}}


class Daemon:
    """The parts of a daemon with its database in a folder; another daemon may follow with the same one."""

    def __init__(self, folder: Path, former: "Daemon | None" = None) -> None:
        self.log: list[str] = []
        self.calls = Calls()
        self.relay: FakeRelay = former.relay if former is not None else FakeRelay(self.calls)
        self.redirect, self.steering = FakeRedirect(self.calls), FakeSteering(self.calls)
        if former is not None:
            self.redirect.targets, self.steering.steered = former.redirect.targets, former.steering.steered
        self.driver = FakeDriver(self.calls, RuleNotices())
        self.database = Database(folder / "state.db")
        self.settings = settings = SavedSettings(self.database, self.log.append)
        self.dataplane = DataPlane(cast(RelayClient, self.relay), self.steering, self.redirect, settings)
        self.links = Links()
        self.registry = Registry(self.database)
        bridges = self.registry.adopted_bridges
        self.observer = FakeObserver(
            Config(), self.database, self.links, self.dataplane, bridges, lambda: self.leases.has_any
        )
        forwarding = ForwardingSwitch(settings, self.links, lambda _family: ())
        self.executor = Executor(self.driver, self.links, self.dataplane, forwarding, self.observer.alias)
        self.reserved_ports = ReservedPorts(settings, self.log.append)
        former_flows = partial(self.executor.delete_flows, former=True)
        self.leases = Leases(self.registry.index, self.dataplane, self.observer.lease_facts, former_flows)
        # A clock on which every line is long after the last one: nothing is suppressed.
        log = Log(lambda event: self.log.append(event.text), clock=iter(range(0, 1 << 30, 100)).__next__)
        self.controller = Controller(
            self.observer, self.registry, self.executor, self.reserved_ports, self._driver_for, log
        )
        self.requests = Requests(self.controller, self.registry, self.executor, self.leases)
        parts = self.controller, self.registry, self.executor, self.leases, self.log.append
        self.reported: list[tuple[str, str, int]] = []
        """Of Docker's containers: what was done, and with how many ports."""
        self.adoption = Adoption(
            self.requests.repair,
            *parts,
            lambda what, container, ports: self.reported.append((what, container, len(ports))),
        )
        self.adopt = self.adoption.adopt
        parts_of_down = self.requests, self.registry, self.adoption, self.dataplane, settings, self.database
        declared = DeclaredFiles(folder / "conf.d")
        self.down = Down(*parts_of_down, declared, lambda: [] if self.relay.pid is None else [self.relay.pid])

    def close(self) -> None:
        """Close everything; what the fakes have stays as it is."""
        for lease in dict.fromkeys(self.leases._leases.values()):
            lease.sock.close()
        for sock in self.dataplane._raw.values():
            sock.close()
        for part in (self.links, self.observer.tools, self.database, self.driver.notices):
            part.close()

    def end(self) -> None:
        """Close everything, and end the relay."""
        self.relay.kill()
        self.close()

    def is_consistent(self) -> bool:
        """True if what the fakes and the host's links have is what the registry wants."""
        found = self.observer.found(State(), Looked(self.links.all(), {}))
        if not self.registry.networks:
            return not (found.ports or found.redirects or found.steered or found.bridges or self.driver.mappings)
        plan = self.registry.plan()
        wanted = self.registry.state(plan)
        return (
            (found.ports, found.redirects, found.steered) == (wanted.ports, wanted.redirects, wanted.steered)
            and found.bridges.keys() == wanted.bridges.keys()
            and found.attachments.keys() == wanted.attachments.keys()
            and self.driver.mappings == {str(one.mapping) for one in self.registry.mappings() if one.has_rules}
            and self.driver.further == (plan.further if plan is not None else frozenset())
        )

    def change_rules(self) -> None:
        """Damage the rules as another program does."""
        self.driver.intact = False
        self.driver.notices.suspect()

    def _driver_for(self, _firewall: Firewall) -> Driver:
        return self.driver


def listening(address: str, port: int = 0, v6only: bool = True, protocol: str = "tcp") -> socket.socket:
    """Return a launcher's socket: bound, and listening if it is TCP's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind, number = {
        "tcp": (socket.SOCK_STREAM, socket.IPPROTO_TCP),
        "udp": (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    }[protocol]
    sock = socket.socket(family, kind, number)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    sock.bind((address, port))
    if protocol == "tcp":
        sock.listen()
    return sock
