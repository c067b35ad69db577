"""What is wanted, in memory: networks, endpoints and mappings, each mapping with what was decided about it.

Everything is looked up by name, so one more costs the same however many there are.  Each change is written to the
database, too.  One thread makes all changes; others may read meanwhile, as no method iterates over a dictionary that
may change: `tuple(dictionary.values())` is one step of the interpreter.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from gangway.addressing import free_address
from gangway.errors import Conflict, InvalidRequest
from gangway.facts import HostFacts
from gangway.model import Address, Endpoint, Network, PortMapping, PortRange, Protocol, parse_port
from gangway.neighbours import Neighbours, further_neighbours
from gangway.plan import MappingPlan, Plan, assemble, plan_mapping, plan_network
from gangway.reconcile import properties
from gangway.reconcile.state import Attachment, State, link_of, ports_of, redirects_of, steered_of, translated_udp
from gangway.state.database import Database, Place
from gangway.state.parked import ParkedPorts
from gangway.state.port_index import PortIndex


class Registry:
    """The networks, endpoints and mappings of the database; `decide` has to be called before mappings are read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._facts: HostFacts | None = None
        self._networks: dict[str, Network] = {}
        self._on_demand: dict[str, bool] = {}
        self._endpoints: dict[str, tuple[Endpoint, ...]] = {}  # by container, the first one first
        self._places: dict[str, Place] = {}
        self._mappings: dict[str, dict[str, MappingPlan]] = {}
        self.index, self.parked = PortIndex(), ParkedPorts(database)
        self._undecided = list(database.mappings())
        for network, on_demand in database.networks():
            self._networks[network.name], self._on_demand[network.name] = network, on_demand
        for endpoint, place in database.endpoints():
            self._insert_endpoint(endpoint, place)
        for mapping in self._undecided:
            self.index.add(mapping)

    # Networks

    @property
    def networks(self) -> tuple[Network, ...]:
        return tuple(self._networks.values())

    def network(self, name: str) -> Network:
        """Return a network.  Conflict: there is none of that name."""
        if name not in self._networks:
            raise Conflict(f"no network named {name!r}; networks: {_names(self._networks)}")
        return self._networks[name]

    def network_of(self, container: str) -> Network:
        """Return a container's first network.  Conflict: it is on none."""
        return self._networks[self.endpoint(container).network]

    def own_network(self, name: str) -> Network:
        """Return a network that gangway has created.  Conflict: it is Docker's, or there is none of that name."""
        network = self.network(name)
        if network.is_adopted:
            raise Conflict(f"network {name} is Docker's: use the docker command")
        return network

    def adopted_bridges(self) -> frozenset[str]:
        """Return the names of Docker's bridges that gangway has rules for."""
        return frozenset(one.bridge for one in self.networks if one.is_adopted and one.has_rules)

    def is_unneeded(self, name: str) -> bool:
        """True if a network was made on demand and has no containers left."""
        return self._on_demand[name] and not self.endpoints(name)

    def add_network(self, network: Network, on_demand: bool) -> None:
        self._database.add_network(network, on_demand)
        self._networks[network.name], self._on_demand[network.name] = network, on_demand

    def remove_network(self, name: str) -> None:
        self._database.remove_network(name)
        del self._networks[name], self._on_demand[name]

    # Endpoints

    @property
    def containers(self) -> tuple[str, ...]:
        """The names of all containers that are attached."""
        return tuple(self._endpoints)

    def endpoints(self, network: str | None = None) -> tuple[Endpoint, ...]:
        """Return every endpoint, or those of a network."""
        found = (one for endpoints in tuple(self._endpoints.values()) for one in endpoints)
        return tuple(one for one in found if network in (None, one.network))

    def endpoints_of(self, container: str) -> tuple[Endpoint, ...]:
        """Return a container's endpoints, the first one first.  Conflict: it has none."""
        if container not in self._endpoints:
            raise Conflict(f"no container named {container!r} is attached; attached: {_names(self._endpoints)}")
        return self._endpoints[container]

    def endpoint(self, container: str) -> Endpoint:
        """Return a container's first endpoint.  Conflict: it has none."""
        return self.endpoints_of(container)[0]

    def has_endpoint(self, container: str) -> bool:
        return container in self._endpoints

    def link_names(self, container: str) -> tuple[str, ...]:
        """Return the names of a container's links on the host."""
        return tuple(map(link_of, self.endpoints_of(container)))

    def owners(self) -> set[str]:
        """Return the processes at whose end a container is detached.  It may be called from any thread."""
        return {place.owner for place in list(self._places.values()) if place.owner}

    def place(self, container: str) -> Place:
        return self._places[container]

    def addresses_for(
        self, network: Network, requested: Sequence[Address], without: Collection[int] = ()
    ) -> tuple[Address, ...]:
        """Return an address in each subnet for a new endpoint: a requested one, or a free one.

        `without`: the families (4, 6) that the container cannot use.
        """
        used = frozenset(address for one in self.endpoints(network.name) for address in one.addresses)
        left = list(requested)
        found = []
        for subnet in network.subnets:
            if subnet.version in without:
                continue
            wanted = next((address for address in left if address in subnet), None)
            if wanted is None:
                found.append(free_address(network, subnet, used))
                continue
            left.remove(wanted)
            if wanted in used or wanted in network.gateways:
                raise Conflict(f"address {wanted} is in use on network {network.name}")
            if wanted == subnet.network_address or (subnet.version == 4 and wanted == subnet.broadcast_address):
                raise InvalidRequest(
                    f"invalid container address {wanted}: it is the network or broadcast address of {subnet}"
                )
            found.append(wanted)
        if left:
            raise InvalidRequest(
                f"address {left[0]} is in no subnet of network {network.name}, or there are two for one subnet"
            )
        return tuple(found)

    def add_endpoint(self, endpoint: Endpoint, place: Place) -> None:
        """Add an endpoint, which is its container's first one if that has none; `place` is one for all of them."""
        self._database.add_endpoint(endpoint, place)
        self._insert_endpoint(endpoint, place)

    def rename_endpoint(self, container: str, name: str) -> None:
        """Give a container another name, which no other one has.  Nothing on the host depends on it."""
        endpoints, place, known = self._endpoints[container], self._places[container], self.mappings(container)
        self._database.rename_endpoint(container, name)
        for endpoint in endpoints:
            self._insert_endpoint(replace(endpoint, container=name), place)
        for planned in known:
            renamed = replace(planned, mapping=replace(planned.mapping, container=name))
            self._mappings[name][str(renamed.mapping)] = renamed
            self.index.replace(planned.mapping, renamed.mapping)
        del self._endpoints[container], self._places[container], self._mappings[container]

    def remove_endpoint(self, endpoint: Endpoint) -> None:
        """Remove an endpoint that is not its container's first one."""
        self._database.remove_endpoint(endpoint.container, endpoint.network)
        left = (one for one in self._endpoints[endpoint.container] if one != endpoint)
        self._endpoints[endpoint.container] = tuple(left)

    def remove_container(self, container: str) -> None:
        """Remove a container's endpoints and mappings."""
        self._database.remove_container(container)
        for planned in self.mappings(container):
            self.index.remove(planned.mapping)
        del self._endpoints[container], self._places[container], self._mappings[container]

    # Mappings

    def mappings(self, container: str | None = None) -> tuple[MappingPlan, ...]:
        """Return every mapping, or those of a container.  Conflict: the container is not attached."""
        if container is not None:
            mappings = self._mappings.get(self.endpoint(container).container, {})
            return tuple(mappings.values())
        return tuple(planned for found in tuple(self._mappings.values()) for planned in tuple(found.values()))

    def mapping(self, mapping: PortMapping) -> MappingPlan:
        """Return what was decided about a mapping.  Conflict: its container is not attached."""
        _ = self.endpoint(mapping.container)
        return self._mappings[mapping.container][str(mapping)]

    def named(self, container: str, text: str) -> tuple[MappingPlan, ...]:
        """Return the mappings of a container that a `-p` names.  Conflict: it names none."""
        request = parse_port(text)
        known = self._mappings[self.endpoint(container).container]
        if request.host_ports is None or request.is_choice:
            found = tuple(planned for planned in known.values() if request.names(planned.mapping))
        else:
            given = request.host_ports, request.container_ports
            wanted = (str(PortMapping(container, request.protocol, at, *given)) for at in request.host_addresses)
            found = tuple(known[name] for name in wanted if name in known)
        if not found:
            raise Conflict(f"container {container} has no mapping -p {text}: gangway ls {container} lists them")
        return found

    def waiting(self, container: str | None = None) -> tuple[PortMapping, ...]:
        """Return the mappings of Docker's containers, or of one, that are not published: it is stopped, for example."""
        found = (one for one in self.parked.all() if container in (None, one.container))
        return tuple(one for one in found if str(one) not in self._mappings.get(one.container, {}))

    def waiting_at(self, protocol: Protocol, address: Address, port: int) -> PortMapping | None:
        """Return the mapping of a host port that is not published, but waits; None if there is none."""
        at = PortRange(port, port)
        found = (one for one in self.waiting() if one.protocol is protocol and one.host_ports.includes(at))
        return next((one for one in found if _is_any_or_same(address, one.host_address)), None)

    def add_mappings(self, mappings: Sequence[PortMapping]) -> tuple[MappingPlan, ...]:
        """Add mappings; they are in `index` already."""
        self._database.add_mappings(mappings)
        return tuple(self._decide_mapping(mapping) for mapping in mappings)

    def remove_mappings(self, planned: Iterable[MappingPlan]) -> None:
        mappings = [one.mapping for one in planned]
        self._database.remove_mappings(mappings)
        for mapping in mappings:
            del self._mappings[mapping.container][str(mapping)]
            self.index.remove(mapping)

    # Plans and states

    @property
    def _decided_facts(self) -> HostFacts:
        assert self._facts is not None, "decide() comes first"
        return self._facts

    def decide(self, facts: HostFacts) -> None:
        """Decide about every mapping again, if the facts about the host have changed."""
        if facts == self._facts:
            return
        mappings = [*self._undecided, *(planned.mapping for planned in self.mappings())]
        self._facts, self._undecided = facts, []
        for mapping in mappings:
            self._decide_mapping(mapping)

    def plan(self, without: str | None = None) -> Plan | None:
        """Return the plan of all rules, perhaps without one network; None if there are none."""
        networks = {one.name: one for one in self.networks if one.has_rules and one.name != without}
        if not networks:
            return None
        mappings = tuple(one for one in self.mappings() if one.has_rules)
        return assemble(tuple(networks.values()), self._neighbours(self.endpoints()), mappings, self._decided_facts)

    def state(self, whole: Plan | None) -> State:
        """Return what the host should be: the rules of a plan, and all else of every mapping."""
        links = self.links()
        return replace(
            self._served(self.mappings()),
            bridges=links.bridges,
            attachments=links.attachments,
            properties=links.properties,
            plan=whole,
            forwarding=frozenset() if whole is None else whole.forwarding,
        )

    def links(self) -> State:
        """Return the links of gangway's that the host should have, and their properties."""
        own = [network for network in self.networks if not network.is_adopted]
        attachments = self._attachments(self.endpoints())
        of_veths = (
            properties.of_veth(name, one.namespace, one.endpoint, one.network) for name, one in attachments.items()
        )
        return State(
            bridges={one.bridge: plan_network(one, self._decided_facts) for one in own},
            attachments=attachments,
            properties=frozenset().union(*map(properties.of_bridge, own), *of_veths),
        )

    def state_of(self, planned: Sequence[MappingPlan]) -> State:
        """Return what mappings make of the host, as is decided now.  Conflict: one's container is not attached."""
        current = [self.mapping(one.mapping) for one in planned]
        return replace(self._served(current), mappings={str(one.mapping): one for one in current if one.has_rules})

    def _served(self, planned: Sequence[MappingPlan]) -> State:
        """Return what mappings make of the host, without their rules."""
        relayed = [one for one in planned if one.mapping.protocol not in self._decided_facts.missing_protocols]
        return State(
            ports=dict(pair for one in relayed for pair in ports_of(one)),
            steered=dict(pair for one in relayed for pair in steered_of(one)),
            redirects=dict(pair for one in planned for pair in redirects_of(one)),
        )

    def state_of_endpoints(self, endpoints: Sequence[Endpoint]) -> State:
        """Return what endpoints make of the host; a container's mappings belong to its first one.

        Conflict: a container is not attached.
        """
        published = (planned for one in endpoints if one.is_first for planned in self.mappings(one.container))
        return replace(
            self.state_of(tuple(published)),
            neighbours=self._neighbours(endpoints),
            attachments=self._attachments(endpoints),
        )

    def further_networks(self, planned: MappingPlan) -> tuple[str, ...]:
        """Return the names of the further networks of a mapping's container whose clients there are masqueraded."""
        of_container = self._endpoints.get(planned.mapping.container, ())
        further = (self._networks[one.network] for one in of_container if not one.is_first)
        return tuple(one.name for one in further if any(subnet.version == planned.family for subnet in one.subnets))

    def _neighbours(self, endpoints: Iterable[Endpoint]) -> frozenset[Neighbours]:
        """Return the clients on further networks among those of some endpoints."""
        further = ((self.endpoint(one.container), one.network) for one in endpoints if not one.is_first)
        found = (
            further_neighbours(first, self._networks[first.network], self._networks[name]) for first, name in further
        )
        return frozenset().union(*found)

    def _attachments(self, endpoints: Iterable[Endpoint]) -> dict[str, Attachment]:
        found = {}
        for endpoint in endpoints:
            network, place = self._networks[endpoint.network], self._places[endpoint.container]
            if network.is_adopted:
                continue
            isolated = plan_network(network, self._decided_facts).isolate_ports
            udp = () if endpoint.is_first else translated_udp(self.mappings(endpoint.container))
            found[link_of(endpoint)] = Attachment(endpoint, network, place.namespace, isolated, place.inode, udp)
        return found

    def _insert_endpoint(self, endpoint: Endpoint, place: Place) -> None:
        container = endpoint.container
        known = self._endpoints.get(container, ())
        if not known:
            self._places[container], self._mappings[container] = place, {}
        endpoint = replace(endpoint, is_first=not known)  # the row of the first one may have been damaged
        self._endpoints[container] = (*known, endpoint)

    def planned(self, mapping: PortMapping) -> MappingPlan:
        """Return what would be decided about a mapping of an attached container."""
        endpoint = self.endpoint(mapping.container)
        return plan_mapping(mapping, endpoint, self._networks[endpoint.network], self._decided_facts)

    def _decide_mapping(self, mapping: PortMapping) -> MappingPlan:
        planned = self.planned(mapping)
        self._mappings[mapping.container][str(mapping)] = planned
        return planned


def _names(known: Iterable[str]) -> str:
    return ", ".join(sorted(known)) or "none"


def _is_any_or_same(one: Address, other: Address) -> bool:
    return one.is_unspecified or other.is_unspecified or one == other
