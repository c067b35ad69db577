"""What is wanted, at hand: the store's rows as the model's values, each mapping with what was decided about it.

What this file knows: which network, endpoint or mapping belongs to which.  What it must not know: how anything is
brought about.

Everything is looked up by name, so one more costs the same however many there are.  Each change is written to the
store, too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gangway.errors import Conflict, InvalidRequest
from gangway.model import Address, Endpoint, Network, PortMapping, PortRequest, free_address, parse_port
from gangway.plan import HostFacts, MappingPlan, Plan, assemble, plan_mapping, plan_network
from gangway.reconcile.diff import Attachment, State, link_name, ports_of, redirects_of, steered_of
from gangway.state.database import Database, Place
from gangway.state.port_index import PortIndex


class Registry:
    """Networks, endpoints and mappings; `decide` says what the facts about the host are."""

    def __init__(self, store: Database, facts: HostFacts) -> None:
        self._database = store
        self._facts = facts
        self._networks: dict[str, Network] = {}
        self._on_demand: set[str] = set()
        self._endpoints: dict[str, Endpoint] = {}
        self._places: dict[str, Place] = {}
        self._mappings: dict[str, dict[str, MappingPlan]] = {}
        self.taken = PortIndex()
        for network, on_demand in store.networks():
            self._remember_network(network, on_demand)
        for endpoint, place in store.endpoints():
            self._remember_endpoint(endpoint, place)
        for mapping in store.mappings():
            self.taken.add(mapping)
            self._remember_mapping(mapping)

    # Networks

    @property
    def networks(self) -> tuple[Network, ...]:
        """All networks."""
        return tuple(self._networks.values())

    def network(self, name: str) -> Network:
        """One network.  Conflict: there is none of that name."""
        if name not in self._networks:
            raise Conflict(f"there is no network {name}: gangway network ls lists those that there are")
        return self._networks[name]

    def network_of(self, container: str) -> Network:
        """The network that a container is on."""
        return self._networks[self.endpoint(container).network]

    def is_unneeded(self, name: str) -> bool:
        """The network was made on demand, and nobody is on it any more."""
        return name in self._on_demand and not self.endpoints(name)

    def add_network(self, network: Network, on_demand: bool) -> None:
        """One more."""
        self._database.add_network(network, on_demand)
        self._remember_network(network, on_demand)

    def remove_network(self, name: str) -> None:
        """One less."""
        self._database.remove_network(name)
        self._on_demand.discard(name)
        del self._networks[name]

    # Endpoints

    def endpoints(self, network: str | None = None) -> tuple[Endpoint, ...]:
        """All endpoints, or those of a network."""
        return tuple(one for one in self._endpoints.values() if network in (None, one.network))

    def endpoint(self, container: str) -> Endpoint:
        """A container's.  Conflict: it has none."""
        if container not in self._endpoints:
            raise Conflict(f"container {container} is on no network: gangway attach {container} --network NAME")
        return self._endpoints[container]

    def has_endpoint(self, container: str) -> bool:
        """Whether a container is on a network."""
        return container in self._endpoints

    def place(self, container: str) -> Place:
        """Where a container is."""
        return self._places[container]

    def addresses_for(self, network: Network, asked: Sequence[Address]) -> tuple[Address, ...]:
        """For one more endpoint, an address in each subnet: what was asked for, or a free one."""
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
            if wanted == subnet.network_address or (subnet.version == 4 and wanted == subnet.broadcast_address):
                raise InvalidRequest(f"{wanted} is not an address for a container in {subnet}")
            found.append(wanted)
        if left:
            raise InvalidRequest(f"{left[0]} does not fit network {network.name}: one address in each of its subnets")
        return tuple(found)

    def add_endpoint(self, endpoint: Endpoint, place: Place) -> None:
        """One more."""
        self._database.add_endpoint(endpoint, place)
        self._remember_endpoint(endpoint, place)

    def remove_endpoint(self, container: str) -> None:
        """One less, and its mappings."""
        self._database.remove_endpoint(container)
        for planned in self.mappings(container):
            self.taken.remove(planned.mapping)
        del self._endpoints[container], self._places[container], self._mappings[container]

    # Mappings

    def mappings(self, container: str | None = None) -> tuple[MappingPlan, ...]:
        """All mappings, or those of a container.  Conflict: it is on no network."""
        if container is not None:
            return tuple(self._mappings[self.endpoint(container).container].values())
        return tuple(planned for found in self._mappings.values() for planned in found.values())

    def mapping(self, mapping: PortMapping) -> MappingPlan:
        """What was decided about one."""
        return self._mappings[mapping.container][str(mapping)]

    def named(self, container: str, text: str) -> tuple[MappingPlan, ...]:
        """The mappings of a container that a `-p` names.  Conflict: it names none."""
        request = parse_port(text)
        known = self._mappings[self.endpoint(container).container]
        if request.is_choice:
            found = tuple(planned for planned in known.values() if _is_meant(planned.mapping, request))
        else:
            meant = (str(one) for one in _mappings_of(container, request))
            found = tuple(known[name] for name in meant if name in known)
        if not found:
            raise Conflict(f"container {container} has no mapping -p {text}: gangway ls {container} lists them")
        return found

    def add_mappings(self, mappings: Sequence[PortMapping]) -> tuple[MappingPlan, ...]:
        """Some more; they are in `taken` already."""
        self._database.add_mappings(mappings)
        return tuple(self._remember_mapping(mapping) for mapping in mappings)

    def remove_mappings(self, planned: Iterable[MappingPlan]) -> None:
        """Some less."""
        mappings = [one.mapping for one in planned]
        self._database.remove_mappings(mappings)
        for mapping in mappings:
            del self._mappings[mapping.container][str(mapping)]
            self.taken.remove(mapping)

    # What follows

    def decide(self, facts: HostFacts) -> None:
        """The facts are others now: decides about every mapping anew."""
        if facts == self._facts:
            return
        self._facts = facts
        for planned in self.mappings():
            self._remember_mapping(planned.mapping)

    def plan(self, without: str | None = None) -> Plan | None:
        """The whole plan, perhaps without one network; None if there is nothing to plan."""
        networks = tuple(network for network in self.networks if network.name != without)
        if not networks:
            return None
        return assemble(networks, self.endpoints(), self.mappings(), self._facts)

    def state(self, whole: Plan) -> State:
        """What the host should be by a plan."""
        attachments: dict[str, Attachment | None] = {}
        for endpoint in whole.endpoints:
            attachments |= self.attachment(endpoint, self._places[endpoint.container])
        published = self.state_of(whole.mappings)
        return State(
            bridges={planned.network.bridge: planned for planned in whole.networks},
            attachments=attachments,
            ports=published.ports,
            steered=published.steered,
            redirects=published.redirects,
            plan=whole,
            forwarding=whole.forwarding,
        )

    def state_of(self, planned: Sequence[MappingPlan]) -> State:
        """What some mappings make of the host."""
        relayed = [one for one in planned if one.mapping.protocol not in self._facts.missing_protocols]
        return State(
            ports=dict(pair for one in relayed for pair in ports_of(one)),
            steered=dict(pair for one in relayed for pair in steered_of(one)),
            redirects=dict(pair for one in planned for pair in redirects_of(one)),
            mappings={str(one.mapping): one for one in planned},
        )

    def state_of_container(self, container: str) -> State:
        """What an endpoint and its mappings make of the host."""
        attachments = self.attachment(self.endpoint(container), self._places[container])
        return replace(self.state_of(self.mappings(container)), attachments=attachments)

    def attachment(self, endpoint: Endpoint, place: Place) -> dict[str, Attachment]:
        """What an endpoint makes of the host."""
        network = self._networks[endpoint.network]
        isolated = plan_network(network, self._facts).isolate_ports
        return {link_name(endpoint.container): Attachment(endpoint, network, place.namespace, isolated)}

    def _remember_network(self, network: Network, on_demand: bool) -> None:
        self._networks[network.name] = network
        if on_demand:
            self._on_demand.add(network.name)

    def _remember_endpoint(self, endpoint: Endpoint, place: Place) -> None:
        self._endpoints[endpoint.container], self._places[endpoint.container] = endpoint, place
        self._mappings[endpoint.container] = {}

    def planned(self, mapping: PortMapping) -> MappingPlan:
        """What would be decided about a mapping of a container that is on a network."""
        endpoint = self._endpoints[mapping.container]
        return plan_mapping(mapping, endpoint, self._networks[endpoint.network], self._facts)

    def _remember_mapping(self, mapping: PortMapping) -> MappingPlan:
        planned = self.planned(mapping)
        self._mappings[mapping.container][str(mapping)] = planned
        return planned


def _mappings_of(container: str, request: PortRequest) -> Iterator[PortMapping]:
    """The mappings of a request that leaves no choice."""
    for address in request.host_addresses:
        if request.host_ports is not None:
            yield PortMapping(container, request.protocol, address, request.host_ports, request.container_ports)


def _is_meant(mapping: PortMapping, request: PortRequest) -> bool:
    """Whether it is one that a request may have led to that left a choice."""
    return (
        mapping.protocol == request.protocol
        and request.container_ports.includes(mapping.container_ports)
        and mapping.host_address in request.host_addresses
        and (request.host_ports is None or request.host_ports.includes(mapping.host_ports))
    )
