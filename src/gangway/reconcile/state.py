"""The values that are compared: what the host has, or should have, and what a mapping needs of it."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gangway.ebpf.keys import PortBlock, SteeringState, Target, blocks
from gangway.model import Endpoint, Network, Protocol, Source, address_text
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, NetworkPlan, Plan
from gangway.reconcile.properties import Property
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve


class Attachment(NamedTuple):
    """An endpoint, and what it takes to make it."""

    endpoint: Endpoint
    network: Network
    namespace: str  # the path of the container's network namespace
    isolated: bool  # its bridge port reaches the bridge only, and no other isolated port
    inode: int = 0  # of the namespace: the path may lead to another one later; 0: not known
    udp: tuple[MappingPlan, ...] = ()
    """On a further network, the container's translated UDP ports: flows of clients there were not masqueraded."""


@dataclass(frozen=True)
class State:
    """What the host has, or should have.  A link that was found on the host has the value None."""

    bridges: Mapping[str, NetworkPlan | None] = field(default_factory=dict)  # by the bridge's name
    attachments: Mapping[str, Attachment | None] = field(default_factory=dict)
    """By the name of the veth's host end."""
    isolated: frozenset[str] = frozenset()  # the host ends that are isolated bridge ports
    ports: Mapping[HostPorts, Serve] = field(default_factory=dict)  # what the relay serves
    steered: Mapping[PortBlock, SteeringState] = field(default_factory=dict)
    """What is steered to the relay's shared sockets, or reserved for that.  A reserved block that is then served is
    changed in place: it is never free in between."""
    redirects: Mapping[PortBlock, Target] = field(default_factory=dict)
    mappings: Mapping[str, MappingPlan] = field(default_factory=dict)
    """Mappings whose rules change one by one, by their text."""
    neighbours: frozenset[Neighbours] = frozenset()
    """Clients on further networks of containers, whose rules change one by one."""
    plan: Plan | None = None  # the plan whose rules are applied as a whole
    forwarding: frozenset[int] = frozenset()  # families (4, 6) that are forwarded
    properties: frozenset[Property] = frozenset()  # of the links


def rules_of(plan: Plan | None) -> State:
    """Return what a plan's rules are, with the forwarding that they restrict; nothing without a plan."""
    return State() if plan is None else State(plan=plan, forwarding=plan.forwarding)


def link_name(container: str, further: str = "") -> str:
    """Return the name of a container's veth on the host, on its first network or on a `further` one of that name.

    It is always the same, and short enough for a link.
    """
    text = f"{container}\0{further}" if further else container
    return "gw" + hashlib.blake2s(text.encode(), digest_size=6).hexdigest()


def link_of(endpoint: Endpoint) -> str:
    """Return the name of an endpoint's veth on the host."""
    return link_name(endpoint.container, "" if endpoint.is_first else endpoint.network)


def ports_of(planned: MappingPlan) -> Iterator[tuple[HostPorts, Serve]]:
    """Yield what the relay serves for a mapping: the whole range, or each port by a socket of its own."""
    mapping, address = planned.mapping, address_text(planned.container_address)
    protocol, host_address = mapping.protocol.value, address_text(mapping.host_address)
    admitted = tuple(map(str, mapping.admitted))
    if planned.is_blocked or planned.is_leased:
        return
    if planned.is_steered:
        ports = HostPorts(protocol, host_address, mapping.host_ports.first, mapping.host_ports.last)
        mode = Mode.HELD if mapping.is_held else Mode.SHARED
        yield ports, Serve(ports, Destination(address, mapping.container_ports.first), mode, admitted)
        return
    if mapping.is_held or mapping.is_routed:  # no socket can be bound beside dockerd's, nor at a container's address
        return
    mode = Mode.LEASED if mapping.source is Source.LEASE else Mode.OWN
    for port, container_port in mapping.pairs():
        ports = HostPorts(protocol, host_address, port, port)
        yield ports, Serve(ports, Destination(address, container_port), mode, admitted)


def steered_of(planned: MappingPlan) -> Iterator[tuple[PortBlock, SteeringState]]:
    """Yield steering's entries for a mapping; at an excluded address it refuses connections to held ports."""
    if planned.is_steered and (planned.mapping.is_held or not planned.is_blocked):
        state = SteeringState.HELD if planned.mapping.is_held else SteeringState.SERVED
        for block in _blocks(planned):
            yield block, state


def redirects_of(planned: MappingPlan) -> Iterator[tuple[PortBlock, Target]]:
    """Yield the redirect's entries for a mapping."""
    if planned.is_redirected and not planned.is_leased:
        mapping, address = planned.mapping, address_text(planned.container_address)
        shift = mapping.container_ports.first - mapping.host_ports.first
        for block in _blocks(planned):
            yield block, Target(address, block.first + shift)


def translated_udp(plans: Iterable[MappingPlan]) -> tuple[MappingPlan, ...]:
    """Return the mappings whose UDP flows would stay on their former road for as long as the client sends."""
    return tuple(one for one in plans if one.is_nat and one.mapping.protocol is Protocol.UDP)


def steered_ports(plans: Iterable[MappingPlan]) -> Iterator[tuple[int, int]]:
    """Yield the host ports of mappings that have no socket to keep the kernel from choosing them."""
    return ((one.mapping.host_ports.first, one.mapping.host_ports.last) for one in plans if one.is_steered)


def _blocks(planned: MappingPlan) -> Iterator[PortBlock]:
    mapping = planned.mapping
    return blocks(
        mapping.protocol.value, address_text(mapping.host_address), mapping.host_ports.first, mapping.host_ports.last
    )
