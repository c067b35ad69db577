"""Decides which road each kind of client takes to a container's port, and why.

What this file knows: networks, endpoints, mappings, and the facts about the host that a decision depends on.  What it
must not know: how those facts are found, what a rule looks like.

`assemble` returns the Plan that the executor applies and that `ls` and `explain` print.  Each mapping is decided alone
(`plan_mapping`), so adding one costs the same however many there are.  Its roads depend neither on its
ports nor on its container, so most mappings share the roads of an earlier one.  A mapping has one host address, hence
clients of one family: 0.0.0.0 is IPv4's, `::` is IPv6's.

    the container's own address                 routed, if it is Docker's gateway mode and nothing is in the way
    not published where the client connects     blocked; nothing is at an address that `exclude` names
    loopback                                    redirect, if the host can; else relay: the kernel does not route it
    lease                                       relay: Docker writes the rules, and the relay serves what they leave
    a network whose rules dockerd writes        relay
    held by a socket of dockerd's               blocked instead of relay, where nothing can be steered past the socket
    no firewall, host's own process and address redirect or relay, as for loopback
    container has no address of the family      relay: no rule translates between families
    no firewall                                 relay
    the host's own process and address          nat, in OUTPUT, unless a policy rule leads its source elsewhere
    chain INPUT has to be obeyed                relay, for clients that come in by an interface
    a client that comes in by an interface      nat, in PREROUTING, if the kernel forwards what comes in there, no other
                                                program drops it, and the answer leaves by the way the request came

Connections from the container's own network are masqueraded, and those from its further ones: `neighbours` says why.
A container whose answers do not come back to the host sees every client as the gateway, which is on its link.

Some of the host's addresses are exceptions within an origin; the rules leave them out, and the relay serves them.  The
kernel forwards nothing that comes from a link-local address (RFC 4291, 2.5.6), hence no client of fe80::….  A Detour is
an interface whose clients no rule can serve, a LostSource an address from which no packet reaches a container.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from gangway.facts import Firewall, HostFacts
from gangway.model import Address, Endpoint, Network, PortMapping, Protocol, Source
from gangway.neighbours import Neighbours
from gangway.reasons import Code, Reason


class Origin(StrEnum):
    """Who opens the connection."""

    LOOPBACK = "loopback"
    HOST = "host"
    REMOTE = "remote"
    CONTAINER = "container"


class Road(StrEnum):
    """The path that a connection takes to the container."""

    NAT = "nat"
    REDIRECT = "redirect"
    RELAY = "relay"
    ROUTED = "routed"
    BLOCKED = "blocked"


class SeenAs(StrEnum):
    """Whose address the container sees as its client's; NOBODY if no client reaches it."""

    CLIENT = "client"
    GATEWAY = "gateway"
    NOBODY = "nobody"


@dataclass(frozen=True)
class Route:
    """The road of one kind of client.  A `neighbour` is on the container's first network, or the container itself."""

    origin: Origin
    neighbour: bool
    road: Road
    reason: Reason
    seen_as: SeenAs
    only_at: frozenset[Address] = frozenset()
    """The host addresses whose clients take it instead of the usual route; empty for the usual one."""


@dataclass(frozen=True)
class NetworkPlan:
    """A network, and how its containers are isolated."""

    network: Network
    isolate_ports: bool  # True if the bridge isolates the containers; else rules do, or they are not isolated
    untranslated: frozenset[int] = frozenset()
    """Families in which connections from the bridge are not translated: the relay serves its containers."""


_TARGETS = Code.TRANSLATED, Code.MASQUERADED, Code.ANSWERS_ELSEWHERE, Code.REDIRECTED, Code.REDIRECTED_AS_IPV4


class Roads(NamedTuple):
    """The decision about all mappings that differ only in their ports and their container."""

    routes: tuple[Route, ...]
    """One for each kind of client, then the exceptions.  A fact that is the container's address or ports is empty."""
    used: frozenset[Road]


@dataclass(frozen=True, slots=True)
class MappingPlan:
    """A mapping, the container address that it leads to, and the road of each kind of client."""

    mapping: PortMapping
    bridge: str  # empty if gangway writes no rules for it: for a lease, or if dockerd writes those of its network
    container_address: Address
    roads: Roads
    is_steered: bool
    """True if the relay serves it with a socket shared by all ports; else with one socket for each port."""
    is_leased: bool = False
    """True if launchers' leases of the same ports have the relay's part of it, and the redirect's."""
    is_direct: bool = False
    """True if the rules let clients elsewhere connect to the container's own address, at ports that are `is_opened`."""

    @property
    def is_opened(self) -> bool:
        """True if rules open the ports at the container's own address."""
        return self.is_direct and self.mapping.is_routed

    @property
    def routes(self) -> tuple[Route, ...]:
        """The road of each kind of client, and the reason with its fact."""
        address = str(self.container_address)
        target = f"{address} port {self.mapping.container_ports}"
        facts = dict.fromkeys(_TARGETS, target) | {Code.FAMILY: address, Code.ROUTED: target}
        return tuple(
            replace(route, reason=Reason(code, facts[code])) if (code := route.reason.code) in facts else route
            for route in self.roads.routes
        )

    @property
    def has_rules(self) -> bool:
        """True if gangway may write rules for it."""
        return bool(self.bridge)

    @property
    def is_nat(self) -> bool:
        """True if rules translate connections of at least one kind of client."""
        return Road.NAT in self.roads.used

    @property
    def is_blocked(self) -> bool:
        """True if no client gets there: the host address is excluded."""
        return self.roads.used == {Road.BLOCKED}

    @property
    def is_redirected(self) -> bool:
        """True if sockets of at least one kind of client are redirected."""
        return Road.REDIRECT in self.roads.used

    @property
    def is_relayed(self) -> bool:
        """True if the relay carries connections of at least one kind of client."""
        return Road.RELAY in self.roads.used

    @property
    def family(self) -> int:
        """The clients' family: 4 or 6."""
        return self.mapping.host_address.version


@dataclass(frozen=True)
class Plan:
    """All decisions, and the facts that they depend on."""

    facts: HostFacts
    networks: tuple[NetworkPlan, ...]
    further: frozenset[Neighbours]  # of containers on several networks
    mappings: tuple[MappingPlan, ...]
    forwarding: frozenset[int]  # families that have to be forwarded; some may not be yet

    @property
    def closed(self) -> frozenset[int]:
        """Families that were not forwarded before gangway: there, only what gangway allows is forwarded."""
        return self.facts.switched_on | (self.forwarding - self.facts.forwarding)

    @property
    def translated(self) -> frozenset[int]:
        """Families in which connections that come in by an interface are translated."""
        return frozenset(family for family in (4, 6) if self.facts.why_not_translated(family) is None)

    def untranslated(self, family: int) -> tuple[str, ...]:
        """Return the interfaces that connections of a family come in by and are not translated: bridges and detours."""
        bridges = (planned.network.bridge for planned in self.networks if family in planned.untranslated)
        detours = (detour.interface for detour in self.facts.detours if detour.family == family)
        return tuple(dict.fromkeys((*bridges, *detours)))


def assemble(
    networks: tuple[Network, ...], further: frozenset[Neighbours], mappings: tuple[MappingPlan, ...], facts: HostFacts
) -> Plan:
    """Return the Plan of mappings that have been decided already, by the same facts."""
    families = {subnet.version for network in networks for subnet in network.subnets if not network.internal}
    forwarding = families if facts.firewall is not Firewall.NONE and facts.may_forward else set()
    planned = tuple(plan_network(network, facts) for network in networks)
    return Plan(facts, planned, further, mappings, frozenset(forwarding) - dict(facts.unforwardable).keys())


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
    is_lost = address in facts.answers_elsewhere
    is_leased = mapping.is_held and facts.leased
    held = _why_not_steered(mapping, facts) if mapping.is_held and not is_leased else ""
    at = mapping.host_address, mapping.is_routed
    roads = _roads(_Case(mapping.protocol, *at, address.version, is_lost, held, network, facts))
    bridge = network.bridge if network is not None and network.has_rules else ""
    is_direct = network is not None and network.opens(address.version)
    is_steered = not is_leased and _is_steered(mapping, facts)
    return MappingPlan(mapping, bridge, address, roads, is_steered, is_leased, is_direct)


class _Case(NamedTuple):
    """What the roads of a mapping depend on."""

    protocol: Protocol
    at: Address  # the host address
    is_routed: bool  # it is the container's own
    family: int  # of the container's address
    is_lost: bool  # its answers do not pass the host
    held: str  # why the relay cannot serve it beside the sockets that hold its ports; empty if it can, or if none do
    network: Network | None  # None for a lease
    facts: HostFacts


@lru_cache(1024)
def _roads(case: _Case) -> Roads:
    """Decide each case once: there are many mappings, but few cases."""
    clients = [(origin, False) for origin in Origin] + [(Origin.CONTAINER, True)]
    usual = [Route(origin, near, *_decide(origin, near, case)) for origin, near in clients]
    routes = (*usual, *(exception for route in usual for exception in _exceptions(route, case)))
    return Roads(routes, frozenset(route.road for route in routes))


def _exceptions(usual: Route, case: _Case) -> Iterator[Route]:
    """Yield the routes of clients that take another road only because of the address that they connect to."""
    if not case.at.is_unspecified:
        return
    is_loopback, found_excluded = usual.origin is Origin.LOOPBACK, case.facts.excluded_in(case.at.version)
    excluded = frozenset(one for one in found_excluded if one.is_loopback is is_loopback)
    if excluded and usual.road is not Road.BLOCKED:
        yield replace(usual, road=Road.BLOCKED, reason=Reason(Code.EXCLUDED), seen_as=SeenAs.NOBODY, only_at=excluded)
    if usual.origin is Origin.LOOPBACK or case.network is None:
        return
    found: dict[tuple[Road, Reason, SeenAs], list[Address]] = {}
    for address in case.facts.exceptional_addresses(case.at.version):
        decision = _decide(usual.origin, usual.neighbour, case._replace(at=address))
        if decision[0] is not usual.road and address not in excluded:
            found.setdefault(decision, []).append(address)
    for decision, addresses in found.items():
        yield Route(usual.origin, usual.neighbour, *decision, frozenset(addresses))


def _decide(origin: Origin, neighbour: bool, case: _Case) -> tuple[Road, Reason, SeenAs]:
    if case.is_routed and origin is not Origin.LOOPBACK:
        if closed := _why_closed(origin, neighbour, case):
            return Road.BLOCKED, Reason(Code.CLOSED, closed), SeenAs.NOBODY
        return Road.ROUTED, Reason(Code.ROUTED), SeenAs.CLIENT
    blocked = _why_blocked(origin, case)
    if blocked is not None:
        return Road.BLOCKED, blocked, SeenAs.NOBODY
    if _is_redirected(origin, case):
        mapped = case.family != case.at.version
        return Road.REDIRECT, Reason(Code.REDIRECTED_AS_IPV4 if mapped else Code.REDIRECTED), SeenAs.GATEWAY
    relayed = _why_relayed(origin, neighbour, case)
    if relayed is not None and case.protocol in case.facts.missing_protocols:
        return Road.BLOCKED, Reason(Code.NO_SOCKETS, case.protocol.value), SeenAs.NOBODY
    if relayed is not None and case.held:
        return Road.BLOCKED, Reason(Code.HELD, case.held), SeenAs.NOBODY
    if relayed is not None:
        lost = (one.reason.fact for one in case.facts.lost_sources if one.address == case.at)
        if origin is Origin.CONTAINER and (rule := next(lost, None)) is not None:
            return Road.BLOCKED, Reason(Code.ANSWER_LOST, rule), SeenAs.NOBODY
        return Road.RELAY, relayed, SeenAs.GATEWAY
    if neighbour or case.is_lost:
        return Road.NAT, Reason(Code.MASQUERADED if neighbour else Code.ANSWERS_ELSEWHERE), SeenAs.GATEWAY
    return Road.NAT, Reason(Code.TRANSLATED), SeenAs.CLIENT


def _why_blocked(origin: Origin, case: _Case) -> Reason | None:
    """Return why nothing is published at the addresses that this origin connects to; None if something is.

    Docker has published a lease's address by name, and also serves it by its own rules.
    """
    at = case.at
    if case.network is not None and case.facts.is_excluded(at):
        return Reason(Code.EXCLUDED)
    if at.is_loopback and origin is not Origin.LOOPBACK:
        return Reason(Code.LOOPBACK_ONLY, str(at))
    if origin is Origin.LOOPBACK and not (at.is_loopback or at.is_unspecified):
        return Reason(Code.ELSEWHERE, str(at))
    return None


def _why_closed(origin: Origin, neighbour: bool, case: _Case) -> str:
    """Return why a client does not reach the container's own address; empty if it does."""
    if origin is Origin.HOST or case.network is None:
        return ""
    if neighbour:
        return "" if case.network.icc else "its network does not let containers reach each other"
    return "its network is internal" if case.network.internal else case.facts.why_not_forwarded(case.at.version)


def _is_redirected(origin: Origin, case: _Case) -> bool:
    """True if the sockets of host processes are redirected to the container.

    An IPv6 socket can be connected to an IPv4 address, but not the other way round.  Where a rule can serve the host's
    own address it does, so that the container sees that address; for a lease that rule is Docker's.
    """
    has_no_rule = case.network is not None and case.facts.firewall is Firewall.NONE and not is_link_local(case.at)
    return (
        (origin is Origin.LOOPBACK or (origin is Origin.HOST and has_no_rule))
        and not case.facts.no_redirect
        and case.protocol is not Protocol.SCTP  # its sockets run no program when they connect
        and case.family <= case.at.version
    )


def _is_steered(mapping: PortMapping, facts: HostFacts) -> bool:
    """True if a socket that many ports share serves the mapping.

    The kernel steers no broadcasts: a single UDP port, which may be published for them, has a socket of its own, unless
    dockerd has one there.  So has a lease, whose launcher owns it.  If addresses are excluded, other programs have to
    be able to bind the port there, which a socket at all addresses would prevent.
    """
    return (
        mapping.source is not Source.LEASE
        and not mapping.is_routed
        and not _why_not_steered(mapping, facts)
        and (
            mapping.protocol is Protocol.TCP
            or mapping.host_ports.count > 1
            or mapping.is_held
            or (bool(facts.exclude) and mapping.host_address.is_unspecified)
        )
    )


def _why_not_steered(mapping: PortMapping, facts: HostFacts) -> str:
    """Return why a shared socket cannot serve a mapping; empty if one can."""
    if mapping.protocol is Protocol.SCTP:
        return "the kernel steers no SCTP to another socket"
    if is_link_local(mapping.host_address):  # on another interface, the same address and port may be another mapping's
        return f"nothing is steered at the link-local address {mapping.host_address}"
    needs_raw = mapping.is_held and mapping.protocol is Protocol.UDP
    return facts.no_steering or (facts.no_raw if needs_raw else "")


def is_link_local(address: Address) -> bool:
    """True for IPv6's link-local addresses; the kernel does forward IPv4's."""
    return address.version == 6 and address.is_link_local


def _why_relayed(origin: Origin, neighbour: bool, case: _Case) -> Reason | None:
    """Return why no rule can serve a client that is not redirected; None if one can."""
    at, family, network, facts = case.at, case.family, case.network, case.facts
    if origin is Origin.LOOPBACK:
        if at.version < family:
            return Reason(Code.FAMILY)
        if case.protocol is Protocol.SCTP:
            return Reason(Code.LOOPBACK, "127.0.0.0/8" if at.version == 4 else "::1")
        return Reason(Code.NO_REDIRECT, facts.no_redirect)
    if network is None:
        return Reason(Code.LINK_LOCAL, str(at)) if is_link_local(at) else Reason(Code.LEASE)
    if not network.has_rules or facts.firewall is Firewall.NONE:
        return Reason(Code.NO_FIREWALL) if network.has_rules else Reason(Code.DOCKERS_RULES, network.bridge)
    if family != at.version:
        return Reason(Code.FAMILY)
    if is_link_local(at):
        return Reason(Code.LINK_LOCAL, str(at))
    if origin is Origin.HOST:
        return next((lost.reason for lost in facts.lost_sources if at in lost.requested), None)
    if origin is Origin.REMOTE and (reason := facts.detour_of(at)) is not None:
        return reason
    if neighbour and not facts.own_bridge:
        return Reason(Code.OWN_BRIDGE, network.bridge)
    if neighbour and at.version in plan_network(network, facts).untranslated:
        # Connections from this bridge are not translated; which bridge other containers are on is not known here.
        return Reason(Code.ISOLATED, network.bridge)
    return facts.why_not_translated(at.version)
