"""Keeps the host as it should be: compares everything that is wanted with the host, and repairs the difference.

`reconcile` may be called at any time.  `check` first finds out whether that is necessary: after a notification from the
kernel (of rules: `check_rules`), and every few seconds (`thorough`), because not every change sends one.  Both do what
they can: a failure is logged, and the next check tries again.  A request repairs first (`repair_before_request`), then
carries out its own small difference, and records it (`record_applied`).
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto
from functools import partial

from gangway.errors import GangwayError, HostRefused, TimedOut
from gangway.facts import Firewall, HostFacts
from gangway.firewall.base import Driver
from gangway.host.reserved_ports import ReservedPorts
from gangway.log import Log
from gangway.model import Endpoint
from gangway.plan import MappingPlan
from gangway.reconcile import orphans, repairs
from gangway.reconcile.attempts import Attempts
from gangway.reconcile.changes import changes, has_other_rules, is_rerouted, now_unforwardable
from gangway.reconcile.containers import Container, Looked
from gangway.reconcile.dataplane import Reserved
from gangway.reconcile.diff import Flows, Ports, Rewrite, Step, diff, parts
from gangway.reconcile.executor import Executor
from gangway.reconcile.liveness import is_dead
from gangway.reconcile.observe import Observer, shared_chains
from gangway.reconcile.state import State, link_of, ports_of, redirects_of, steered_of, steered_ports, translated_udp
from gangway.state.registry import Registry


class Condition(Enum):
    """How the host compares with what is wanted."""

    UNKNOWN = auto()  # nothing has been compared yet
    APPLIED = auto()  # everything that is wanted is applied, as far as we know
    DIRTY = auto()  # the rules may differ from the plan: the next check rewrites them
    RETRYING = auto()  # the rules are applied; something else failed, and the next check tries it again


class Controller:
    """The host of one daemon.  `driver_for` returns the driver of a firewall."""

    def __init__(
        self,
        observer: Observer,
        registry: Registry,
        executor: Executor,
        reserved_ports: ReservedPorts,
        driver_for: Callable[[Firewall], Driver],
        log: Log,
    ) -> None:
        self._observer, self._registry, self._executor = observer, registry, executor
        self._reserved_ports, self._driver_for, self._log = reserved_ports, driver_for, log
        self._condition = Condition.UNKNOWN
        self._facts: HostFacts | None = None
        self._relay_exits = 0  # how many relays had exited when everything was compared last
        self._attempts = Attempts(log.warning)  # a round begins with each comparison

    @property
    def facts(self) -> HostFacts:
        """The facts that decisions are based on."""
        if self._facts is None:
            self._executor.dataplane.steering.start()
            facts = self._gather()
            self._executor.driver = self._driver_for(facts.firewall)
            self._registry.decide(facts)
            self._facts = facts
            self._log_unforwardable(None)
        return self._facts

    @property
    def is_ready(self) -> bool:
        """True if the facts are known: then questions are answered without a change of anything."""
        return self._facts is not None

    @property
    def problems(self) -> Collection[str]:
        """What failed when everything was compared last, and is tried again."""
        return () if self._condition is Condition.APPLIED or not self._registry.networks else self._attempts.failures

    @property
    def needs_start(self) -> bool:
        """True if a daemon that starts has something to compare: networks, or what an earlier daemon changed."""
        return bool(self._registry.networks) or not self._observer.is_fresh()

    def repair_before_request(self, container: str | None = None) -> None:
        """Repair other programs' changes before a request is carried out; remove its container if that has exited."""
        _ = self.facts
        if container is not None and self._registry.has_endpoint(container):
            if self.is_dead(container):
                self._reap(container)
            else:
                self.look_into(container)
        if self._registry.networks:
            changed = self._executor.driver.notices.is_pending()
            if changed or self._condition in (Condition.UNKNOWN, Condition.DIRTY) or self._has_lost_relay():
                self.check()

    def carry_out(self, before: State, after: State, reserved: Reserved | None = None) -> None:
        """Carry out the difference of two states, all of it or nothing."""
        self._reserved_ports.add(steered_ports(after.mappings.values()))  # first: the kernel may select one any time
        try:
            self._executor.carry_out(diff(before, after), reserved)
        except BaseException as error:
            if isinstance(error, ExceptionGroup):  # not all could be undone
                self._condition = Condition.DIRTY
            self._release_reserved_ports(after)
            raise
        self._release_reserved_ports(before)

    def remove(self, state: Callable[[], State]) -> None:
        """Remove a state; if that fails because something is missing, repair the host, and ask for the state again."""
        try:
            self.carry_out(state(), State())
        except TimedOut:
            raise  # nothing is missing, and a repair would wait as long
        except HostRefused:
            self._condition = Condition.DIRTY
            self.reconcile()
            self.carry_out(state(), State())

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Restore what was removed from the host if the block fails, which removes it from the registry."""
        try:
            yield
        except GangwayError:
            self._condition = Condition.DIRTY
            self._attempt(self.reconcile)
            raise

    def record_applied(self) -> None:
        """Record that the rules of the registry's plan are applied, and gather the facts that this has changed."""
        if self._condition is Condition.UNKNOWN:
            self._condition = Condition.APPLIED
        self.update_addresses()
        before, self._facts = self.facts, self._gather()
        self._log_unforwardable(before)
        written = self._registry.plan() if self._facts != before else None
        self._registry.decide(self._facts)
        if written is not None and has_other_rules(written, self._registry.plan()):
            self._condition = Condition.DIRTY
        if not self._registry.networks:
            self._attempt(self._executor.dataplane.stop_if_unused)

    def check(self, since_s: float | None = None, thorough: bool = False) -> None:
        """Repair what another program has changed; `since_s` is the monotonic time at which the kernel notified us."""
        if thorough:
            self._reattach()  # leases need that, too
        self.update_addresses()
        if not self._registry.networks:
            if self._has_lost_relay():
                self._log_restart(self._executor.dataplane.relay.exits)
            return
        self.reap_dead_containers()
        looked = self._look_into_containers() if thorough else None
        if thorough:
            self._attempt(self._executor.dataplane.steering.reclaim_auto_bound)
        self._look_at_chains(thorough)
        self._observer.routing(anew=True)
        is_due = self._condition in (Condition.RETRYING, Condition.DIRTY) or self._gather() != self.facts
        if is_due or self._is_disturbed(looked):
            self.reconcile(since_s)
        else:
            self._attempts.forget()

    def check_rules(self, since_s: float | None = None) -> None:
        """Check, unless neither our rules nor chains that filter what is forwarded have changed."""
        is_due = self._condition is Condition.RETRYING or self._executor.driver.notices.is_pending()
        if is_due and self._restore_rules(since_s):
            self.check(since_s)

    def reconcile(self, since_s: float | None = None) -> None:
        """Make the host as it should be, and log what had to be repaired."""
        dataplane = self._executor.dataplane
        self._attempts.begin_round()
        has_lost_relay, exits = self._has_lost_relay(), dataplane.relay.exits
        self._relay_exits = exits
        is_repaired = self._reattach()
        self._attempt(self._executor.links.delete_unfinished)
        _ = self.facts
        self._look_at_chains()
        self.reap_dead_containers()
        looked = self._look_into_containers()
        self._observer.routing(anew=True)
        said, are_rerouted = self._refresh_facts()
        for name in [one.name for one in self._registry.networks if self._registry.is_unneeded(one.name)]:
            self._registry.remove_network(name)
            self._condition = Condition.DIRTY
        plan = self._registry.plan()
        was_applied = self._condition in (Condition.APPLIED, Condition.RETRYING)
        are_applied = was_applied and self._executor.driver.is_intact(lambda: plan)
        wanted = self._registry.state(plan)
        # Of the families that are not wanted only those that are ours to stop, even if a daemon died while it did so.
        forwarding = (self.facts.forwarding & wanted.forwarding) | (self.facts.switched_on - wanted.forwarding)
        before = replace(
            self._observer.found(wanted, looked), plan=plan if are_applied else None, forwarding=forwarding
        )
        done, failed = self._apply(diff(before, wanted))
        dataplane.relay.prune(wanted.ports)
        if are_rerouted:
            self._attempt(partial(self._executor.do, Flows(translated_udp(self._registry.mappings()), ())))
        for bridge in self._observer.routing(anew=True).closed_bridges:
            if self._attempt(partial(self._executor.forwarding.open_bridge, bridge)):
                said.append(f"bridge {bridge} forwarded no IPv4 packets (its own setting was off): switched on")
        for mapping in self._unavailable_mappings(failed):
            dataplane.remove_redirects(block for block, _ in redirects_of(mapping))
            dataplane.steering.remove(block for block, _ in steered_of(mapping))
        self._reserved_ports.set(steered_ports(self._registry.mappings()))
        if plan is None:
            is_repaired &= self._attempt(self._executor.driver.remove)
        if any(isinstance(step, Rewrite) for step in failed):
            self._condition = Condition.DIRTY
        else:
            self._condition = Condition.APPLIED if is_repaired and not failed else Condition.RETRYING
        for text in [*said, *repairs.describe(repairs.only(done, was_applied, has_lost_relay), wanted)]:
            self._log_repair(text, since_s)
        if dataplane.relay.is_running() or not any(isinstance(step, Ports) for step in failed):
            self._log_restart(exits)
        self.record_applied()

    def reload(self) -> None:
        """Decide by other settings.  Unsupported: the firewall that they name cannot be used."""
        self.update_addresses()
        _ = self._gather()
        if self._registry.networks:
            self.check()
        else:
            self._facts = None

    def orphaned_links(self) -> list[str]:
        """Return the links that daemons with other databases have made."""
        return orphans.find(self._observer, self._log)

    def clean_up(self) -> list[str]:
        """Delete those links, and all rules and ports that are not wanted; return the links' names."""
        deleted = orphans.delete(self._observer, self._executor.links, self._driver_for, self._log)
        self._condition = Condition.DIRTY
        self.reconcile()
        return deleted

    def is_dead(self, container: str) -> bool:
        """True if a container's namespace has ended, or its process.  Of Docker's containers Docker says so."""
        is_adopted, place = self._registry.network_of(container).is_adopted, self._registry.place(container)
        return not is_adopted and is_dead(place, self._executor.links.exists(*self._registry.link_names(container)))

    def look_into(self, container: str) -> None:
        """Find out whether a container's answers pass the host, and adapt the rules."""
        if self._observer.look_again(self._container(self._registry.endpoint(container))):
            self.reconcile()

    def reap_dead_containers(self) -> bool:
        """Remove the containers whose namespace has ended; True if there was one."""
        dead = list(filter(self.is_dead, self._registry.containers))
        for container in dead:
            self._reap(container)
        return bool(dead)

    def filters(self, family: int) -> Collection[str]:
        """Return other programs' chains that filter forwarded traffic, without a shared one that has only our rules."""
        found = set(self._observer.deciding_chains()[family])
        if self.facts.firewall is Firewall.IPTABLES:
            found -= set(shared_chains(family))
            if self._executor.driver.shares_forward_chain(family):
                found.add(shared_chains(family)[0])
        return found

    def _look_into_containers(self) -> Looked:
        return self._observer.look_into([*map(self._container, self._registry.endpoints())])

    def _container(self, endpoint: Endpoint) -> Container:
        network, place = self._registry.network(endpoint.network), self._registry.place(endpoint.container)
        has_route = endpoint.is_first and not network.internal  # a default route by gangway
        gateways = network.gateways if has_route else ()
        return Container(link_of(endpoint), place.namespace, endpoint.addresses, gateways)

    def _apply(self, steps: Iterable[Step]) -> tuple[list[Step], list[Step]]:
        """Carry out as many steps as possible; return those that were, and those that failed."""
        done, failed = list[Step](), list[Step]()
        for step in steps:
            for part in parts(step, self._unavailable_mappings(failed)):
                (done if self._attempt(partial(self._executor.do, part)) else failed).append(part)
        return done, failed

    def _log_repair(self, text: str, since_s: float | None) -> None:
        after = "" if since_s is None else f" after {time.monotonic() - since_s:.2f} s"
        self._log.warning(text + after, event="repaired")

    def _log_restart(self, exits: int) -> None:
        if text := self._executor.dataplane.restarted("networks", exits):
            self._log.warning(text, event="relay-restarted")

    def _reattach(self) -> bool:
        """Attach the programs again that another program has detached; True unless one could not be."""
        dataplane = self._executor.dataplane
        is_steering = self._attempt(dataplane.steering.reattach)
        return self._attempt(dataplane.redirect.reattach) and is_steering

    def _has_lost_relay(self) -> bool:
        """True if a relay has exited since everything was compared; another one may run already, without our ports."""
        relay = self._executor.dataplane.relay
        return not relay.is_running() or relay.exits != self._relay_exits

    def _reap(self, container: str) -> None:
        self._log.warning(
            f"container {container} exited: its ports are unpublished", event="exited", container=container
        )
        endpoints = self._registry.endpoints_of(container)
        state = self._registry.state_of_endpoints(endpoints)
        try:
            self._executor.carry_out(diff(state, State()))
        except (GangwayError, ExceptionGroup):
            self._condition = Condition.DIRTY  # what is left of it is removed when everything is compared
        self._release_reserved_ports(state)
        self._registry.remove_container(container)
        if any(self._registry.is_unneeded(one.network) for one in endpoints):
            self._condition = Condition.DIRTY

    def _release_reserved_ports(self, removed: State) -> None:
        """Release the reserved ports of mappings that are no longer published."""
        if removed.steered:
            left = (one for one in self._registry.mappings() if str(one.mapping) not in removed.mappings)
            self._reserved_ports.set(steered_ports(left))

    def _restore_rules(self, since_s: float | None) -> bool:
        """Write rules that another program has changed again, before anything else is looked at.

        Until they are, new connections are not translated.  False: it failed.
        """
        driver, plan = self._executor.driver, self._registry.plan() if self.is_ready else None
        is_applied = self._condition in (Condition.APPLIED, Condition.RETRYING)
        if plan is None or not is_applied or driver.is_intact(lambda: plan):
            return True
        if not self._attempt(lambda: driver.rewrite(plan, None)):
            self._condition = Condition.DIRTY
            return False
        self._log_repair(repairs.RULES_REWRITTEN, since_s)
        return True

    def _look_at_chains(self, thorough: bool = False) -> None:
        """Read other programs' chains, if one has changed; if `thorough`, in any case."""
        if self._executor.driver.notices.have_filters_changed() or thorough:
            self._observer.chains(anew=True)

    def _log_unforwardable(self, before: HostFacts | None) -> None:
        for text in now_unforwardable(before, self.facts):
            self._log.warning(text)

    def _gather(self) -> HostFacts:
        return self._observer.facts(self._executor.forwarding.enabled_by_us)

    def _refresh_facts(self) -> tuple[list[str], bool]:
        """Gather the facts again; if they have changed, decide everything again, perhaps with another firewall.

        Return what to log, and whether flows that began before may have to take another road.
        """
        before, now = self.facts, self._gather()
        if now == before:
            return [], False
        said = list(changes(before, now, self._registry.plan()))
        if now.firewall is not before.firewall:
            self._executor.driver = self._driver_for(now.firewall)
        self._facts, self._condition = now, Condition.DIRTY
        self._registry.decide(now)
        return said, is_rerouted(before, now)

    def _is_disturbed(self, looked: Looked | None) -> bool:
        """True if something that gangway created was changed or removed; with `looked`, do not rely on notices."""
        thorough = looked is not None
        if self._condition is Condition.UNKNOWN or self._has_lost_relay():
            return True
        if not self._executor.driver.is_intact(self._registry.plan, thorough):
            return True
        if self._observer.routing().closed_bridges or (thorough and not self._reserved_ports.is_intact()):
            return True
        wanted = self._registry.links()
        return any(diff(self._observer.found_links(wanted, looked), wanted))

    def _unavailable_mappings(self, failed: Sequence[Step]) -> list[MappingPlan]:
        """Return the mappings with a port that failed: another program has the port, and keeps its clients."""
        lost = {one.ports for step in failed if isinstance(step, Ports) for one in step.before + step.after}
        mappings = self._registry.mappings() if lost else ()
        return [planned for planned in mappings if any(ports in lost for ports, _ in ports_of(planned))]

    def update_addresses(self) -> None:
        """Find out which addresses are the host's own and which are excluded, for all roads but nat."""
        self._attempt(lambda: self._executor.dataplane.redirect.set_own_addresses(self._executor.links.addresses))
        self._attempt(lambda: self._executor.dataplane.exclude(self._observer.excluded(anew=True)))

    def _attempt(self, call: Callable[[], object]) -> bool:
        """Try something; True if it was done.  A failure is logged, unless the last attempt failed the same way."""
        done = self._attempts.attempt(call)
        if not done and self._condition is Condition.APPLIED:
            self._condition = Condition.RETRYING
        return done
