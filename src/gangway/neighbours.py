"""The clients that a container on several networks would answer past the host.

A published port leads to the container's address on its first network.  A client on a further one would get the answer
directly, as the container has a route to that network, from an address that the client did not connect to.  So rules
masquerade these clients, as they do those on the first network.
"""

from collections.abc import Iterator
from typing import NamedTuple

from gangway.model import Address, Endpoint, Network, Subnet


class Neighbours(NamedTuple):
    """The clients on a further network of a container."""

    subnet: Subnet  # theirs
    address: Address  # the container's on its first network
    bridge: str  # of the first network


def further_neighbours(first: Endpoint, network: Network, further: Network) -> Iterator[Neighbours]:
    """Yield the clients on a container's `further` network; `first` is its endpoint on the first one, `network`."""
    for subnet in further.subnets:
        for address in first.addresses:
            if address.version == subnet.version:
                yield Neighbours(subnet, address, network.bridge)
