"""What can be asked of the daemon, and how it is brought about.

What this file knows: what is wanted, and which steps a request means.  What it must not know: how a step is carried
out, who asks.

How it works.  What is wanted is in the store and, for speed, here.  A request writes its intent to the store, and the
difference that it makes is carried out step by step; when one fails, those before it are undone and the intent is taken
back, so all is as it was.  Withdrawing goes the other way round: the intent goes last.

A port is reserved before the intent is written: which one it is may be known only then.  A daemon that dies in between
leaves nothing behind, as the socket goes with it.

`reconcile` compares everything that is wanted with what there is, and may be called at any time.  `check` only looks
whether it should be: after each notice of the kernel's.  Both do what they can: what fails is logged, and the next one
tries again.

Nothing here is for more than one thread.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from secrets import token_bytes
from typing import NamedTuple

from gangway.daemon import facts
from gangway.daemon.borrowed import Borrowed
from gangway.daemon.config import Config
from gangway.daemon.hands import Hands, link_name
from gangway.daemon.reconcile import (
    Attachment,
    Ports,
    State,
    Step,
    diff,
    ports_of,
)
from gangway.daemon.relay import Relay
from gangway.daemon.reserve import Reserving
from gangway.daemon.rules import rules_for
from gangway.daemon.store import Place, Store
from gangway.errors import Conflict, GangwayError, InvalidRequest
from gangway.firewall import apply
from gangway.kernel import netns, probe
from gangway.model import (
    Address,
    Endpoint,
    Network,
    PortMapping,
    PortRequest,
    Protocol,
    Taken,
    check_fits,
    first_gateway,
    free_address,
    free_subnets,
    parse_port,
)
from gangway.plan import (
    FORWARDING_SETTING,
    Firewall,
    HostFacts,
    MappingPlan,
    Origin,
    Plan,
    Route,
    Wanted,
    asked_at,
    origins_of,
    plan,
    plan_mapping,
    plan_network,
)
from gangway.relay.log import Log

ON_DEMAND = "gangway0"
"""The network that is made when somebody needs one and has named none."""


class Explanation(NamedTuple):
    """What a client meets that asks an address: each route, with the rules on it."""

    planned: MappingPlan
    network: Network
    routes: tuple[tuple[Route, tuple[str, ...]], ...]


class Service:
    """The daemon, but for its front.  `close` leaves everything as it is: published ports go on without it."""

    def __init__(self, config: Config, store: Store, relay: Relay, log: Log) -> None:
        self._config = config
        self._store = store
        self._relay = relay
        self._log = log
        self._borrowed = Borrowed(store)
        self._networks: dict[str, Network] = {}
        self._on_demand: set[str] = set()
        self._endpoints: dict[str, Endpoint] = {}
        self._places: dict[str, Place] = {}
        self._mappings: dict[str, dict[str, MappingPlan]] = {}
        self._taken = Taken()
        self._plan: Plan | None = None
        self._nft = apply.Nftables.if_there()
        self._facts = self._gather()
        relay.find()
        rules = rules_for(self._facts.firewall, self._nft, store, config.chain_prefix)
        self._hands = Hands(rules, relay, self._borrowed, config.relay.tcp_tw_reuse)
        self._load()
        self.reconcile()

    def close(self) -> None:
        """Lets go of sockets and files."""
        self._hands.close()
        self._relay.close()
        self._store.close()
        if self._nft is not None:
            self._nft.close()

    @property
    def firewall(self) -> Firewall:
        """Who writes the rules."""
        return self._facts.firewall

    @property
    def is_idle(self) -> bool:
        """Nothing is left to keep."""
        return not self._networks

    # Questions

    def networks(self) -> tuple[Network, ...]:
        """All networks."""
        return tuple(self._networks.values())

    def network(self, name: str) -> Network:
        """One network.  Conflict: there is none of that name."""
        if name not in self._networks:
            raise Conflict(f"there is no network {name}: gangway network ls lists those that there are")
        return self._networks[name]

    def endpoints(self, network: str | None = None) -> tuple[Endpoint, ...]:
        """All endpoints, or those of a network."""
        return tuple(one for one in self._endpoints.values() if network in (None, one.network))

    def mappings(self, container: str | None = None) -> tuple[MappingPlan, ...]:
        """All mappings, or those of a container.  Conflict: there is no such container."""
        if container is not None:
            return tuple(self._mappings[self._endpoint(container).container].values())
        return tuple(planned for found in self._mappings.values() for planned in found.values())

    def explain(self, protocol: Protocol, address: Address, port: int, origin: Origin | None) -> Explanation:
        """What a client meets that asks there.  Conflict: nothing is published there."""
        mapping = self._taken.at(protocol, address, port)
        if mapping is None:
            raise Conflict(f"nothing is published at {address} port {port}/{protocol}: gangway ls lists what is")
        planned = self._mappings[mapping.container][str(mapping)]
        wanted = (origin,) if origin is not None else origins_of(address, Origin)
        routes = tuple(
            (route, tuple(self._hands.rules.met(planned, route)))
            for route in asked_at(planned, address)
            if route.origin in wanted
        )
        return Explanation(planned, self._networks[self._endpoints[mapping.container].network], routes)

    # Networks

    def create_network(self, network: Network, on_demand: bool = False) -> Network:
        """One more network."""
        check_fits(network, self._networks.values())
        self._hands.check_free(network)
        before = self._whole_plan() if self._networks else None
        self._store.add_network(network, on_demand)
        self._networks[network.name] = network
        try:
            after = self._whole_plan()
            bridge = {network.bridge: plan_network(network, self._facts)}
            old = State(plan=before, forwarding=before.forwarding if before else frozenset())
            self._carry_out(diff(old, State(bridges=bridge, plan=after, forwarding=after.forwarding)))
        except BaseException:
            del self._networks[network.name]
            self._store.remove_network(network.name)
            raise
        if on_demand:
            self._on_demand.add(network.name)
        self._settle(after)
        return network

    def remove_network(self, name: str) -> None:
        """One less; it must have no containers."""
        network = self.network(name)
        attached = [endpoint.container for endpoint in self.endpoints(name)]
        if attached:
            raise Conflict(f"network {name} has containers ({', '.join(attached)}): detach them first")
        before = self._whole_plan()
        del self._networks[name]
        after = self._whole_plan() if self._networks else None
        bridge = {network.bridge: plan_network(network, self._facts)}
        try:
            new = State(plan=after, forwarding=after.forwarding if after else frozenset())
            self._carry_out(diff(State(bridges=bridge, plan=before, forwarding=before.forwarding), new))
        except BaseException:
            self._networks[name] = network
            raise
        self._on_demand.discard(name)
        self._store.remove_network(name)
        self._settle(after)

    # Endpoints

    def attach(
        self, container: str, network_name: str | None, addresses: Sequence[Address], namespace: str | None = None
    ) -> Endpoint:
        """Joins a container to a network; `namespace` is its path, if the name does not tell."""
        if container in self._endpoints:
            raise Conflict(f"container {container} is on network {self._endpoints[container].network}: detach it first")
        path = namespace or netns.path_of(container)
        inode = netns.inode_of(path)
        self._check_container(container, inode)
        network = self._network_for(network_name)
        endpoint = Endpoint(container, network.name, self._addresses(network, addresses))
        place = Place(path, inode)
        self._store.add_endpoint(endpoint, place)
        try:
            self._carry_out(diff(State(), State(attachments=self._attachment(endpoint, place))))
        except BaseException:
            self._store.remove_endpoint(container)
            self._remove_if_unneeded(network.name)
            raise
        self._endpoints[container], self._places[container], self._mappings[container] = endpoint, place, {}
        return endpoint

    def detach(self, container: str) -> None:
        """Takes a container off its network, and its mappings away."""
        endpoint = self._endpoint(container)
        place = self._places[container]
        planned = self.mappings(container)
        before = self._state_of(planned)
        with_link = State(attachments=self._attachment(endpoint, place), ports=before.ports, mappings=before.mappings)
        self._carry_out(diff(with_link, State()))
        self._store.remove_mappings(one.mapping for one in planned)
        self._store.remove_endpoint(container)
        self._drop(planned)
        del self._endpoints[container], self._places[container], self._mappings[container]
        self._remove_if_unneeded(endpoint.network)

    # Mappings

    def publish(self, container: str, texts: Iterable[str]) -> tuple[MappingPlan, ...]:
        """Publishes a container's ports; each text is as after Docker's `-p`.  All of them or none."""
        endpoint = self._endpoint(container)
        requests = [parse_port(text) for text in texts]
        network = self._networks[endpoint.network]
        reserving = Reserving(container, self._taken, self._facts.missing)
        with self._reserving() as mappings:
            for request in requests:
                _check_internal(request, network)
                found, sockets = reserving.reserve(request)
                self._hands.reserved |= sockets
                for mapping in found:
                    self._taken.add(mapping)
                    mappings.append(mapping)
            planned = tuple(plan_mapping(mapping, endpoint, network, self._facts) for mapping in mappings)
            self._store.add_mappings(mappings)
            try:
                self._carry_out(diff(State(), self._state_of(planned)))
            except BaseException:
                self._store.remove_mappings(mappings)
                raise
        self._mappings[container].update((str(one.mapping), one) for one in planned)
        return planned

    def unpublish(self, container: str, texts: Sequence[str] = ()) -> tuple[MappingPlan, ...]:
        """Withdraws a container's mappings: those that the texts name, all without any."""
        planned = self.mappings(container)
        if texts:
            chosen = [self._named(container, text) for text in texts]
            planned = tuple({str(one.mapping): one for found in chosen for one in found}.values())
        self._carry_out(diff(self._state_of(planned), State()))
        self._store.remove_mappings(one.mapping for one in planned)
        self._drop(planned)
        return planned

    # Looking after it

    def check(self) -> None:
        """Looks whether somebody else has changed something; if so, `reconcile`."""
        if self._networks and (self._gather() != self._facts or self._lost()):
            self.reconcile()

    def reconcile(self) -> None:
        """Makes what is what should be."""
        self._refresh()
        for container in [name for name in self._endpoints if self._is_gone(name)]:
            self._log.warning("container %s is gone: its ports are withdrawn", container)
            self._attempt(partial(self.detach, container))
        if not self._networks:
            return self._clear()
        stand = self._plan is not None and self._hands.rules.are_intact()
        after = self._plan if stand and self._plan is not None else self._whole_plan()
        found = self._hands.found()
        before = replace(found, plan=self._plan if stand else None, forwarding=self._facts.forwarding)
        wanted = self._wanted_state(after)
        # Others may have switched on what we have no need of; and only what we did is ours to switch off.
        extra = before.forwarding - self._facts.switched_on - wanted.forwarding
        for step in diff(before, replace(wanted, forwarding=wanted.forwarding | extra)):
            for part in _single(step):
                self._attempt(partial(self._hands.do, part))
        self._settle(after)

    # What is within

    def _gather(self) -> HostFacts:
        switched_on = frozenset(
            family for family, names in probe.FORWARDING.items() if any(map(self._borrowed.has, names))
        )
        return facts.gather(self._config, self._nft, switched_on)

    def _load(self) -> None:
        for network, on_demand in self._store.networks():
            self._networks[network.name] = network
            if on_demand:
                self._on_demand.add(network.name)
        for endpoint, place in self._store.endpoints():
            self._endpoints[endpoint.container], self._places[endpoint.container] = endpoint, place
            self._mappings[endpoint.container] = {}
        for mapping in self._store.mappings():
            endpoint = self._endpoints[mapping.container]
            planned = plan_mapping(mapping, endpoint, self._networks[endpoint.network], self._facts)
            self._mappings[mapping.container][str(mapping)] = planned
            self._taken.add(mapping)

    def _carry_out(self, steps: Iterable[Step]) -> None:
        """All steps, or none: what was done is undone when one fails."""
        done: list[Step] = []
        try:
            for step in steps:
                self._hands.do(step)
                done.append(step)
        except BaseException as error:
            failures = [failure for step in reversed(done) if (failure := self._undo(step)) is not None]
            if failures and isinstance(error, Exception):
                raise ExceptionGroup("and what was done already could not all be undone", [error, *failures]) from None
            raise

    def _undo(self, step: Step) -> Exception | None:
        back = step.undo()
        try:
            if back is not None:
                self._hands.do(back)
        except Exception as error:
            return error
        return None

    def _attempt(self, call: Callable[[], None]) -> None:
        """What cannot be done now is tried again by the next reconcile."""
        try:
            call()
        except GangwayError as error:
            self._log.warning("%s", error)

    def _clear(self) -> None:
        """Nothing is wanted: takes away whatever there is of ours."""
        found = self._hands.found()
        for step in diff(replace(found, forwarding=self._facts.switched_on), State()):
            self._attempt(partial(self._hands.do, step))
        self._attempt(self._hands.rules.remove)
        self._settle(None)

    def _settle(self, after: Plan | None) -> None:
        """The rules of a plan stand now."""
        self._facts = self._gather()
        self._plan = after
        if after is None:
            self._attempt(self._hands.put_back_ports)

    def _whole_plan(self) -> Plan:
        mappings = tuple(planned.mapping for planned in self.mappings())
        return plan(Wanted(self.networks(), self.endpoints(), mappings), self._facts)

    def _wanted_state(self, whole: Plan | None) -> State:
        if whole is None:
            return State()
        bridges = {planned.network.bridge: planned for planned in whole.networks}
        attachments: dict[str, Attachment | None] = {}
        for endpoint in whole.endpoints:
            attachments |= self._attachment(endpoint, self._places[endpoint.container])
        of_mappings = self._state_of(whole.mappings)
        return State(bridges, attachments, ports=of_mappings.ports, plan=whole, forwarding=whole.forwarding)

    def _state_of(self, planned: Iterable[MappingPlan]) -> State:
        """What some mappings make of the host."""
        kept = tuple(planned)
        relayed = [one for one in kept if one.mapping.protocol not in self._facts.missing]
        return State(
            ports=dict(pair for one in relayed for pair in ports_of(one)),
            mappings={str(one.mapping): one for one in kept},
        )

    def _attachment(self, endpoint: Endpoint, place: Place) -> dict[str, Attachment]:
        network = self._networks[endpoint.network]
        isolated = plan_network(network, self._facts).isolate_ports
        return {link_name(endpoint.container): Attachment(endpoint, network, place.namespace, isolated)}

    def _endpoint(self, container: str) -> Endpoint:
        if container not in self._endpoints:
            raise Conflict(f"container {container} is on no network: gangway attach {container} --network NAME")
        return self._endpoints[container]

    def _check_container(self, container: str, inode: int) -> None:
        if inode == netns.own_inode():
            raise Conflict(f"{container} is the host's own network namespace")
        for other, place in self._places.items():
            if place.inode == inode and not self._is_gone(other):
                raise Conflict(f"{container} is the network namespace of container {other}, which is attached already")

    def _network_for(self, name: str | None) -> Network:
        if name is not None and (name != ON_DEMAND or name in self._networks):
            return self.network(name)
        if ON_DEMAND in self._networks:
            return self._networks[ON_DEMAND]
        taken = [*self._hands.routed(), *(subnet for one in self.networks() for subnet in one.subnets)]
        subnets = free_subnets(taken, token_bytes(5))
        network = Network(ON_DEMAND, ON_DEMAND, subnets, tuple(map(first_gateway, subnets)))
        return self.create_network(network, on_demand=True)

    def _remove_if_unneeded(self, name: str) -> None:
        if name in self._on_demand and not self.endpoints(name):
            self.remove_network(name)

    def _addresses(self, network: Network, asked: Sequence[Address]) -> tuple[Address, ...]:
        """One in each subnet: what was asked for, or a free one."""
        taken = frozenset(address for one in self.endpoints(network.name) for address in one.addresses)
        left = list(asked)
        found = []
        for subnet in network.subnets:
            wanted = next((address for address in left if address in subnet), None)
            if wanted is None:
                found.append(free_address(network, subnet, taken))
                continue
            left.remove(wanted)
            if wanted in taken or wanted in network.gateways:
                raise Conflict(f"{wanted} is taken on network {network.name}")
            if wanted in (subnet.network_address, subnet.broadcast_address):
                raise InvalidRequest(f"{wanted} is not an address for a container in {subnet}")
            found.append(wanted)
        if left:
            raise InvalidRequest(f"{left[0]} does not fit network {network.name}: one address in each of its subnets")
        return tuple(found)

    @contextmanager
    def _reserving(self) -> Iterator[list[PortMapping]]:
        """The mappings of a request in the making; nothing is left of them when it fails."""
        mappings: list[PortMapping] = []
        try:
            yield mappings
        except BaseException:
            for mapping in mappings:
                self._taken.remove(mapping)
            raise
        finally:
            for sock in self._hands.reserved.values():
                sock.close()
            self._hands.reserved.clear()

    def _named(self, container: str, text: str) -> list[MappingPlan]:
        """The mappings that a `-p` names."""
        request = parse_port(text)
        found = [planned for planned in self._mappings[container].values() if _is_meant(planned.mapping, request)]
        if not found:
            raise Conflict(f"container {container} has no mapping -p {text}: gangway ls {container} lists them")
        return found

    def _drop(self, planned: Iterable[MappingPlan]) -> None:
        """Nothing is left of some mappings."""
        for one in planned:
            del self._mappings[one.mapping.container][str(one.mapping)]
            self._taken.remove(one.mapping)

    def _is_gone(self, container: str) -> bool:
        """Its namespace has ended, and the attachment with it."""
        place = self._places[container]
        return not netns.is_there(*place) and not self._hands.is_attached(link_name(container))

    def _lost(self) -> bool:
        """Something of ours is not there any more, or not as it was."""
        if self._plan is not None and not self._hands.rules.are_intact():
            return True
        links = self._hands.links_of_ours()
        wanted = {network.bridge for network in self._networks.values()} | {link_name(name) for name in self._endpoints}
        return links != wanted or not self._relay.lives()

    def _refresh(self) -> None:
        """Looks at the host again; with other facts, another firewall may be due, and everything is decided anew."""
        now = self._gather()
        if now == self._facts and self._plan is not None:
            return
        for text in _notes(self._facts, now, self._plan):
            self._log.warning("%s", text)
        if now.firewall is not self._facts.firewall:
            self._hands.rules = rules_for(now.firewall, self._nft, self._store, self._config.chain_prefix)
        self._facts, self._plan = now, None
        for container, endpoint in self._endpoints.items():
            network = self._networks[endpoint.network]
            self._mappings[container] = {
                name: plan_mapping(planned.mapping, endpoint, network, now)
                for name, planned in self._mappings[container].items()
            }


def _check_internal(request: PortRequest, network: Network) -> None:
    if network.internal and not all(address.is_loopback for address in request.host_addresses):
        inner = request.container_ports
        raise Conflict(
            f"network {network.name} is internal: its containers' ports can be published on a loopback address only, "
            f"as in -p 127.0.0.1:{request.host_ports or inner}:{inner}"
        )


def _is_meant(mapping: PortMapping, request: PortRequest) -> bool:
    return (
        mapping.protocol == request.protocol
        and mapping.container_ports == request.container_ports
        and mapping.host_address in request.host_addresses
        and (request.is_choice or mapping.host_ports == request.host_ports)
    )


def _notes(before: HostFacts, now: HostFacts, whole: Plan | None) -> Iterator[str]:
    """What an operator should know of a change that somebody else has made."""
    for family in sorted((before.forwarding - now.forwarding) & (whole.forwarding if whole else before.forwarding)):
        then = "it is switched on again" if now.may_forward else "what it carried goes by relay"
        yield f"{FORWARDING_SETTING[family]} was switched off by somebody else: {then}"
    for family, who in now.forward_droppers:
        if before.dropper(family) != who:
            yield f"{who} drops what is forwarded (IPv{family}): what it carried goes by relay"
    if before.firewall is not now.firewall:
        yield f"the firewall is {now.firewall} from now on: another program's rules left no other way"


def _single(step: Step) -> Iterator[Step]:
    """Ports one by one: that one cannot be had is no reason to do without the others."""
    if isinstance(step.what, Ports):
        yield from (Step(step.verb, Ports((one,))) for one in step.what.of)
    else:
        yield step
