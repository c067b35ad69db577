"""What can be asked of the daemon, and what each request means.

What this file knows: what is wanted, and which difference a request makes.  What it must not know: how a difference is
brought about, who asks.

How it works.  A request writes its intent to the ledger, and the difference that it makes is carried out step by step;
when one fails, those before it are undone and the intent is taken back, so all is as it was.  Withdrawing goes the
other way round: the intent goes last.

A port is reserved before the intent is written: which one it is may be known only then.  A daemon that dies in between
leaves nothing behind, as the socket goes with it.

Nothing here is for more than one thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from secrets import token_bytes
from typing import NamedTuple

from gangway.daemon.config import Config
from gangway.daemon.doctor import Check
from gangway.errors import Conflict, Unsupported
from gangway.host import netns
from gangway.log import Log
from gangway.model import (
    Address,
    Endpoint,
    Network,
    PortMapping,
    PortRequest,
    Protocol,
    check_fits,
    first_gateway,
    free_subnets,
    parse_port,
)
from gangway.plan import (
    Firewall,
    HostFacts,
    MappingPlan,
    Origin,
    Plan,
    Route,
    asked_at,
    origins_of,
    plan_network,
)
from gangway.reconcile.controller import Controller
from gangway.reconcile.diff import State
from gangway.relay.client import Relay
from gangway.state.allocate import Reserving
from gangway.state.database import Database, Place
from gangway.state.retry import again_without_the_gone

ON_DEMAND = "gangway0"
"""The network that is made when somebody needs one and has named none."""


class Explanation(NamedTuple):
    """What a client meets that asks an address: each route, with the rules on it."""

    planned: MappingPlan
    network: Network
    routes: tuple[tuple[Route, tuple[str, ...]], ...]


class Requests:
    """The daemon, but for its front.  `close` leaves everything as it is: published ports go on without it."""

    def __init__(self, config: Config, store: Database, relay: Relay, log: Log) -> None:
        self._database = store
        self._relay = relay
        self._controller = Controller(config, store, relay, log)
        self._registry = self._controller.registry
        self._executor = self._controller.executor
        self.check = partial(self._controller.check, thorough=False)
        self.check_rules = self._controller.check_rules
        self.check_thoroughly = partial(self._controller.check, thorough=True)
        self.reconcile = self._controller.reconcile
        self.withdraw_what_is_gone = self._controller.withdraw_what_is_gone
        self.reconcile()

    def close(self) -> None:
        """Lets go of sockets and files."""
        self._controller.close()
        self._database.close()

    @property
    def firewall(self) -> Firewall:
        """Who writes the rules."""
        return self._controller.facts.firewall

    @property
    def relay_fd(self) -> int | None:
        """A descriptor that is readable when the relay has ended, if there is a relay."""
        return self._relay.fileno()

    @property
    def is_idle(self) -> bool:
        """Nothing is left to keep."""
        return not self._registry.networks

    # Questions

    def networks(self) -> tuple[Network, ...]:
        """All networks."""
        return self._registry.networks

    def network(self, name: str) -> Network:
        """One network.  Conflict: there is none of that name."""
        return self._registry.network(name)

    def endpoints(self, network: str | None = None) -> tuple[Endpoint, ...]:
        """All endpoints, or those of a network."""
        return self._registry.endpoints(network)

    def mappings(self, container: str | None = None) -> tuple[MappingPlan, ...]:
        """All mappings, or those of a container.  Conflict: there is no such container."""
        return self._registry.mappings(container)

    def explain(self, protocol: Protocol, address: Address, port: int, origin: Origin | None) -> Explanation:
        """What a client meets that asks there; of an unspecified address, wherever it asks.

        Conflict: nothing is published there.
        """
        if not (address.is_unspecified or address.is_loopback or self._executor.has_address(address)):
            raise Conflict(f"{address} is not an address of this host")
        mapping = self._registry.taken.at(protocol, address, port)
        if mapping is None:
            raise Conflict(f"nothing is published at {address} port {port}/{protocol}: gangway ls lists what is")
        planned = self._registry.mapping(mapping)
        every = tuple(Origin) if address.is_unspecified else origins_of(address)
        wanted = every if origin is None else (origin,)
        network = self._registry.network_of(mapping.container)
        routes = tuple(
            (route, tuple(self._executor.met(planned, route, network, port)))
            for route in asked_at(planned, address)
            if route.origin in wanted
        )
        return Explanation(planned, network, routes)

    def redirected(self, planned: MappingPlan) -> int:
        """How often sockets were redirected to a mapping."""
        return self._executor.redirect_count(planned)

    def checks(self) -> tuple[Check, ...]:
        """What this host can do, and what follows from what it cannot."""
        return self._controller.checks()

    # Networks

    @again_without_the_gone
    def create_network(self, network: Network, on_demand: bool = False) -> Network:
        """One more network."""
        self._controller.prepare()
        check_fits(network, self._registry.networks)
        if network.internal and self.firewall is Firewall.NONE:
            raise Unsupported("without a firewall (--firewall none) nothing keeps an internal network internal")
        self._executor.check_free(network)
        before = self._registry.plan()
        self._registry.add_network(network, on_demand)
        try:
            after = self._registry.plan()
            self._controller.carry_out(_standing(before), _standing(after, network, self._controller.facts))
        except BaseException:
            self._registry.remove_network(network.name)
            raise
        self._controller.settle(after)
        return network

    @again_without_the_gone
    def remove_network(self, name: str) -> None:
        """One less; it must have no containers."""
        self._controller.prepare()
        self._remove_network(name)

    def _remove_network(self, name: str) -> None:
        network = self._registry.network(name)
        attached = [endpoint.container for endpoint in self._registry.endpoints(name)]
        if attached:
            raise Conflict(f"network {name} has containers ({', '.join(attached)}): detach them first")
        before = self._registry.plan()
        after = self._registry.plan(without=name)
        self._controller.carry_out(_standing(before, network, self._controller.facts), _standing(after))
        self._registry.remove_network(name)
        self._controller.settle(after)

    # Endpoints

    @again_without_the_gone
    def attach(
        self, container: str, network_name: str | None, addresses: Sequence[Address], namespace: str | None = None
    ) -> Endpoint:
        """Joins a container to a network; `namespace` is its path, if the name does not tell."""
        self._controller.prepare(container)
        if self._registry.has_endpoint(container):
            name = self._registry.endpoint(container).network
            raise Conflict(f"container {container} is on network {name} already: detach it first")
        path = namespace or netns.path_of(container)
        place = Place(path, netns.inode_of(path))
        self._check_container(container, place)
        network = self._network_for(network_name)
        try:
            endpoint = Endpoint(container, network.name, self._registry.addresses_for(network, addresses))
            self._registry.add_endpoint(endpoint, place)
            try:
                self._controller.carry_out(State(), State(attachments=self._registry.attachment(endpoint, place)))
            except BaseException:
                self._registry.remove_endpoint(container)
                raise
        except BaseException:
            self._remove_if_unneeded(network.name)
            raise
        return endpoint

    @again_without_the_gone
    def detach(self, container: str) -> None:
        """Takes a container off its network, and its mappings away."""
        self._controller.prepare(container)
        endpoint = self._registry.endpoint(container)
        self._controller.take_down(self._registry.state_of_container(container))
        self._registry.remove_endpoint(container)
        self._remove_if_unneeded(endpoint.network)

    # Mappings

    @again_without_the_gone
    def publish(self, container: str, texts: Sequence[str]) -> tuple[MappingPlan, ...]:
        """Publishes a container's ports; each text is as after Docker's `-p`.  All of them or none."""
        self._controller.prepare(container)
        network = self._registry.network_of(container)
        requests = [request for text in texts for request in parse_port(text).apart()]
        reserving = Reserving(container, self._registry.taken, self._controller.steered, self._registry.planned)
        with self._reserved() as mappings:
            for request in requests:
                _check_internal(request, network)
                found, reserved = reserving.reserve(request)
                self._executor.reserved |= reserved
                for mapping in found:
                    self._registry.taken.add(mapping)
                    mappings.append(mapping)
            planned = self._registry.add_mappings(mappings)
            mappings.clear()
            try:
                _check_reachable(planned)
                self._controller.carry_out(State(), self._registry.state_of(planned))
            except BaseException:
                self._registry.remove_mappings(planned)
                raise
        return planned

    @again_without_the_gone
    def unpublish(self, container: str, texts: Sequence[str] = ()) -> tuple[MappingPlan, ...]:
        """Withdraws a container's mappings: those that the texts name, all without any."""
        self._controller.prepare(container)
        planned = self._registry.mappings(container)
        if texts:
            chosen = [one for text in texts for one in self._registry.named(container, text)]
            planned = tuple({str(one.mapping): one for one in chosen}.values())
        self._controller.take_down(self._registry.state_of(planned))
        self._registry.remove_mappings(planned)
        return planned

    # What is within

    def _check_container(self, container: str, place: Place) -> None:
        if place.inode == netns.own_inode():
            raise Conflict(f"{container} is the host's own network namespace")
        for other in (endpoint.container for endpoint in self._registry.endpoints()):
            if self._registry.place(other).inode == place.inode and not self._controller.is_gone(other):
                raise Conflict(f"{container} is the network namespace of container {other}, which is attached already")

    def _network_for(self, name: str | None) -> Network:
        """The network of that name; the one on demand is made if it has to be."""
        names = {network.name for network in self._registry.networks}
        if (name or ON_DEMAND) in names or name not in (None, ON_DEMAND):
            return self._registry.network(name or ON_DEMAND)
        taken = [*self._executor.routed(), *(subnet for one in self._registry.networks for subnet in one.subnets)]
        subnets = free_subnets(taken, token_bytes(5))
        network = Network(ON_DEMAND, ON_DEMAND, subnets, tuple(map(first_gateway, subnets)))
        return self.create_network(network, on_demand=True)

    def _remove_if_unneeded(self, name: str) -> None:
        if self._registry.is_unneeded(name):
            self._remove_network(name)

    @contextmanager
    def _reserved(self) -> Iterator[list[PortMapping]]:
        """The mappings of a request in the making; nothing is left of them when it fails."""
        mappings: list[PortMapping] = []
        try:
            yield mappings
        except BaseException:
            for mapping in mappings:
                self._registry.taken.remove(mapping)
            raise
        finally:
            for reserved in self._executor.reserved.values():
                reserved.close()
            self._executor.reserved.clear()


def _standing(whole: Plan | None, network: Network | None = None, facts: HostFacts | None = None) -> State:
    """The rules of a plan, and perhaps one network's bridge."""
    bridges = {network.bridge: plan_network(network, facts)} if network is not None and facts is not None else {}
    return State(bridges=bridges, plan=whole, forwarding=whole.forwarding if whole is not None else frozenset())


def _check_reachable(planned: Sequence[MappingPlan]) -> None:
    for one in planned:
        if not (one.is_nat or one.is_redirected or one.is_relayed):
            raise Unsupported(
                f"{one.mapping} could be reached by nobody: this kernel has no {one.mapping.protocol} sockets for a "
                "relay, and no rule serves it"
            )


def _check_internal(request: PortRequest, network: Network) -> None:
    if network.internal and not all(address.is_loopback for address in request.host_addresses):
        inner = request.container_ports
        raise Conflict(
            f"network {network.name} is internal: its containers' ports can be published on a loopback address only, "
            f"as in -p 127.0.0.1:{request.host_ports or inner}:{inner}"
        )
