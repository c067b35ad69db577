"""What Docker has, as far as gangway serves it: networks, running containers and their published ports.

Docker creates and deletes them; gangway adopts them, and changes nothing of them but the way of packets.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from gangway.model import Endpoint, Network, PortMapping


class AdoptedContainer(NamedTuple):
    """A running container: its addresses on the network of its default route, and its published ports."""

    id: str  # Docker's, which stays if it is renamed, and which no other container ever gets
    endpoint: Endpoint  # the names of container and network begin with `DOCKER_PREFIX`
    namespace: str  # the path of its network namespace
    mappings: tuple[PortMapping, ...]


class Adopted(NamedTuple):
    """Everything of Docker's that gangway serves.  Networks are bridges; a container's network is among them."""

    networks: tuple[Network, ...] = ()
    containers: tuple[AdoptedContainer, ...] = ()
    stopped: Mapping[str, str] = MappingProxyType({})
    """The names of containers that exist and do not run, by their ids: ports that gangway has published come back."""
