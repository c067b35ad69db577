"""Decides: by which road each kind of client gets to a container's port, and why.

What this file knows: networks, endpoints, mappings, and the facts about the host that a decision depends on.  What it
must not know: how those facts are found, what a rule looks like.

How it works.  `plan(wanted, facts)` gives the Plan that the hands carry out and that `ls` and `explain` print.  Each
mapping is decided by itself (`plan_mapping`), so one more costs the same however many there are; by which roads depends
on neither its ports nor its container, so most mappings are decided like others before.  A mapping has one host
address, hence clients of one family: 0.0.0.0 is IPv4's, `::` is IPv6's.

    is it published where the client asks?      no: blocked
    loopback                                    redirect, if the host can; else relay, as the kernel does not route it
    no firewall, host's own process and address the same
    the container has no address of the family  nothing can translate between them: relay
    no firewall                                 relay
    the host's own process, own address         nat, in OUTPUT; nothing is forwarded
    whoever comes by an interface               nat, in PREROUTING, if the kernel forwards and nobody else drops it

What comes from the container's own network is masqueraded besides: the container would answer a neighbour directly,
from an address that the neighbour has not asked.

Link-local addresses are an exception within an origin: the kernel forwards nothing that comes from one (RFC 4291,
2.5.6), so who asks fe80::… is served by the relay, though the mapping be of `::`; the rules leave them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from gangway.model import Address, Endpoint, Network, PortMapping, Protocol, Source, lease_endpoint


class Firewall(StrEnum):
    """Who writes the rules."""

    NFTABLES = "nftables"
    IPTABLES = "iptables"
    NONE = "none"


class Origin(StrEnum):
    """Who opens the connection."""

    LOOPBACK = "loopback"
    HOST = "host"
    REMOTE = "remote"
    CONTAINER = "container"


class Road(StrEnum):
    """How it gets to the container."""

    NAT = "nat"
    REDIRECT = "redirect"
    RELAY = "relay"
    BLOCKED = "blocked"


class Code(StrEnum):
    """Why a road was chosen; what fact goes with it stands beside each."""

    TRANSLATED = "translated"
    """A rule translates the destination.  Fact: the container's address and ports."""
    MASQUERADED = "masqueraded"
    """As above, and the source becomes the gateway's.  Fact: the same."""
    REDIRECTED = "redirected"
    """The destination of a socket is exchanged when it connects or sends.  Fact: the container's address and ports."""
    REDIRECTED_AS_IPV4 = "redirected_as_ipv4"
    """The same, of an IPv6 socket, to a container that has IPv4 only.  Fact: the same."""
    LOOPBACK = "loopback"
    """The kernel does not route loopback addresses, and redirects no socket of the protocol.  Fact: the addresses."""
    NO_REDIRECT = "no_redirect"
    """The kernel does not route loopback addresses, and there is no redirect.  Fact: why not."""
    LINK_LOCAL = "link_local"
    """The kernel forwards nothing from a link-local address.  Fact: the host address."""
    FAMILY = "family"
    """The container has no address of the client's family.  Fact: its address."""
    NO_FIREWALL = "no_firewall"
    """The daemon writes no rules.  Fact: empty."""
    NOT_FORWARDED = "not_forwarded"
    """The kernel does not forward.  Fact: the setting that says so."""
    FORWARD_DROPPED = "forward_dropped"
    """Somebody else drops what is forwarded.  Fact: whose chain."""
    OWN_BRIDGE = "own_bridge"
    """Docker's layout translates nothing that comes from the container's own bridge.  Fact: the bridge."""
    LOOPBACK_ONLY = "loopback_only"
    """Published on a loopback address.  Fact: that address."""
    ELSEWHERE = "elsewhere"
    """Published on another address than the client asks.  Fact: that address."""
    ISOLATED = "isolated"
    """The bridge keeps its containers apart, and nothing is translated within it.  Fact: the bridge."""
    NO_SOCKETS = "no_sockets"
    """The kernel has no sockets of the protocol, so there is no relay.  Fact: the protocol."""
    LEASE = "lease"
    """Docker's own rules may carry it first; what they leave is relayed.  Fact: empty."""


_TARGETS = frozenset({Code.TRANSLATED, Code.MASQUERADED, Code.REDIRECTED, Code.REDIRECTED_AS_IPV4})
# Those whose fact is the container's address, with its ports or without.
_CONTAINERS = _TARGETS | {Code.FAMILY}


@dataclass(frozen=True)
class Reason:
    """Why, for machines; `cli.views` has the sentences."""

    code: Code
    fact: str = ""


class SeenAs(StrEnum):
    """Whose address the container sees as its client's."""

    CLIENT = "client"
    GATEWAY = "gateway"
    NOBODY = "nobody"


@dataclass(frozen=True)
class Route:
    """The road of one kind of client.  `neighbour`: it is a container of the same network, perhaps the very same."""

    origin: Origin
    neighbour: bool
    road: Road
    reason: Reason
    seen_as: SeenAs


@dataclass(frozen=True)
class HostFacts:
    """What a decision depends on.  Families are 4 and 6."""

    firewall: Firewall
    forwarding: frozenset[int] = frozenset({4, 6})
    """Families that the kernel forwards."""
    may_forward: bool = True
    """Whether the daemon may switch forwarding on."""
    switched_on: frozenset[int] = frozenset()
    """Families that the kernel forwards because the daemon switched it on."""
    forward_droppers: tuple[tuple[int, str], ...] = ()
    """Who else drops what is forwarded: family, and whose chain."""
    own_bridge: bool = True
    """The rules translate also what comes from the container's own bridge."""
    bridge_filtered: frozenset[int] = frozenset()
    """Families of which the kernel shows bridged frames to the firewall (br_netfilter)."""
    foreign_bridges: tuple[str, ...] = ()
    """Other programs' bridges whose frames the firewall sees."""
    missing: frozenset[Protocol] = frozenset()
    """Protocols that the kernel has no sockets of."""
    no_redirect: str = ""
    """Why sockets cannot be redirected; empty: they can."""
    no_steering: str = ""
    """Why one socket cannot serve many ports; empty: it can."""

    def dropper(self, family: int) -> str | None:
        """Who else drops what is forwarded, if anybody does."""
        return next((who for version, who in self.forward_droppers if version == family), None)


@dataclass(frozen=True)
class Wanted:
    """All that has been asked for and not been taken back."""

    networks: tuple[Network, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    mappings: tuple[PortMapping, ...] = ()


@dataclass(frozen=True)
class NetworkPlan:
    """A network as it is to be."""

    network: Network
    isolate_ports: bool
    """The bridge itself keeps containers from each other; else rules do, or nobody is to."""
    untranslated: frozenset[int] = frozenset()
    """Families in which nothing is translated that comes from the bridge: the relay serves its containers."""


@dataclass(frozen=True)
class Roads:
    """What is decided about all mappings that differ in no more than their ports and their container."""

    routes: tuple[Route, ...]
    """Of each kind of client; a fact that is the container's address or ports is left out."""
    is_nat: bool = field(init=False)
    is_redirected: bool = field(init=False)
    is_relayed: bool = field(init=False)

    def __post_init__(self) -> None:
        roads = {route.road for route in self.routes}
        object.__setattr__(self, "is_nat", Road.NAT in roads)
        object.__setattr__(self, "is_redirected", Road.REDIRECT in roads)
        object.__setattr__(self, "is_relayed", Road.RELAY in roads)


@dataclass(frozen=True)
class MappingPlan:
    """A mapping, where it leads, and the road of each kind of client."""

    mapping: PortMapping
    bridge: str
    container_address: Address
    roads: Roads
    is_steered: bool
    """The relay serves it by a socket that it has for all ports; else by one for each port."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """The road of each kind of client, and why."""
        address = str(self.container_address)
        facts = {True: f"{address} port {self.mapping.container_ports}", False: address}
        return tuple(
            Route(route.origin, route.neighbour, route.road, Reason(code, facts[code in _TARGETS]), route.seen_as)
            if (code := route.reason.code) in _CONTAINERS
            else route
            for route in self.roads.routes
        )

    @property
    def is_nat(self) -> bool:
        """Rules translate it, for some client at least."""
        return self.roads.is_nat

    @property
    def is_redirected(self) -> bool:
        """Sockets are redirected to it, for some client at least."""
        return self.roads.is_redirected

    @property
    def is_relayed(self) -> bool:
        """The relay carries it, for some client at least."""
        return self.roads.is_relayed

    @property
    def family(self) -> int:
        """4 or 6: that of the clients."""
        return self.mapping.host_address.version


@dataclass(frozen=True)
class Plan:
    """What is to be; see the head of this file."""

    facts: HostFacts
    networks: tuple[NetworkPlan, ...]
    endpoints: tuple[Endpoint, ...]
    mappings: tuple[MappingPlan, ...]
    forwarding: frozenset[int]
    """Families that have to be forwarded; not all of them may be yet."""

    @property
    def closed(self) -> frozenset[int]:
        """Families in which what nobody allowed is not forwarded: those that nobody forwarded before us."""
        return self.facts.switched_on | (self.forwarding - self.facts.forwarding)

    @property
    def routed(self) -> frozenset[int]:
        """Families in which what comes by an interface is translated."""
        return frozenset(family for family in (4, 6) if not_routed(self.facts, family) is None)


def plan(wanted: Wanted, facts: HostFacts) -> Plan:
    """Decide everything.  Each mapping's container must have an endpoint, unless the mapping is a lease."""
    networks = {network.name: network for network in wanted.networks}
    endpoints = {endpoint.container: endpoint for endpoint in wanted.endpoints}

    def decided(mapping: PortMapping) -> MappingPlan:
        if mapping.source is Source.LEASE:
            return plan_mapping(mapping, lease_endpoint(mapping), None, facts)
        endpoint = endpoints[mapping.container]
        return plan_mapping(mapping, endpoint, networks[endpoint.network], facts)

    return assemble(wanted.networks, wanted.endpoints, tuple(map(decided, wanted.mappings)), facts)


def assemble(
    networks: tuple[Network, ...],
    endpoints: tuple[Endpoint, ...],
    mappings: tuple[MappingPlan, ...],
    facts: HostFacts,
) -> Plan:
    """A Plan of mappings that have been decided, by the same facts."""
    families = {subnet.version for network in networks for subnet in network.subnets if not network.internal}
    needs_forwarding = facts.firewall is not Firewall.NONE and facts.may_forward
    return Plan(
        facts=facts,
        networks=tuple(plan_network(network, facts) for network in networks),
        endpoints=endpoints,
        mappings=mappings,
        forwarding=frozenset(families) if needs_forwarding else frozenset(),
    )


def plan_network(network: Network, facts: HostFacts) -> NetworkPlan:
    """How containers are kept from each other, if they are to be.

    Where the firewall sees bridged frames it must do it: an isolated bridge port would keep back also what a rule
    has translated there and then (br_netfilter hands such a frame on within the bridge).  If it sees one family and
    not the other, the bridge keeps apart, and in the family that is seen nothing is translated that comes from it.
    """
    seen = facts.bridge_filtered if facts.firewall is not Firewall.NONE else frozenset()
    unseen = {subnet.version for subnet in network.subnets} - seen
    isolate = not network.icc and bool(unseen)
    return NetworkPlan(network, isolate_ports=isolate, untranslated=seen if isolate else frozenset())


def plan_mapping(mapping: PortMapping, endpoint: Endpoint, network: Network | None, facts: HostFacts) -> MappingPlan:
    """Decide one mapping.  A lease has no network: `endpoint` is its `lease_endpoint`, `network` is None."""
    assert (network is None) == (mapping.source is Source.LEASE)
    address = endpoint.address_for(mapping.host_address)
    roads = _roads(_Kind(mapping.protocol, mapping.host_address, address.version), network, facts)
    bridge = "" if network is None else network.bridge
    return MappingPlan(mapping, bridge, address, roads, _is_steered(mapping, facts))


def not_routed(facts: HostFacts, family: int) -> Reason | None:
    """Why nothing is translated for clients that come by an interface; None if it is."""
    if facts.firewall is Firewall.NONE:
        return Reason(Code.NO_FIREWALL)
    if not (facts.may_forward or family in facts.forwarding):
        return Reason(Code.NOT_FORWARDED, FORWARDING_SETTING[family])
    dropper = facts.dropper(family)
    return None if dropper is None else Reason(Code.FORWARD_DROPPED, dropper)


FORWARDING_SETTING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


def asked_at(planned: MappingPlan, host_address: Address) -> Iterator[Route]:
    """The routes of clients that ask `host_address` of a mapping that includes it: `LINK_LOCAL` takes effect here."""
    for route in planned.routes:
        if route.road in (Road.NAT, Road.REDIRECT) and _is_link_local(host_address):
            yield _by_relay(route.origin, route.neighbour, Reason(Code.LINK_LOCAL, str(host_address)))
        else:
            yield route


def origins_of(host_address: Address) -> tuple[Origin, ...]:
    """Who can ask `host_address`: a loopback address only loopback, any other only the rest."""
    return tuple(origin for origin in Origin if host_address.is_loopback == (origin is Origin.LOOPBACK))


class _Kind(NamedTuple):
    """What a decision depends on of a mapping."""

    protocol: Protocol
    at: Address
    """The host address."""
    family: int
    """That of the container's address."""


@lru_cache(1024)
def _roads(kind: _Kind, network: Network | None, facts: HostFacts) -> Roads:
    """Mappings are many, their kinds are few: each is decided once.  Without a network it is a lease."""
    clients = [(origin, False) for origin in Origin] + [(Origin.CONTAINER, True)]
    return Roads(tuple(_route(origin, near, kind, network, facts) for origin, near in clients))


def _route(origin: Origin, neighbour: bool, kind: _Kind, network: Network | None, facts: HostFacts) -> Route:
    blocked = _blocked(origin, kind.at)
    if blocked is not None:
        return Route(origin, neighbour, Road.BLOCKED, blocked, SeenAs.NOBODY)
    if _is_redirected(origin, kind, network, facts):
        mapped = kind.family != kind.at.version
        reason = Reason(Code.REDIRECTED_AS_IPV4 if mapped else Code.REDIRECTED)
        return Route(origin, neighbour, Road.REDIRECT, reason, SeenAs.GATEWAY)
    relayed = _relayed(origin, neighbour, kind, network, facts)
    if relayed is None:
        if neighbour:
            return Route(origin, neighbour, Road.NAT, Reason(Code.MASQUERADED), SeenAs.GATEWAY)
        return Route(origin, neighbour, Road.NAT, Reason(Code.TRANSLATED), SeenAs.CLIENT)
    if kind.protocol in facts.missing:
        return Route(origin, neighbour, Road.BLOCKED, Reason(Code.NO_SOCKETS, kind.protocol.value), SeenAs.NOBODY)
    return _by_relay(origin, neighbour, relayed)


def _by_relay(origin: Origin, neighbour: bool, reason: Reason) -> Route:
    return Route(origin, neighbour, Road.RELAY, reason, SeenAs.GATEWAY)


def _blocked(origin: Origin, at: Address) -> Reason | None:
    """Why a client finds nothing published where it asks."""
    if at.is_loopback and origin is not Origin.LOOPBACK:
        return Reason(Code.LOOPBACK_ONLY, str(at))
    if origin is Origin.LOOPBACK and not (at.is_loopback or at.is_unspecified):
        return Reason(Code.ELSEWHERE, str(at))
    return None


def _is_redirected(origin: Origin, kind: _Kind, network: Network | None, facts: HostFacts) -> bool:
    """True if a host process's socket can be aimed at the container.

    An IPv6 socket can be connected to an IPv4 address, but not the other way round.  Where a rule can serve the host's
    own address it does, so that the container sees that address; for a lease that rule is Docker's.
    """
    has_no_rule = network is not None and facts.firewall is Firewall.NONE
    unruled = origin is Origin.HOST and has_no_rule and not _is_link_local(kind.at)
    return (
        (origin is Origin.LOOPBACK or unruled)
        and not facts.no_redirect
        and kind.protocol is not Protocol.SCTP  # its sockets run no program when they connect
        and kind.family <= kind.at.version
    )


def _unredirected(kind: _Kind, facts: HostFacts) -> Reason:
    """Why who asks a loopback address is relayed."""
    if kind.at.version < kind.family:
        return Reason(Code.FAMILY)
    if kind.protocol is Protocol.SCTP:
        return Reason(Code.LOOPBACK, "127.0.0.0/8" if kind.at.version == 4 else "::1")
    return Reason(Code.NO_REDIRECT, facts.no_redirect)


def _is_steered(mapping: PortMapping, facts: HostFacts) -> bool:
    """Whether a socket that serves others too can serve it.

    What the kernel steers it knows by protocol, address and port, and it steers no broadcast: one port of UDP, which
    may be there for that, has a socket of its own.
    """
    return (
        not facts.no_steering
        and mapping.source is not Source.LEASE
        and mapping.protocol is not Protocol.SCTP
        and not _is_link_local(mapping.host_address)  # its port is another's on another interface
        and (mapping.protocol is Protocol.TCP or mapping.host_ports.count > 1)
    )


def _is_link_local(address: Address) -> bool:
    """IPv6's, from which nothing is forwarded."""
    return address.version == 6 and address.is_link_local


def _relayed(origin: Origin, neighbour: bool, kind: _Kind, network: Network | None, facts: HostFacts) -> Reason | None:
    """Why no rule can serve a client; None if one can."""
    at = kind.at
    if origin is Origin.LOOPBACK:
        return _unredirected(kind, facts)
    if network is None:
        return Reason(Code.LINK_LOCAL, str(at)) if _is_link_local(at) else Reason(Code.LEASE)
    if facts.firewall is Firewall.NONE:
        return Reason(Code.NO_FIREWALL)
    if kind.family != at.version:
        return Reason(Code.FAMILY)
    if _is_link_local(at):
        return Reason(Code.LINK_LOCAL, str(at))
    if origin is Origin.HOST:
        return None
    if neighbour and not facts.own_bridge:
        return Reason(Code.OWN_BRIDGE, network.bridge)
    if at.version in plan_network(network, facts).untranslated:
        # What comes from this bridge is not translated; of containers elsewhere nothing is known here.
        return Reason(Code.ISOLATED, network.bridge) if neighbour else not_routed(facts, at.version)
    return not_routed(facts, at.version)
