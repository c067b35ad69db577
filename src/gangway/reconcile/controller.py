"""Keeps the host as it should be: compares all that is wanted with all that there is, and repairs the difference.

What this file knows: when everything is decided and compared anew.  What it must not know: what a request means, how a
step is carried out.

`reconcile` may be called at any time.  `check` only finds out whether it is needed: after a notification from the
kernel, unless it is about our own change of rules (`check_rules`), and, `thorough`, every few seconds for what sends
none.  Both do what they can: a failure is logged, and the next check tries again.  A request repairs first
(`repair_before_request`), then carries out its own small difference, and records it (`record_applied`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum, auto
from functools import partial

from gangway.errors import GangwayError, HostRefused
from gangway.firewall.base import Driver
from gangway.host import events, netns
from gangway.host.reserved_ports import ReservedPorts
from gangway.log import Log
from gangway.plan import FORWARDING_SETTING, Firewall, HostFacts, MappingPlan, Plan
from gangway.reconcile.dataplane import Reserved
from gangway.reconcile.diff import Blocks, Ports, Redirects, Step, Verb, diff
from gangway.reconcile.executor import Executor
from gangway.reconcile.observe import Observer, shared_chains
from gangway.reconcile.state import State, link_name, ports_of, redirects_of, steered_of
from gangway.state.registry import Registry


class Condition(Enum):
    """How the host compares with what is wanted."""

    UNKNOWN = auto()
    """Nothing was compared yet."""
    APPLIED = auto()
    """Everything wanted was applied, as far as we know."""
    DIRTY = auto()
    """The rules may not be those of the plan: they have to be written anew."""
    RETRYING = auto()
    """The rules are applied; something else failed and is tried again."""


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
        self._observer = observer
        self._registry = registry
        self._executor = executor
        self._reserved_ports = reserved_ports
        self._driver_for = driver_for
        self._log = log
        self._condition = Condition.UNKNOWN
        self._facts: HostFacts | None = None
        self._relay_exits = 0
        """How many relays had exited when everything was compared last."""
        self._failures: set[str] = set()
        """What has failed since the last comparison began, as it was logged."""
        self._former_failures: set[str] = set()
        """The same of the comparison before: what fails again is not logged again."""

    @property
    def facts(self) -> HostFacts:
        """The facts that decisions are based on."""
        if self._facts is None:
            self._executor.dataplane.steering.start()
            self._facts = self._gather()
            self._executor.driver = self._driver_for(self._facts.firewall)
            self._registry.decide(self._facts)
        return self._facts

    @property
    def needs_start(self) -> bool:
        """True if a daemon that starts has something to compare: networks, or what an earlier daemon changed."""
        return bool(self._registry.networks) or not self._observer.is_fresh()

    def repair_before_request(self, container: str | None = None) -> None:
        """Repair what others changed before a request, perhaps about a container, adds to it."""
        _ = self.facts
        if container is not None and self._registry.has_endpoint(container) and self.is_dead(container):
            self._reap(container)
        if self._registry.networks:
            changed = events.generation() != self._executor.driver.generation
            if changed or self._condition is not Condition.APPLIED or self._has_lost_relay():
                self.check()

    def carry_out(self, before: State, after: State, reserved: Reserved | None = None) -> None:
        """Carry out the difference of two states, all of it or nothing."""
        self._reserved_ports.add(_steered_ports(after.mappings.values()))  # first: the kernel may choose one any moment
        try:
            self._executor.carry_out(diff(before, after), reserved)
        except BaseException as error:
            if isinstance(error, ExceptionGroup):  # not all could be undone
                self._condition = Condition.DIRTY
            self._release_reserved_ports(after)
            raise
        self._release_reserved_ports(before)

    def remove(self, before: State) -> None:
        """Remove what a state has.  What is not there as it should be is repaired first: then it can be removed."""
        try:
            self.carry_out(before, State())
        except HostRefused:
            self._condition = Condition.DIRTY
            self.reconcile()
            self.carry_out(before, State())

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
        self._update_own_addresses()
        self._facts = self._gather()
        self._registry.decide(self._facts)
        if not self._registry.networks:
            self._attempt(self._executor.dataplane.stop_if_unused)

    def check(self, thorough: bool = False) -> None:
        """Find out whether another program changed something, and repair it."""
        if thorough:
            self._reattach()  # leases need that, too
        if not self._registry.networks:
            if thorough:
                self._attempt(self._executor.dataplane.stop_if_unused)  # leases may have ended without a daemon
            return
        if thorough:
            self._attempt(self._executor.dataplane.steering.reclaim_auto_bound)
        self._look_at_chains(thorough)
        self._update_own_addresses()
        self.reap_dead_containers()
        if (
            self._condition in (Condition.RETRYING, Condition.DIRTY)
            or self._gather() != self.facts
            or self._is_disturbed(thorough)
        ):
            self.reconcile()

    def check_rules(self) -> None:
        """The same, unless the rules are as our last change left them: each of ours sends a notification, too."""
        if self._condition is Condition.RETRYING or events.generation() != self._executor.driver.generation:
            self.check()

    def reconcile(self) -> None:
        """Make the host as it should be."""
        dataplane = self._executor.dataplane
        self._former_failures, self._failures = self._failures, set()
        self._relay_exits = dataplane.relay.exits
        is_repaired = self._reattach()
        self._attempt(self._executor.links.delete_unfinished)
        _ = self.facts
        self._look_at_chains()
        self._refresh_facts()
        self.reap_dead_containers()
        for name in [one.name for one in self._registry.networks if self._registry.is_unneeded(one.name)]:
            self._registry.remove_network(name)
            self._condition = Condition.DIRTY
        plan = self._registry.plan()
        are_applied = self._condition in (Condition.APPLIED, Condition.RETRYING) and self._executor.driver.is_intact(
            lambda: plan
        )
        before = replace(
            self._observer.found(), plan=plan if are_applied else None, forwarding=self._own_forwarding(plan)
        )
        wanted = State() if plan is None else self._registry.state(plan)
        failed = self._apply(diff(before, wanted), plan)
        for mapping in self._unavailable_mappings(failed, plan):
            dataplane.remove_redirects(block for block, _ in redirects_of(mapping))
            dataplane.steering.remove(steered_of(mapping))
        self._reserved_ports.set(_steered_ports(self._registry.mappings()))
        if plan is None:
            is_repaired &= self._attempt(self._executor.driver.remove)
        self._condition = _condition(failed, is_repaired)
        self.record_applied()

    def is_dead(self, container: str) -> bool:
        """True if a container's namespace has ended, and the attachment with it, or its name is another one's now."""
        return bool(self._dead([container]))

    def reap_dead_containers(self) -> bool:
        """Remove the containers whose namespace has ended; True if there was one."""
        dead = self._dead([one.container for one in self._registry.endpoints()])
        for container in dead:
            self._reap(container)
        return bool(dead)

    def filters(self, family: int) -> Collection[str]:
        """Return other programs' chains for what is forwarded; one that has only rules of ours is not another's."""
        found = set(self._observer.chains()[family])
        if self.facts.firewall is Firewall.IPTABLES:
            found -= set(shared_chains(family))
            if self._executor.driver.shares_forward_chain(family):
                found.add(shared_chains(family)[0])
        return found

    def _apply(self, steps: Iterable[Step], plan: Plan | None) -> list[Step]:
        """Carry out steps as far as they can be; return those that failed."""
        failed: list[Step] = []
        for step in steps:
            for part in _parts(step, self._unavailable_mappings(failed, plan)):
                if not self._attempt(partial(self._executor.do, part)):
                    failed.append(part)
        return failed

    def _reattach(self) -> bool:
        """Attach the programs again that another program has detached; True unless one could not be."""
        dataplane = self._executor.dataplane
        is_steering = self._attempt(dataplane.steering.reattach)
        return self._attempt(dataplane.redirect.reattach) and is_steering

    def _has_lost_relay(self) -> bool:
        """True if a relay has exited since everything was compared; another one may run already, without our ports."""
        relay = self._executor.dataplane.relay
        return not relay.is_running() or relay.exits != self._relay_exits

    def _dead(self, containers: Iterable[str]) -> list[str]:
        places = {container: self._registry.place(container) for container in containers}
        away = [container for container, place in places.items() if not netns.leads_to(*place)]
        links = self._executor.links.all() if away else {}
        return [one for one in away if netns.leads_elsewhere(*places[one]) or link_name(one) not in links]

    def _reap(self, container: str) -> None:
        self._warn(f"container {container} exited: its ports are unpublished")
        state = self._registry.state_of_container(container)
        try:
            self._executor.carry_out(diff(state, State()))
        except (GangwayError, ExceptionGroup):
            self._condition = Condition.DIRTY  # what is left of it is removed when everything is compared
        self._release_reserved_ports(state)
        network = self._registry.network_of(container).name
        self._registry.remove_endpoint(container)
        if self._registry.is_unneeded(network):
            self._condition = Condition.DIRTY

    def _release_reserved_ports(self, removed: State) -> None:
        """Release the reserved ports of mappings that are not published any more."""
        if removed.steered:
            left = (one for one in self._registry.mappings() if str(one.mapping) not in removed.mappings)
            self._reserved_ports.set(_steered_ports(left))

    def _look_at_chains(self, thorough: bool = False) -> None:
        """Read other programs' chains, if the rules were changed by somebody else or may have been unnoticed."""
        if thorough or events.generation() != self._executor.driver.generation:
            self._observer.chains(anew=True)

    def _gather(self) -> HostFacts:
        return self._observer.facts(self._executor.forwarding.enabled_by_us)

    def _refresh_facts(self) -> None:
        """Gather the facts anew; other facts mean that everything is decided anew, perhaps with another firewall."""
        before, now = self.facts, self._gather()
        if now == before:
            return
        for text in _changes(before, now, self._registry.plan()):
            self._warn(text)
        if now.firewall is not before.firewall:
            self._executor.driver = self._driver_for(now.firewall)
        self._facts, self._condition = now, Condition.DIRTY
        self._registry.decide(now)

    def _is_disturbed(self, thorough: bool) -> bool:
        """True if something of ours is not as it was."""
        if self._condition is Condition.UNKNOWN or self._has_lost_relay():
            return True
        if not self._executor.driver.is_intact(self._registry.plan, thorough):
            return True
        if thorough and not self._reserved_ports.is_intact():
            return True
        links = self._observer.found_links()
        wanted = {one.bridge for one in self._registry.networks}
        wanted |= {link_name(one.container) for one in self._registry.endpoints()}
        return {*links.bridges, *links.attachments} != wanted

    def _own_forwarding(self, plan: Plan | None) -> frozenset[int]:
        """Return the families that are forwarded and that are ours to stop: others may need what we do not."""
        wanted = plan.forwarding if plan is not None else frozenset()
        return self.facts.forwarding & (self.facts.switched_on | wanted)

    def _unavailable_mappings(self, failed: Sequence[Step], plan: Plan | None) -> list[MappingPlan]:
        """Return the mappings of which a port could not be had: it is another program's, and so are its clients."""
        lost = {one.ports for step in failed if isinstance(step.what, Ports) for one in step.what.ports}
        if plan is None or not lost:
            return []
        return [planned for planned in plan.mappings if any(ports in lost for ports, _ in ports_of(planned))]

    def _update_own_addresses(self) -> None:
        self._attempt(lambda: self._executor.dataplane.redirect.set_own_addresses(self._executor.links.addresses))

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Try something; True if it was done.  A failure is logged, unless the last attempt failed the same way."""
        done = True
        try:
            call()
        except* GangwayError as errors:
            done = False
            if self._condition is Condition.APPLIED:
                self._condition = Condition.RETRYING
            for text in map(str, _flat(errors)):
                if text not in self._failures | self._former_failures:
                    self._warn(text)
                self._failures.add(text)
        return done

    def _warn(self, text: str) -> None:
        self._log.warning(text.replace("%", "%%"))


def _condition(failed: Sequence[Step], repaired: bool) -> Condition:
    if any(step.verb is Verb.REWRITE for step in failed):
        return Condition.DIRTY
    return Condition.APPLIED if repaired and not failed else Condition.RETRYING


def _flat(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error


def _steered_ports(plans: Iterable[MappingPlan]) -> Iterator[tuple[int, int]]:
    """Yield the host ports of mappings that have no socket to keep the kernel from choosing them."""
    return ((one.mapping.host_ports.first, one.mapping.host_ports.last) for one in plans if one.is_steered)


def _changes(before: HostFacts, now: HostFacts, plan: Plan | None) -> Iterable[str]:
    """Yield what an operator should know of a change that somebody else made."""
    needed = plan.forwarding if plan is not None and now.may_forward else before.forwarding
    for family in sorted((before.forwarding - now.forwarding) & needed):
        then = "switched on again" if now.may_forward else "traffic that needs it is relayed"
        yield f"{FORWARDING_SETTING[family]} was switched off by another program: {then}"
    for family, chain in now.forward_droppers:
        if before.dropper(family) != chain:
            yield f"{chain} drops forwarded traffic (IPv{family}): traffic that it carried is relayed"
    if before.firewall is not now.firewall:
        yield f"switching to {now.firewall}: another program's chain drops forwarded traffic"


def _parts(step: Step, unavailable: Sequence[MappingPlan]) -> Iterator[Step]:
    """Split a step so that one port that cannot be had does not prevent the others.  Clients of an unavailable port are
    not led to the relay or the container."""
    left_out = {block for one in unavailable for block in steered_of(one)}
    left_out |= {block for one in unavailable for block, _ in redirects_of(one)}
    match step.verb, step.what:
        case _, Ports(ports):
            yield from (Step(step.verb, Ports((one,))) for one in ports)
        case Verb.STEER, Blocks(blocks):
            yield Step(step.verb, Blocks(tuple(block for block in blocks if block not in left_out)))
        case Verb.REDIRECT, Redirects(entries):
            yield Step(step.verb, Redirects(tuple(entry for entry in entries if entry[0] not in left_out)))
        case _:
            yield step
