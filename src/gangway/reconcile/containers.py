"""Looks into containers: one visit for each endpoint asks for everything that has to be known of it.

A container may have a default route of its own, by a VPN or a second network.  Its answers to far clients then leave by
that way, with an address that no client has connected to.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gangway.errors import GangwayError
from gangway.host.dump import Inside, Question, Way
from gangway.host.links import Link, visit
from gangway.host.sockets import UNREACHABLE
from gangway.inet import FAMILIES
from gangway.model import Address, address_text

_FAR = UNREACHABLE
"""By IP version, an address that nobody has: its route is the default one."""


class Container(NamedTuple):
    """A container to look into, on one of its networks."""

    link: str  # the name of its veth on the host
    namespace: str  # the path of its network namespace
    addresses: tuple[Address, ...] = ()
    gateways: tuple[Address, ...] = ()  # of the network, if answers to far clients have to pass them


class Looked(NamedTuple):
    """The host's links, by name, and what was found in containers, by their links' names; None: no namespace."""

    links: Mapping[str, Link]
    inside: Mapping[str, Inside | None]


def look_into(container: Container, link: Link | None = None) -> Inside | None:
    """Enter a container; for its `link`, read also the links, addresses and routes there.  None: it cannot be."""
    questions = [question for pair in _with_gateways(container) for question in _questions(*pair)]
    try:
        return visit(container.namespace, link.peer if link is not None else 0, questions)
    except GangwayError:
        return None


def answers_elsewhere(container: Container, inside: Inside | None) -> frozenset[Address]:
    """Return those of a container's addresses whose answers to far clients do not pass a gateway of its network."""
    if inside is None:
        return frozenset()
    pairs, ways = _with_gateways(container), iter(inside.ways)
    return frozenset(
        one for one, gateway in pairs if not _passes_gateway(gateway, next(ways), next(ways), next(ways), inside)
    )


def _with_gateways(container: Container) -> Iterator[tuple[Address, Address]]:
    """Yield each address that has a gateway of its family, with that."""
    by_version = {one.version: one for one in reversed(container.gateways)}
    return ((one, by_version[one.version]) for one in container.addresses if one.version in by_version)


def _questions(address: Address, gateway: Address) -> tuple[Question, ...]:
    """Return the packets of a container to itself, to its gateway, and to a far client."""
    own = address_text(address)
    return (own, ""), (address_text(gateway), ""), (_FAR[address.version], own)


def _passes_gateway(gateway: Address, own: Way | None, to_gateway: Way | None, way: Way | None, inside: Inside) -> bool:
    """True if packets take their `way` by the gateway; the three ways are the answers to `_questions`."""
    if own is None or not own.is_local or to_gateway is None:  # its link is about to be made, or repaired
        return True
    if way is None:  # without any default route, gangway's is about to be restored
        return all(route.prefix_length for route in inside.routes[FAMILIES[gateway.version]])
    if way.ifindex != to_gateway.ifindex:
        return False
    # A link-local gateway is the bridge, by a router advertisement.
    return way.gateway == address_text(gateway) or way.gateway.startswith("fe80:")
