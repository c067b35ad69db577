"""Decides which road each kind of client takes to a container's port, and why.

What this file knows: networks, endpoints, mappings, and the facts about the host that a decision depends on.  What it
must not know: how those facts are found, what a rule looks like.

`plan(wanted, facts)` returns the Plan that the executor applies and that `ls` and `explain` print.  Each mapping is
decided alone (`plan_mapping`), so adding one costs the same however many there are.  Its roads depend neither on its
ports nor on its container, so most mappings share the roads of an earlier one.  A mapping has one host address, hence
clients of one family: 0.0.0.0 is IPv4's, `::` is IPv6's.

    not published where the client connects     blocked
    loopback                                    redirect, if the host can; else relay: the kernel does not route it
    lease                                       relay: Docker writes the rules, and the relay serves what they leave
    no firewall, host's own process and address redirect or relay, as for loopback
    container has no address of the family      relay: no rule translates between families
    no firewall                                 relay
    the host's own process and address          nat, in OUTPUT; nothing is forwarded
    a client that comes in by an interface      nat, in PREROUTING, if the kernel forwards and no other program drops it

Connections from the container's own network are masqueraded as well: otherwise the container would answer its neighbour
directly, from an address that the neighbour did not connect to.

Link-local addresses are an exception within an origin: the kernel forwards nothing that comes from one (RFC 4291,
2.5.6).  So the relay serves clients of fe80::…, even for a mapping of `::`; the rules leave them out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from gangway.model import Address, Endpoint, Network, PortMapping, Protocol, Source, lease_endpoint
from gangway.roads import Code, Firewall, HostFacts, Origin, Reason, Road, Route, SeenAs

# The terms of a decision are part of it: imported from here, too.
__all__ = ["Code", "Firewall", "HostFacts", "Origin", "Reason", "Road", "Route", "SeenAs"]


_TARGETS = frozenset({Code.TRANSLATED, Code.MASQUERADED, Code.REDIRECTED, Code.REDIRECTED_AS_IPV4})
# Reasons whose fact is the container's address, with or without its ports.
_CONTAINERS = _TARGETS | {Code.FAMILY}


@dataclass(frozen=True)
class Wanted:
    """Everything that clients have requested, and not removed since."""

    networks: tuple[Network, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    mappings: tuple[PortMapping, ...] = ()


@dataclass(frozen=True)
class NetworkPlan:
    """A network, and how its containers are isolated."""

    network: Network
    isolate_ports: bool
    """True if the bridge isolates the containers; else rules do, or they are not isolated."""
    untranslated: frozenset[int] = frozenset()
    """Families in which connections from the bridge are not translated: the relay serves its containers."""


@dataclass(frozen=True)
class Roads:
    """The decision about all mappings that differ only in their ports and their container."""

    routes: tuple[Route, ...]
    """One for each kind of client.  A fact that is the container's address or ports is left empty."""
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
    """A mapping, the container address that it leads to, and the road of each kind of client."""

    mapping: PortMapping
    bridge: str
    """Empty for a lease."""
    container_address: Address
    roads: Roads
    is_steered: bool
    """True if the relay serves it with a socket shared by all ports; else with one socket for each port."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """The road of each kind of client, and the reason with its fact."""
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
        """True if rules translate connections of at least one kind of client."""
        return self.roads.is_nat

    @property
    def is_redirected(self) -> bool:
        """True if sockets of at least one kind of client are redirected."""
        return self.roads.is_redirected

    @property
    def is_relayed(self) -> bool:
        """True if the relay carries connections of at least one kind of client."""
        return self.roads.is_relayed

    @property
    def family(self) -> int:
        """The clients' family: 4 or 6."""
        return self.mapping.host_address.version


@dataclass(frozen=True)
class Plan:
    """All decisions, and the facts that they rest on."""

    facts: HostFacts
    networks: tuple[NetworkPlan, ...]
    endpoints: tuple[Endpoint, ...]
    mappings: tuple[MappingPlan, ...]
    forwarding: frozenset[int]
    """Families that have to be forwarded; some may not be yet."""

    @property
    def closed(self) -> frozenset[int]:
        """Families that nothing forwarded before gangway: there, only what gangway allows is forwarded."""
        return self.facts.switched_on | (self.forwarding - self.facts.forwarding)

    @property
    def routed(self) -> frozenset[int]:
        """Families in which connections that come in by an interface are translated."""
        return frozenset(family for family in (4, 6) if why_not_routed(self.facts, family) is None)


def plan(wanted: Wanted, facts: HostFacts) -> Plan:
    """Decide everything.  Each mapping's container must have an endpoint, unless the mapping is a lease."""
    networks = {network.name: network for network in wanted.networks}
    endpoints = {endpoint.container: endpoint for endpoint in wanted.endpoints}

    def decide(mapping: PortMapping) -> MappingPlan:
        if mapping.source is Source.LEASE:
            return plan_mapping(mapping, lease_endpoint(mapping), None, facts)
        endpoint = endpoints[mapping.container]
        return plan_mapping(mapping, endpoint, networks[endpoint.network], facts)

    return assemble(wanted.networks, wanted.endpoints, tuple(map(decide, wanted.mappings)), facts)


def assemble(
    networks: tuple[Network, ...],
    endpoints: tuple[Endpoint, ...],
    mappings: tuple[MappingPlan, ...],
    facts: HostFacts,
) -> Plan:
    """Return the Plan of mappings that have been decided already, by the same facts."""
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
    """Decide whether rules or the bridge isolate the containers of a network, if they have to be isolated.

    Where the firewall sees bridged frames, rules have to: an isolated bridge port would also stop frames that a rule
    has just translated (br_netfilter passes such a frame on within the bridge).  If it sees one family only, the bridge
    isolates, and in the visible family connections from that bridge are not translated.
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


def why_not_routed(facts: HostFacts, family: int) -> Reason | None:
    """Return why connections that come in by an interface are not translated; None if they are."""
    if facts.firewall is Firewall.NONE:
        return Reason(Code.NO_FIREWALL)
    if not (facts.may_forward or family in facts.forwarding):
        return Reason(Code.NOT_FORWARDED, FORWARDING_SETTING[family])
    dropper = facts.dropper(family)
    return None if dropper is None else Reason(Code.FORWARD_DROPPED, dropper)


FORWARDING_SETTING = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


def routes_at(planned: MappingPlan, host_address: Address) -> Iterator[Route]:
    """Yield the routes of clients that connect to `host_address`, one of the mapping's: where it is link-local, nat and
    redirect become relay."""
    for route in planned.routes:
        if route.road in (Road.NAT, Road.REDIRECT) and _is_link_local(host_address):
            yield _by_relay(route.origin, route.neighbour, Reason(Code.LINK_LOCAL, str(host_address)))
        else:
            yield route


def origins_reaching(host_address: Address) -> tuple[Origin, ...]:
    """Return the origins that connect to `host_address`: loopback to loopback addresses, the others to the rest."""
    return tuple(origin for origin in Origin if host_address.is_loopback == (origin is Origin.LOOPBACK))


class _Kind(NamedTuple):
    """The part of a mapping that its roads depend on."""

    protocol: Protocol
    at: Address
    """The host address."""
    family: int
    """The family of the container's address."""


@lru_cache(1024)
def _roads(kind: _Kind, network: Network | None, facts: HostFacts) -> Roads:
    """Decide each kind of mapping once: there are many mappings, but few kinds.  Without a network it is a lease."""
    clients = [(origin, False) for origin in Origin] + [(Origin.CONTAINER, True)]
    return Roads(tuple(_route(origin, near, kind, network, facts) for origin, near in clients))


def _route(origin: Origin, neighbour: bool, kind: _Kind, network: Network | None, facts: HostFacts) -> Route:
    blocked = _why_blocked(origin, kind.at)
    if blocked is not None:
        return Route(origin, neighbour, Road.BLOCKED, blocked, SeenAs.NOBODY)
    if _is_redirected(origin, kind, network, facts):
        mapped = kind.family != kind.at.version
        reason = Reason(Code.REDIRECTED_AS_IPV4 if mapped else Code.REDIRECTED)
        return Route(origin, neighbour, Road.REDIRECT, reason, SeenAs.GATEWAY)
    relayed = _why_relayed(origin, neighbour, kind, network, facts)
    if relayed is None:
        if neighbour:
            return Route(origin, neighbour, Road.NAT, Reason(Code.MASQUERADED), SeenAs.GATEWAY)
        return Route(origin, neighbour, Road.NAT, Reason(Code.TRANSLATED), SeenAs.CLIENT)
    if kind.protocol in facts.missing_protocols:
        return Route(origin, neighbour, Road.BLOCKED, Reason(Code.NO_SOCKETS, kind.protocol.value), SeenAs.NOBODY)
    return _by_relay(origin, neighbour, relayed)


def _by_relay(origin: Origin, neighbour: bool, reason: Reason) -> Route:
    return Route(origin, neighbour, Road.RELAY, reason, SeenAs.GATEWAY)


def _why_blocked(origin: Origin, at: Address) -> Reason | None:
    """Return why nothing is published at the addresses that this origin connects to; None if something is."""
    if at.is_loopback and origin is not Origin.LOOPBACK:
        return Reason(Code.LOOPBACK_ONLY, str(at))
    if origin is Origin.LOOPBACK and not (at.is_loopback or at.is_unspecified):
        return Reason(Code.ELSEWHERE, str(at))
    return None


def _is_redirected(origin: Origin, kind: _Kind, network: Network | None, facts: HostFacts) -> bool:
    """True if the sockets of host processes are redirected to the container.

    An IPv6 socket can be connected to an IPv4 address, but not the other way round.  Where a rule can serve the host's
    own address it does, so that the container sees that address; for a lease that rule is Docker's.
    """
    has_no_rule = network is not None and facts.firewall is Firewall.NONE and not _is_link_local(kind.at)
    return (
        (origin is Origin.LOOPBACK or (origin is Origin.HOST and has_no_rule))
        and not facts.no_redirect
        and kind.protocol is not Protocol.SCTP  # its sockets run no program when they connect
        and kind.family <= kind.at.version
    )


def _why_loopback_is_relayed(kind: _Kind, facts: HostFacts) -> Reason:
    """Return why clients of a loopback address are not redirected."""
    if kind.at.version < kind.family:
        return Reason(Code.FAMILY)
    if kind.protocol is Protocol.SCTP:
        return Reason(Code.LOOPBACK, "127.0.0.0/8" if kind.at.version == 4 else "::1")
    return Reason(Code.NO_REDIRECT, facts.no_redirect)


def _is_steered(mapping: PortMapping, facts: HostFacts) -> bool:
    """True if a socket that many ports share can serve the mapping.

    The kernel steers by protocol, address and port, and it steers no broadcasts: a single UDP port, which may be
    published for them, has a socket of its own.  So has a lease, whose launcher owns it.
    """
    return (
        not facts.no_steering
        and mapping.source is not Source.LEASE
        and mapping.protocol is not Protocol.SCTP
        # On another interface, the same link-local address and port may be another mapping's.
        and not _is_link_local(mapping.host_address)
        and (mapping.protocol is Protocol.TCP or mapping.host_ports.count > 1)
    )


def _is_link_local(address: Address) -> bool:
    """True for IPv6's link-local addresses; the kernel does forward IPv4's."""
    return address.version == 6 and address.is_link_local


def _why_relayed(
    origin: Origin, neighbour: bool, kind: _Kind, network: Network | None, facts: HostFacts
) -> Reason | None:
    """Return why no rule can serve a client; None if one can."""
    at = kind.at
    if origin is Origin.LOOPBACK:
        return _why_loopback_is_relayed(kind, facts)
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
        # Connections from this bridge are not translated; which bridge other containers are on is not known here.
        return Reason(Code.ISOLATED, network.bridge) if neighbour else why_not_routed(facts, at.version)
    return why_not_routed(facts, at.version)
