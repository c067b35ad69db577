"""What goes over the daemon's socket: the requests and answers of its HTTP API.

What this file knows: their fields, in the project's words, and how they are made of the model's and the plan's values.
What it must not know: HTTP, who asks.

Addresses, subnets and ports are text, as a person writes them; ranges are `8000-8010`.
"""

from ipaddress import ip_network

import msgspec

from gangway.errors import InvalidRequest
from gangway.model import Endpoint, Network, PortMapping, Subnet, bridge_name, first_gateway, parse_address
from gangway.plan import MappingPlan, Origin, Route


class NetworkRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A network to be made."""

    name: str
    subnets: list[str]
    gateways: list[str] = []
    """Of some or all of the subnets; the others get their first address."""
    bridge: str = ""
    """The bridge's name; empty: one is made up."""
    masquerade: bool = True
    icc: bool = True
    internal: bool = False
    mtu: int = 1500
    """Bytes."""

    def network(self) -> Network:
        """The network that is meant.  InvalidRequest: it makes no sense."""
        subnets = tuple(map(_subnet, self.subnets))
        left = list(map(parse_address, self.gateways))
        gateways = []
        for subnet in subnets:
            chosen = next((one for one in left if one.version == subnet.version), None)
            gateways.append(chosen or first_gateway(subnet))
            if chosen:
                left.remove(chosen)
        if left:
            raise InvalidRequest(f"the gateway {left[0]} is not in any of the subnets")
        policy = self.masquerade, self.icc, self.internal, self.mtu
        return Network(self.name, self.bridge or bridge_name(self.name), subnets, tuple(gateways), *policy)


class AttachRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A container to be attached."""

    container: str
    """A name of ip-netns(8), a path, or pid:PID."""
    network: str = ""
    """Empty: the one that is made on demand."""
    addresses: list[str] = []
    """In some or all of the network's subnets; in the others it gets a free one."""
    namespace: str = ""
    """The path of its network namespace, when `container` is a name of one's own choice."""


class PublishRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Ports to be published, or withdrawn; each is as after `-p`."""

    container: str
    ports: list[str] = []


class NetworkAnswer(msgspec.Struct):
    """A network."""

    name: str
    bridge: str
    subnets: list[str]
    gateways: list[str]
    masquerade: bool
    icc: bool
    internal: bool
    mtu: int
    endpoints: list["EndpointAnswer"]

    @classmethod
    def of(cls, network: Network, endpoints: tuple[Endpoint, ...]) -> "NetworkAnswer":
        """For a network with these endpoints."""
        policy = network.masquerade, network.icc, network.internal, network.mtu
        subnets, gateways = list(map(str, network.subnets)), list(map(str, network.gateways))
        attached = [EndpointAnswer.of(endpoint) for endpoint in endpoints]
        return cls(network.name, network.bridge, subnets, gateways, *policy, attached)


class EndpointAnswer(msgspec.Struct):
    """An endpoint."""

    container: str
    network: str
    addresses: list[str]

    @classmethod
    def of(cls, endpoint: Endpoint) -> "EndpointAnswer":
        """For an endpoint."""
        return cls(endpoint.container, endpoint.network, list(map(str, endpoint.addresses)))


class RouteAnswer(msgspec.Struct):
    """The road of one kind of client, and why."""

    origin: str
    neighbour: bool
    """It is a container of the same network."""
    road: str
    code: str
    fact: str
    seen_as: str
    """Whose address the container sees: `client`, `gateway`, or `nobody`."""
    rules: list[str] = []
    """What its first packet meets; told by `explain` only."""

    @classmethod
    def of(cls, route: Route, rules: tuple[str, ...] = ()) -> "RouteAnswer":
        """For a route."""
        reason = route.reason
        words = route.origin.value, route.neighbour, route.road.value, reason.code.value, reason.fact
        return cls(*words, route.seen_as.value, list(rules))


class MappingAnswer(msgspec.Struct):
    """A mapping, and the road of each kind of client."""

    container: str
    protocol: str
    host_address: str
    host_ports: str
    container_address: str
    container_ports: str
    routes: list[RouteAnswer]
    source: str
    """Who states the mapping: `api`, or `lease` for a docker-proxy launcher."""
    redirected: int
    """How often sockets were redirected to it: connections, and peers of sockets that are not connected."""

    @classmethod
    def of(cls, planned: MappingPlan, redirected: int = 0, routes: list[RouteAnswer] | None = None) -> "MappingAnswer":
        """For a mapping; all its routes, or some."""
        mapping: PortMapping = planned.mapping
        every = [RouteAnswer.of(route) for route in planned.routes] if routes is None else routes
        return cls(
            mapping.container,
            mapping.protocol.value,
            str(mapping.host_address),
            str(mapping.host_ports),
            str(planned.container_address),
            str(mapping.container_ports),
            every,
            mapping.source.value,
            redirected,
        )


class ExplainAnswer(msgspec.Struct):
    """What a client meets that asks an address."""

    host_address: str
    host_port: int
    firewall: str
    network: str
    gateways: list[str]
    mapping: MappingAnswer


class CheckAnswer(msgspec.Struct):
    """Something that a road depends on: whether it holds on this host; if not, why and what follows."""

    check: str
    holds: bool
    note: str


class ErrorAnswer(msgspec.Struct):
    """What went wrong: the error's kind, and a line for a person."""

    kind: str
    error: str


def origin(text: str) -> Origin:
    """An origin.  InvalidRequest: it is none."""
    try:
        return Origin(text)
    except ValueError:
        raise InvalidRequest(f"unknown origin {text!r}: {', '.join(Origin)}") from None


def _subnet(text: str) -> Subnet:
    try:
        return ip_network(text)
    except ValueError as error:
        raise InvalidRequest(f"{text!r} is not a subnet: {error}") from None
