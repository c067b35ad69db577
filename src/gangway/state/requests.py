"""What each request to the daemon means.

A request writes what is wanted to the registry, and the difference that it makes is carried out step by step; when one
fails, those before it are undone and the registry is restored.  Removing goes the other way round: the registry comes
last.

A port is reserved before it is written: which one it is may be known only then.  A daemon that dies in between leaves
nothing behind, as the reservation ends with it.

Everything but `leases` is for one thread; the questions may be asked in another one, if `is_ready`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial, wraps
from secrets import token_bytes
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

from gangway.addressing import first_gateway, free_subnets
from gangway.errors import Conflict, PortInUse, Unsupported
from gangway.facts import Firewall, HostFacts
from gangway.host import netns, probe, sockets
from gangway.inet import format_host
from gangway.model import (
    ON_DEMAND,
    Address,
    Endpoint,
    Network,
    PortMapping,
    Protocol,
    Source,
    Subnet,
    Subnets,
    check_container,
    default_mtu,
    parse_port,
    require_no_conflict,
)
from gangway.plan import MappingPlan, Origin, Plan, Route
from gangway.reach import routes_past, routes_to
from gangway.reconcile.controller import Controller
from gangway.reconcile.executor import Executor
from gangway.reconcile.state import State, rules_of
from gangway.state import families
from gangway.state.allocate import Allocation
from gangway.state.checks import check_internal, check_reachable, check_same_process
from gangway.state.database import Place
from gangway.state.joining import check_may_join, join, leave, leaving, place_of
from gangway.state.leases import Leases
from gangway.state.publication import publish
from gangway.state.registry import Registry

_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")
_Method = Callable[Concatenate["Requests", _Given], _Answer]


class Explanation(NamedTuple):
    """The routes of an address's clients, each with the rules that match.  A lease has no network."""

    planned: MappingPlan
    network: Network | None
    further: tuple[str, ...]  # the container's further networks that have the family of its address
    routes: tuple[tuple[Route, tuple[str, ...]], ...]


def retry_after_reaping(method: "_Method[_Given, _Answer]") -> "_Method[_Given, _Answer]":
    """Try a refused request again, if what it wants belonged to a container whose namespace has ended.

    The kernel notifies of such an end, and it is handled within a tenth of a second; a request may come before that.
    To look at every container before each request would cost more than most requests do.
    """

    @wraps(method)
    def tried(requests: "Requests", /, *given: _Given.args, **named: _Given.kwargs) -> _Answer:
        try:
            return method(requests, *given, **named)
        except (Conflict, PortInUse):
            if not requests.reap_dead_containers():
                raise
        return method(requests, *given, **named)

    return tried


class Requests:
    """The requests of every front.  The daemon may end at any time: published ports stay published."""

    def __init__(self, controller: Controller, registry: Registry, executor: Executor, leases: Leases) -> None:
        self._controller, self._registry, self._executor = controller, registry, executor
        self.leases = leases
        self.network, self.network_of = registry.network, registry.network_of
        self.endpoints_of, self.has_endpoint = registry.endpoints_of, registry.has_endpoint
        self.redirected, self.relayed = executor.dataplane.redirected, executor.dataplane.relayed
        self.check, self.check_rules = controller.check, controller.check_rules
        self.check_thoroughly = partial(controller.check, thorough=True)
        self.reconcile = controller.reconcile
        self.reap_dead_containers = controller.reap_dead_containers
        self.uplink_mtu = executor.links.uplink_mtu
        self.owners = registry.owners
        self.orphans: Sequence[str] = () if registry.networks else controller.orphaned_links()
        """The links of a daemon whose database is lost.  The kernel's state is left as it is until they are deleted."""
        if controller.needs_start and not self.orphans:
            self.reconcile()

    @property
    def facts(self) -> HostFacts:
        """The facts about the host that decisions are based on."""
        return self._controller.facts

    @property
    def is_ready(self) -> bool:
        """True if questions can be answered while another thread carries out a request."""
        return self._controller.is_ready

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to look after."""
        return not (self._registry.networks or self._registry.parked or self.leases or self.orphans)

    @property
    def follows_docker(self) -> bool:
        """True if Docker's containers have to be followed: ports of one are published, or will be when it runs."""
        return bool(self._registry.parked) or any(one.is_adopted for one in self._registry.networks)

    # Questions

    def networks(self) -> tuple[Network, ...]:
        self.check_database()
        return self._registry.networks

    def endpoints(self, network: str | None = None) -> tuple[Endpoint, ...]:
        """Return every endpoint, or those of a network."""
        self.check_database()
        return self._registry.endpoints(network)

    def check_database(self) -> None:
        """Conflict: the database is lost, and the host has more than it says."""
        if self.orphans:
            raise Conflict(
                f"{', '.join(self.orphans)} were left by a daemon whose database is lost: restore it and restart the "
                "daemon, or delete these links, their rules and their ports: gangway cleanup"
            )

    def mappings(self, container: str | None = None) -> tuple[MappingPlan, ...]:
        """Return every mapping, leases included, or those of a container.  Conflict: it is not attached."""
        self.check_database()
        if container is not None:
            return self._registry.mappings(container)
        return (*self._registry.mappings(), *self.leases.planned())

    def explain(self, protocol: Protocol, address: Address, port: int, origin: Origin | None) -> Explanation:
        """Return the routes of the clients of an address and port; an unspecified address stands for all.

        If the port is published at other addresses only, those routes are blocked.  Conflict: it is published nowhere.
        """
        index = self._registry.index
        mapping = index.at(protocol, address, port)
        is_known = address.is_unspecified or address.is_loopback or (mapping is not None and mapping.is_routed)
        if not (is_known or self._executor.has_address(address)):
            raise Conflict(f"{address} is not an address of this host")
        published = (
            [mapping]
            if mapping is not None
            else sorted(index.with_port(protocol, port), key=lambda one: one.host_address.version != address.version)
        )
        if not published and (waiting := self._registry.waiting_at(protocol, address, port)):
            raise Conflict(f"port {waiting} of {waiting.container} is not published: gangway ls says why")
        planned, network = self._decided(published, f"{format_host(address)}:{port}/{protocol}")
        stands_for_all = address.is_unspecified and planned.family == address.version
        if mapping is None and not stands_for_all:
            routes = routes_past(published, address, origin)
        else:
            routes = routes_to(planned, address, port, origin)
        found = ((route, tuple(self._executor.matching(planned, route, network, port))) for route in routes)
        return Explanation(planned, network, self._registry.further_networks(planned), tuple(found))

    # Networks

    @retry_after_reaping
    def create_network(self, network: Network, on_demand: bool = False) -> Network:
        self.repair()
        require_no_conflict(network, self._registry.networks)
        if network.internal and self.facts.firewall is Firewall.NONE:
            raise Unsupported("an internal network needs a firewall: without one (--firewall none) it is not internal")
        families.require_usable(network)
        self._executor.check_free(network)
        before = self._registry.plan()
        self._registry.add_network(network, on_demand)
        with ExitStack() as undo:
            undo.callback(self._registry.remove_network, network.name)
            self._controller.carry_out(_applied(before, network), _applied(self._registry.plan(), network))
            undo.pop_all()
        self._controller.record_applied()
        return network

    @retry_after_reaping
    def remove_network(self, name: str) -> None:
        """Remove a network that has no containers."""
        self.repair()
        self._remove_network(name)

    def _remove_network(self, name: str) -> None:
        network = self._registry.own_network(name)
        attached = [endpoint.container for endpoint in self._registry.endpoints(name)]
        if attached:
            raise Conflict(f"network {name} has containers ({', '.join(attached)}): detach them first")
        before = self._registry.plan()
        after = self._registry.plan(without=name)
        self._controller.carry_out(_applied(before, network), _applied(after, network))
        with self._controller.restoring():
            self._registry.remove_network(name)
        self._controller.record_applied()

    def clean_up(self) -> list[str]:
        """Delete the links of daemons whose database is lost, their rules and ports; return the links' names."""
        if not probe.is_root():
            raise Unsupported("deleting links and rules needs root")
        deleted = self._controller.clean_up()
        self.orphans = ()
        return deleted

    # Endpoints

    @retry_after_reaping
    def attach(
        self,
        container: str,
        network_name: str | None,
        addresses: Sequence[Address],
        namespace: str | None = None,
        owner: int | None = None,
        source: Source = Source.API,
    ) -> Endpoint:
        """Attach a container to a network, on behalf of `source`; it may be on others already.

        `namespace` is the path of its namespace, if its name is not enough; `owner` the pid of a process at whose end
        the container is detached.
        """
        check_container(container, namespace)
        self.repair(container)
        is_first = not self._registry.has_endpoint(container)
        if is_first:
            place = place_of(container, namespace, owner)
            self._check_container(container, place)
        else:
            endpoints, place = self._registry.endpoints_of(container), self._registry.place(container)
            _ = self._registry.own_network(endpoints[0].network)
            check_may_join(endpoints, network_name, place, namespace, owner)
        network = self._network_for(network_name)
        with ExitStack() as undo:
            undo.callback(self._remove_if_unneeded, network.name)
            without = families.families_without(place.namespace, addresses)
            found = self._registry.addresses_for(network, addresses, without)
            if not found:
                reason = families.ipv6_off(place.namespace)
                raise Unsupported(f"{container} cannot be attached to network {network.name}: {reason}")
            endpoint = Endpoint(container, network.name, found, source, is_first)
            join(self._controller, self._registry, endpoint, place)
            undo.pop_all()
        self._controller.look_into(container)
        return endpoint

    def free_subnets(self) -> tuple[Subnet, ...]:
        """Return subnets for a network that names none: private ones that neither a network nor a route has."""
        of_networks = (subnet for one in self._registry.networks for subnet in one.subnets)
        used = [*self._executor.links.routed_subnets(), *of_networks]
        return families.without_unusable(free_subnets(used, token_bytes(5)))

    def answers_elsewhere(self, endpoint: Endpoint) -> bool:
        """True if the container's answers to far clients leave by another way than the network's gateway."""
        return not self.facts.answers_elsewhere.isdisjoint(endpoint.addresses)

    def ipv4_only(self, endpoint: Endpoint) -> str:
        """Return why a container that was just attached has no IPv6 address; empty if it has, or need not have, one."""
        network, place = self.network(endpoint.network), self._registry.place(endpoint.container)
        return families.ipv4_only(endpoint, network, place.namespace, network.name == ON_DEMAND)

    @retry_after_reaping
    def detach(self, container: str, network: str | None = None) -> None:
        """Detach a container from a network, or from all; with the first one its ports are unpublished."""
        self.repair(container)
        endpoints = self._registry.endpoints_of(container)
        _ = self._registry.own_network(endpoints[0].network)
        left = leaving(endpoints, network)
        leave(self._controller, self._registry, left)
        for one in left:
            self._remove_if_unneeded(one.network)

    # Mappings

    @retry_after_reaping
    def publish(
        self, container: str, texts: Sequence[str], admitted: Subnets = (), source: Source = Source.API
    ) -> tuple[MappingPlan, ...]:
        """Publish a container's ports to `admitted` clients; each text is as after Docker's `-p`.  All or none."""
        self.repair(container)
        network = self._registry.network_of(container)
        check_same_process(container, self._registry.place(container))
        parsed = [replace(parse_port(text, admitted), source=source) for text in texts]
        for request in parsed:
            check_internal(request, network)
        requests = [one for request in parsed for one in families.without_missing(request).split_ports()]
        for address in {address for request in requests for address in request.host_addresses}:
            sockets.require_no_broadcast(str(address))
            self._check_excluded(address)

        def reserve(allocation: Allocation) -> None:
            for request in requests:
                allocation.allocate(container, request)

        return publish(self._controller, self._registry, self._executor, reserve, check_reachable)

    @retry_after_reaping
    def unpublish(self, container: str, texts: Sequence[str] = ()) -> tuple[MappingPlan, ...]:
        """Unpublish a container's mappings: those that the texts name, all without any."""
        self.repair(container)
        planned = tuple(one for one in self._registry.mappings(container) if one.mapping.source is not Source.DOCKER)
        if texts:
            chosen = [one for text in texts for one in self._registry.named(container, text)]
            planned = tuple({str(one.mapping): one for one in chosen}.values())
        for mapping in (one.mapping for one in planned if one.mapping.source is Source.DOCKER):
            raise Conflict(f"{mapping} is published by Docker: only docker run or docker rm can change that")
        self._withdraw(planned)
        return planned

    def withdraw(self, planned: Sequence[MappingPlan]) -> None:
        """Unpublish mappings, of any containers: all or none."""
        self.repair()
        self._withdraw(planned)

    def _withdraw(self, planned: Sequence[MappingPlan]) -> None:
        self._controller.remove(partial(self._registry.state_of, planned))
        with self._controller.restoring():
            self._registry.remove_mappings(planned)

    # Details

    def repair(self, container: str | None = None) -> None:
        """Repair what other programs have changed, before a request.  GangwayError: none can be carried out."""
        if not probe.is_root():
            raise Unsupported(
                "networks, containers and rules need root: without it, only docker-proxy's ports are served"
            )
        self.check_database()
        self._controller.repair_before_request(container)

    def _decided(self, published: Sequence[PortMapping], at: str) -> tuple[MappingPlan, Network | None]:
        """Return what was decided about the first mapping, and its network.  Conflict: there is none."""
        for mapping in published:
            with suppress(KeyError, Conflict):  # it is being published or unpublished, or its container detached
                if mapping.source is not Source.LEASE:
                    return self._registry.mapping(mapping), self._registry.network_of(mapping.container)
            if (planned := self.leases.find(mapping)) is not None:
                return planned, None
        raise Conflict(f"nothing is published at {at}: list what is with gangway ls")

    def _check_excluded(self, address: Address) -> None:
        if self.facts.is_excluded(address):
            raise Conflict(
                f"cannot publish at {address}: the daemon's setting exclude ({', '.join(self.facts.exclude)}) leaves "
                "it to other programs; choose another address of this host"
            )

    def _check_container(self, container: str, place: Place) -> None:
        if place.inode == netns.current_inode(netns.OWN):
            raise Conflict(f"{container} is the host's own network namespace")
        for other in self._registry.containers:
            if self._registry.place(other).inode == place.inode and not self._controller.is_dead(other):
                raise Conflict(f"{container} is the network namespace of container {other}, which is attached already")

    def _network_for(self, name: str | None) -> Network:
        """Return the network of that name; the one on demand is created if it has to be."""
        name = name or ON_DEMAND
        if name != ON_DEMAND or any(one.name == name for one in self._registry.networks):
            return self._registry.own_network(name)
        subnets = self.free_subnets()
        mtu = default_mtu(self.uplink_mtu(), subnets)
        network = Network(ON_DEMAND, ON_DEMAND, subnets, tuple(map(first_gateway, subnets)), mtu=mtu)
        return self.create_network(network, on_demand=True)

    def _remove_if_unneeded(self, name: str) -> None:
        if self._registry.is_unneeded(name):
            self._remove_network(name)


def _applied(plan: Plan | None, network: Network) -> State:
    """Return the state of a plan's rules, and of the network's bridge if it is in the plan."""
    planned = () if plan is None else plan.networks
    return replace(rules_of(plan), bridges={one.network.bridge: one for one in planned if one.network == network})
