"""Adopts what Docker has: carries out the difference to what was adopted before, and writes it to the registry.

What this file knows: what is adopted, and what of it has changed.  What it must not know: Docker's API.

Adopted networks and containers are in the database like others, so that their rules outlive both daemons.  gangway
creates, repairs and deletes none of their links; it only isolates bridge ports.  A port that cannot be published is
logged and left out; each later call tries it again.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from gangway.errors import GangwayError, Unsupported
from gangway.facts import Firewall
from gangway.host import netns
from gangway.model import Endpoint, Network, PortMapping, Source, require_no_conflict
from gangway.plan import MappingPlan, plan_network
from gangway.reconcile.attempts import Attempts
from gangway.reconcile.controller import Controller
from gangway.reconcile.executor import Executor
from gangway.reconcile.state import rules_of
from gangway.state.adopted import Adopted, AdoptedContainer
from gangway.state.allocate import Allocation
from gangway.state.database import Place
from gangway.state.leases import Leases
from gangway.state.publication import publish
from gangway.state.registry import Registry

Report = Callable[[str, str, Sequence[MappingPlan]], None]
"""Logs what was done (`published` or `unpublished`), of which container, and its ports."""


class Adoption:
    """What is adopted; `repair` comes before each change, `warn` logs what cannot be adopted.

    `report` is told of containers whose ports were `published` or `unpublished`.
    """

    def __init__(
        self,
        repair: Callable[[], None],
        controller: Controller,
        registry: Registry,
        executor: Executor,
        leases: Leases,
        warn: Callable[[str], None],
        report: Report,
    ) -> None:
        self._repair, self._leases, self._report = repair, leases, report
        self._controller, self._registry, self._executor = controller, registry, executor
        self._attempts = Attempts(warn)  # a round begins with each call of `adopt`

    def adopt(self, wanted: Adopted) -> None:
        """Serve these networks and containers of Docker's, and no others.

        GangwayError: it failed, and should be tried again; the host is as before, or the next check repairs it.
        """
        self._attempts.begin_round()
        self._repair()
        if self._leases.has_any != self._controller.facts.leased:  # the first launcher has come, or all have ended
            self._controller.check()
        networks = {one.name: one for one in wanted.networks if self._is_possible(one)}
        containers = {
            one.id: self._without_unrestrictable(one)
            for one in wanted.containers
            if one.endpoint.network in networks and _place(one).inode
        }
        self._rename(containers.values())
        self._remove_ports(networks, containers)
        self._change_networks(networks)
        self._add(list(filter(self._is_incomplete, containers.values())))
        served = {one.id for one in containers.values() if not self._is_incomplete(one)}
        # Docker may not have said yet that a container has ended: its ports are kept for when it runs again.
        unserved = {one.id: one.endpoint.container for one in wanted.containers if one.id not in served}
        self._registry.parked.retain({**wanted.stopped, **unserved})
        self.isolate()

    def follow(self, wanted: Adopted) -> None:
        """Let the ports that gangway has published follow their containers: all else of these is dockerd's.

        GangwayError: as in `adopt`.
        """
        registry = self._registry
        own = (one.mapping for one in registry.mappings() if one.mapping.source is not Source.DOCKER)
        published = {self._id(one.container) for one in own}
        containers = [one for one in wanted.containers if one.id in published or one.id in registry.parked]
        used = {one.endpoint.network for one in containers}
        networks = (one for one in wanted.networks if one.name in used)
        self.adopt(Adopted(tuple(networks), tuple(containers), wanted.stopped))

    def knows(self, container: str) -> bool:
        """True if ports of a container can be published."""
        return self._registry.has_endpoint(container)

    def waiting(self, container: str | None = None) -> tuple[PortMapping, ...]:
        """Return the ports that gangway is to publish when their containers run, or when they are free."""
        return self._registry.waiting(container)

    def forget_waiting(self, mappings: Iterable[PortMapping]) -> None:
        """Do not publish these ports again."""
        self._registry.parked.remove(mappings)

    def add(self, found: Adopted) -> None:
        """Add containers whose network's rules are dockerd's, so that ports can be published for them."""
        registry, known = self._registry, {one.name for one in self._registry.networks}
        for network in found.networks:
            if network.name not in known and network.name in {one.endpoint.network for one in found.containers}:
                require_no_conflict(network, registry.networks)
                registry.add_network(network, on_demand=False)
        for one in found.containers:
            registry.add_endpoint(one.endpoint, _place(one))

    def forget_unpublished(self) -> None:
        """Remove containers that have no ports, and networks without containers, if their rules are dockerd's."""
        registry = self._registry
        for network in (one for one in registry.networks if not one.has_rules):
            for endpoint in registry.endpoints(network.name):
                if not registry.mappings(endpoint.container):
                    registry.remove_container(endpoint.container)
            if not registry.endpoints(network.name):
                registry.remove_network(network.name)

    def isolate(self) -> None:
        """Isolate the containers of networks without traffic between them, if it is the bridge that has to."""
        for network in self._registry.networks:
            is_ours = network.is_adopted and network.has_rules
            if is_ours and plan_network(network, self._controller.facts).isolate_ports:
                self._set_isolated(network, True)

    def _is_possible(self, network: Network) -> bool:
        own = [one for one in self._registry.networks if not one.is_adopted]
        return self._attempts.attempt(partial(require_no_conflict, network, own), f"network {network.name} not served")

    def _without_unrestrictable(self, one: AdoptedContainer) -> AdoptedContainer:
        """Leave out ports that are not for everybody, where a launcher's lease would serve everybody."""
        facts = self._controller.facts
        if not facts.leased or facts.firewall is not Firewall.NONE:  # rules also restrict leased ports
            return one
        restricted = [mapping for mapping in one.mappings if mapping.admitted and mapping.is_held]
        for mapping in restricted:
            self._attempts.attempt(partial(_refuse_restriction, mapping), f"container {one.endpoint.container}")
        return one._replace(mappings=tuple(mapping for mapping in one.mappings if mapping not in restricted))

    def _is_incomplete(self, one: AdoptedContainer) -> bool:
        name = one.endpoint.container
        return not self._registry.has_endpoint(name) or not self._published(name).issuperset(self._wanted(one))

    def _wanted(self, one: AdoptedContainer) -> tuple[PortMapping, ...]:
        """Return the ports of a container: those of Docker's, and those that it had from gangway when it stopped."""
        return (*one.mappings, *self._registry.parked.of(one.id, one.endpoint.container))

    def _published(self, container: str) -> set[object]:
        return {planned.mapping for planned in self._registry.mappings(container)}

    def _id(self, container: str) -> str:
        """Return the id of a container of Docker's; empty for others."""
        return self._registry.place(container).docker_id

    def _rename(self, containers: Iterable[AdoptedContainer]) -> None:
        """Give containers the names that they have now; those that have swapped names are published again."""
        names = {one.id: one.endpoint.container for one in containers}
        for endpoint in self._registry.endpoints():
            name = names.get(self._id(endpoint.container), endpoint.container)
            if not self._registry.has_endpoint(name):
                self._registry.rename_endpoint(endpoint.container, name)

    def _remove_ports(self, networks: Mapping[str, Network], containers: Mapping[str, AdoptedContainer]) -> None:
        """Remove containers that ended or have changed, with their ports, and ports that Docker no longer lists."""
        registry = self._registry
        ended, stale = list[str](), list[MappingPlan]()
        for endpoint in registry.endpoints():
            network, wanted = registry.network(endpoint.network), containers.get(self._id(endpoint.container))
            if not network.is_adopted:
                continue
            published = registry.mappings(endpoint.container)
            is_same_network = networks.get(network.name) == network
            if wanted is not None and is_same_network and self._is_same(endpoint, wanted):
                kept = {*wanted.mappings}
                of_docker = (one for one in published if one.mapping.source is Source.DOCKER)
                stale += (one for one in of_docker if one.mapping not in kept)
            else:
                ended.append(endpoint.container)
                stale += published
        if stale:
            self._controller.remove(partial(registry.state_of, stale))
            self._report_each("unpublished", stale)
        with self._controller.restoring():
            for container in ended:
                mappings = (planned.mapping for planned in registry.mappings(container))
                own = (one for one in mappings if one.source is Source.API)
                registry.parked.park(self._id(container), container, own)
            registry.remove_mappings(stale)
            for container in ended:
                registry.remove_container(container)

    def _is_same(self, endpoint: Endpoint, wanted: AdoptedContainer) -> bool:
        """True if a container has the same addresses and namespace as before."""
        return wanted.endpoint == endpoint and _place(wanted) == self._registry.place(endpoint.container)

    def _change_networks(self, wanted: Mapping[str, Network]) -> None:
        registry = self._registry
        known = [one for one in registry.networks if one.is_adopted]
        removed = [one for one in known if wanted.get(one.name) != one]
        added = [one for one in wanted.values() if one not in known]
        if not removed and not added:
            return
        before = registry.plan()
        with ExitStack() as undo:
            for one in removed:
                registry.remove_network(one.name)
                undo.callback(registry.add_network, one, on_demand=False)
            for one in added:
                registry.add_network(one, on_demand=False)
                undo.callback(registry.remove_network, one.name)
            if any(one.has_rules for one in (*removed, *added)):
                self._controller.carry_out(rules_of(before), rules_of(registry.plan()))
            undo.pop_all()
        if added:
            self._executor.dataplane.relay.start()  # the first container does not have to wait for it
        for one in removed:
            if not one.icc:
                self._set_isolated(one, False)
        self._controller.record_applied()

    def _set_isolated(self, network: Network, isolated: bool) -> None:
        """Change all ports of a network's bridge that are not as they should be."""
        links = self._executor.links.all()
        bridge = links.get(network.bridge)
        for link in links.values():
            if bridge is not None and link.master == bridge.ifindex and link.isolated != isolated:
                call = partial(self._executor.links.set_isolated, link.name, isolated)
                self._attempts.attempt(call, f"network {network.name}: containers are not isolated from each other")

    def _add(self, containers: Collection[AdoptedContainer]) -> None:
        """Publish the ports of containers, all at once; if that fails, those of each one by itself."""
        try:
            self._publish(containers)
        except* GangwayError:
            for one in containers:
                self._attempts.attempt(partial(self._publish, [one]), f"container {one.endpoint.container} not served")

    def _publish(self, containers: Collection[AdoptedContainer]) -> None:
        registry = self._registry
        with ExitStack() as undo:
            for one in containers:
                name = one.endpoint.container
                if not registry.has_endpoint(name):
                    registry.add_endpoint(one.endpoint, _place(one))
                    undo.callback(registry.remove_container, name)
            added = publish(self._controller, registry, self._executor, partial(self._reserve, containers))
            undo.pop_all()
        self._report_each("published", added)
        for one in containers:
            self._controller.look_into(one.endpoint.container)

    def _report_each(self, what: str, mappings: Sequence[MappingPlan]) -> None:
        by_container = defaultdict[str, list[MappingPlan]](list)
        for one in mappings:
            by_container[one.mapping.container].append(one)
        for container, own in by_container.items():
            self._report(what, container, own)

    def _reserve(self, containers: Iterable[AdoptedContainer], allocation: Allocation) -> None:
        """Reserve the ports of containers that are not published yet, as far as that is possible."""
        for one in containers:
            name = one.endpoint.container
            published = self._published(name)
            for mapping in (mapping for mapping in self._wanted(one) if mapping not in published):
                self._attempts.attempt(
                    partial(allocation.reserve, mapping), f"container {name}: {mapping} not published"
                )


def _refuse_restriction(mapping: PortMapping) -> None:
    raise Unsupported(
        f"the label gangway.from does not hold for {mapping}: gangway's docker-proxy serves everybody there; use "
        '"userland-proxy": false in its place, or a firewall'
    )


def _place(one: AdoptedContainer) -> Place:
    """Return where a container's namespace is; its inode is 0 if the container has ended."""
    return Place(one.namespace, netns.current_inode(one.namespace) or 0, docker_id=one.id)
