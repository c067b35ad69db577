"""The clients that a container on several networks would answer past the host.

A published port leads to the container's address on its first network.  A client on a further one would get the answer
directly, as the container has a route to that network, from an address that the client did not connect to.  So rules
masquerade these clients, as they do those on the first network.
"""

from typing import NamedTuple

from gangway.model import Address, Subnet
from gangway.plan import Plan


class Neighbours(NamedTuple):
    """The clients on a further network of a container."""

    subnet: Subnet  # theirs
    address: Address  # the container's on its first network
    bridge: str  # of the first network


def further_neighbours(plan: Plan) -> tuple[Neighbours, ...]:
    """Return those of all containers in a plan, always in the same order."""
    networks = {one.network.name: one.network for one in plan.networks}
    first = {one.container: one for one in plan.endpoints if one.is_first}
    found = (
        Neighbours(subnet, address, networks[first[one.container].network].bridge)
        for one in plan.endpoints
        if not one.is_first
        for subnet in networks[one.network].subnets
        for address in first[one.container].addresses
        if address.version == subnet.version
    )
    return tuple(sorted(found, key=str))
