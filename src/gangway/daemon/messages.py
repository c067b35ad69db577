"""The requests and answers of the daemon's HTTP API, and how they are converted from and to the model's values.

Addresses, subnets and ports are text, as a person writes them; ranges are `8000-8010`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import msgspec

from gangway.addressing import first_gateway
from gangway.admission import parse_subnet
from gangway.errors import InvalidRequest
from gangway.model import (
    Endpoint,
    Network,
    PortRequest,
    Source,
    Subnet,
    bridge_name,
    default_mtu,
    parse_address,
)
from gangway.plan import MappingPlan, Origin, Route
from gangway.relay.sockets import Counters

_MAX_INT = (1 << 31) - 1


class NetworkRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    subnets: list[str] = []  # empty: free ones are chosen, as for `gangway0`
    gateways: list[str] = []  # one for each subnet at most; a subnet without one gets its first address
    bridge: str = ""  # the bridge's name; empty: it is derived from the network's
    masquerade: bool = True
    icc: bool = True
    internal: bool = False
    mtu: Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT)] | None = None  # bytes; without a value it is the uplink's

    def network(
        self, uplink_mtu: int | None = None, subnets: Sequence[Subnet] = (), source: Source = Source.API
    ) -> Network:
        """Return the network; `subnets` are used if it names none.  InvalidRequest: its values do not fit together."""
        if self.gateways and not self.subnets:
            raise InvalidRequest(f"the gateway {self.gateways[0]} needs a subnet: name one for network {self.name}")
        subnets = tuple(map(parse_subnet, self.subnets)) or tuple(subnets)
        unused = list(map(parse_address, self.gateways))
        gateways = []
        for subnet in subnets:
            chosen = next((one for one in unused if one.version == subnet.version), None)
            gateways.append(chosen or first_gateway(subnet))
            if chosen:
                unused.remove(chosen)
        if unused:
            raise InvalidRequest(f"the gateway {unused[0]} is not in any of the subnets")
        mtu = default_mtu(uplink_mtu, subnets) if self.mtu is None else self.mtu
        policy = self.masquerade, self.icc, self.internal, mtu, source
        return Network(self.name, self.bridge or bridge_name(self.name), subnets, tuple(gateways), *policy)

    def describes(self, network: Network) -> bool:
        """True if a network is as this requests it, whoever has created it; the order of the subnets does not matter.

        If no MTU is requested, the network's is right: it was the uplink's when the network was created.
        """
        try:
            requested = self.network(network.mtu, network.subnets, network.source)
            return _by_version(requested) == _by_version(network)
        except InvalidRequest:  # the gateway is in none of its subnets
            return False

    @classmethod
    def of(cls, network: Network) -> "NetworkRequest":
        """Return what requests the same network again."""
        subnets, gateways = list(map(str, network.subnets)), list(map(str, network.gateways))
        policy = network.masquerade, network.icc, network.internal, network.mtu
        return cls(network.name, subnets, gateways, network.bridge, *policy)


def _by_version(network: Network) -> Network:
    """Return a network with its subnets, each with its gateway, in the order of their IP versions."""
    pairs = sorted(zip(network.subnets, network.gateways, strict=True), key=lambda pair: pair[0].version)
    subnets, gateways = zip(*pairs, strict=True)
    return replace(network, subnets=subnets, gateways=gateways)


class CreateNetworkRequest(NetworkRequest, forbid_unknown_fields=True):
    if_not_exists: bool = False  # one that is as requested is no error


class AttachRequest(msgspec.Struct, forbid_unknown_fields=True):
    container: str  # A name of ip-netns(8), a path, or pid:PID
    network: str = ""  # empty: `gangway0`, which is created on demand
    addresses: list[str] = []
    """One for each subnet of the network at most; in the others the container gets a free one."""
    namespace: str = ""  # the path of its network namespace, if `container` is a name of the client's choice
    owner: Annotated[int, msgspec.Meta(ge=1, le=_MAX_INT)] | None = None
    """The pid of a process at whose end the container is detached."""
    if_not_exists: bool = False  # it is no error if the container is attached so


class UnpublishRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Unpublish ports, each written as after `-p`; without any, all of the container's."""

    container: str = ""
    ports: list[str] = []
    all: bool = False  # of all containers, instead
    if_exists: bool = False  # a port that is not published is no error


class PublishRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Publish ports; each is written as after `-p`."""

    container: str
    ports: list[str] = []
    admitted: list[str] = msgspec.field(default=[], name="from")
    """The subnets of the clients that may connect, besides the host itself; empty: everybody."""
    if_not_exists: bool = False  # a port that is published so is no error
    keep: bool = False  # also after a reboot: as soon as the container is there again


class ApplyRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Declare what a file says, in place of what the file of that name has declared before."""

    name: str  # of the file in the folder conf.d
    text: str  # TOML: tables [[network]] and [[publish]]
    dry_run: bool = False  # only answer what would be done


class ApplyAnswer(msgspec.Struct):
    changes: list[str]  # `+ publish box: 8000:80` or `- network web`, in this order
    notes: list[str]  # what has to wait, or cannot be as it is declared


class NetworkAnswer(msgspec.Struct):
    name: str
    bridge: str
    subnets: list[str]
    gateways: list[str]
    masquerade: bool
    icc: bool
    internal: bool
    mtu: int
    routed: list[int]
    """IP versions in which clients connect to the containers' own addresses."""
    endpoints: list["EndpointAnswer"]

    @classmethod
    def of(cls, network: Network, endpoints: tuple[Endpoint, ...]) -> "NetworkAnswer":
        policy = network.masquerade, network.icc, network.internal, network.mtu, sorted(network.routed)
        subnets, gateways = list(map(str, network.subnets)), list(map(str, network.gateways))
        attached = [EndpointAnswer.of(endpoint) for endpoint in endpoints]
        return cls(network.name, network.bridge, subnets, gateways, *policy, attached)


class EndpointAnswer(msgspec.Struct):
    container: str
    network: str
    addresses: list[str]
    is_first: bool = True  # the network has the container's default route and its published ports
    note: str = ""  # what may surprise about the container; filled in when it is attached

    @classmethod
    def of(cls, endpoint: Endpoint, note: str = "") -> "EndpointAnswer":
        addresses = list(map(str, endpoint.addresses))
        return cls(endpoint.container, endpoint.network, addresses, endpoint.is_first, note)


class RouteAnswer(msgspec.Struct):
    """The road of one kind of client, and the reason."""

    origin: str
    neighbour: bool  # the client is a container of the same network
    road: str
    code: str
    fact: str
    seen_as: str  # whose address the container sees: `client`, `gateway`, or `nobody`
    rules: list[str] = []  # the rules that match its first packet; filled in by `explain` only

    @classmethod
    def of(cls, route: Route, rules: tuple[str, ...] = ()) -> "RouteAnswer":
        code, fact = route.reason.code, route.reason.fact
        return cls(route.origin, route.neighbour, route.road, code, fact, route.seen_as, list(rules))


_NOT_RELAYED = Counters()


class MappingAnswer(msgspec.Struct):
    """A mapping, and the road of each kind of client."""

    container: str  # for a lease `docker:NAME`, or empty if the name is not known
    source: str  # the front that requested it: `api`, `declared`, `docker`, or `lease` for a docker-proxy launcher
    protocol: str
    host_address: str
    host_ports: str  # empty: any, which is chosen when it is published
    container_address: str
    container_ports: str
    routes: list[RouteAnswer]
    redirected: int
    """How many sockets were redirected to it: connections, and peers of sockets that are not connected."""
    relayed: dict[str, int]
    """What the relay has counted since it serves the ports: `connections` (of UDP, clients), those of them that are
    `active` now, `up_bytes` (to the container) and `down_bytes`; the others are what went wrong."""
    admitted: list[str] = msgspec.field(default=[], name="from")
    """The subnets of the clients that may connect, besides the host itself; empty: everybody."""
    note: str = ""
    """Why it is not published now; empty if it is."""

    @classmethod
    def waiting(cls, container: str, request: PortRequest, note: str) -> list["MappingAnswer"]:
        """Return a mapping for each address of a request, which is not published now, and so has no roads."""
        of = container, request.source, request.protocol
        ports = str(request.host_ports or ""), "", str(request.container_ports)
        rest = _NOT_RELAYED._asdict(), list(map(str, request.admitted)), note
        return [cls(*of, str(address), *ports, [], 0, *rest) for address in request.host_addresses]

    @classmethod
    def of(
        cls,
        planned: MappingPlan,
        redirected: int = 0,
        relayed: Counters = _NOT_RELAYED,
        routes: list[RouteAnswer] | None = None,
    ) -> "MappingAnswer":
        mapping = planned.mapping
        host = str(mapping.host_address), str(mapping.host_ports)
        target = str(planned.container_address), str(mapping.container_ports)
        if routes is None:
            routes = [RouteAnswer.of(route) for route in planned.routes]
        kind, admitted = (mapping.source, mapping.protocol), list(map(str, mapping.admitted))
        return cls(mapping.container, *kind, *host, *target, routes, redirected, relayed._asdict(), admitted)


class ExplainAnswer(msgspec.Struct):
    """How clients of a host address and port reach the container."""

    host_address: str
    host_port: int
    firewall: str
    network: str  # empty for a lease
    gateways: list[str]  # the network's; empty for a lease
    mapping: MappingAnswer
    further_networks: list[str] = []  # the container's; it sees their clients as the gateway, as its own network's


class ReloadAnswer(msgspec.Struct):
    """What was noticed when the settings and the files of conf.d were read again."""

    warnings: list[str]  # about settings, which are in force
    problems: list[str]  # in conf.d: what is wrong or cannot be served


class CheckAnswer(msgspec.Struct):
    """A condition that a road depends on: whether it holds on this host; if not, why, and the consequence."""

    check: str
    holds: bool
    note: str = ""


class DockerRequest(msgspec.Struct, forbid_unknown_fields=True):
    config_file: str = ""  # dockerd's settings, an absolute path; empty: those of the dockerd that runs, or the usual


class DockerCleanupRequest(msgspec.Struct, forbid_unknown_fields=True):
    forward_accept: bool = False  # also set the policy of FORWARD to ACCEPT, unless another program relies on it


class DockerReport(msgspec.Struct):
    """Whether Docker's ports are gangway's."""

    checks: list[CheckAnswer]
    advice: list[str]  # what to do about those that do not hold, line by line


class DockerChange(msgspec.Struct):
    done: list[str]
    advice: list[str]  # what has to follow


class StatusAnswer(msgspec.Struct):
    """The daemon and its relay: versions, processes, and how much they manage."""

    version: str
    pid: int
    started: float  # Unix time, in seconds
    is_service: bool  # a service manager has started the daemon
    on_demand: bool  # a command or a launcher has
    folder: str  # of its network namespace
    socket: str  # of the API
    relay_version: str  # empty: unknown, or no relay runs
    relay_pid: int | None
    networks: int
    containers: int
    mappings: int
    leases: int  # ports of docker-proxy launchers


class DownAnswer(msgspec.Struct):
    """What is removed with the daemon, or was, line by line."""

    removed: list[str]
    advice: list[str]
    """What stays or comes again, and what to do about it."""


class SettingAnswer(msgspec.Struct):
    """A setting of the daemon that is in force."""

    name: str  # `ip-forward`, `relay.workers`
    value: bool | int | float | str | list[str]
    source: str  # `default`, `FILE:LINE`, `FILE`, `environment VARIABLE` or `option`
    note: str = ""  # another value that takes effect later, and when


class VersionAnswer(msgspec.Struct):
    """The version of gangway that the daemon belongs to, which is also the API's, and that of its relay."""

    version: str
    relay_version: str  # empty: unknown, or no relay runs


class HealthAnswer(msgspec.Struct):
    """Whether everything that is wanted is applied, as far as the daemon knows."""

    is_healthy: bool
    reasons: list[str]  # why it is not; tried again without a request


class EventAnswer(msgspec.Struct):
    """An event of the daemon's log.  It has further fields, which depend on its name."""

    time: str  # RFC 3339
    level: str  # `debug`, `info`, `warning` or `error`
    event: str  # its name
    message: str


class ErrorAnswer(msgspec.Struct):
    """An error: its kind, and one line that explains it."""

    kind: str
    error: str


def origin(text: str) -> Origin:
    """Return the origin that is called `text`.  InvalidRequest: there is none."""
    try:
        return Origin(text)
    except ValueError:
        raise InvalidRequest(f"unknown origin {text!r}: {', '.join(Origin)}") from None
