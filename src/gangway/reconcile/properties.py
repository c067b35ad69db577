"""What gangway has configured of a link and keeps so, as values that can be compared: one for each property.

A property that is missing is restored without creating the link again, so connections go on.  What another program has
added to a link is left alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, auto
from functools import lru_cache

from gangway.model import Address, Endpoint, Network, Subnet, address_text


class Kind(IntEnum):
    """The kinds of properties, in the order in which they are restored: an address brings some routes with it."""

    SETTING = auto()  # `name=value`, of IPv6's settings of the interface
    BRIDGE = auto()  # the bridge whose port it is, in hairpin mode
    MTU = auto()
    UP = auto()
    ADDRESS = auto()  # with the length of the subnet's prefix
    ROUTE = auto()  # of a subnet; `detail` is the interface's address
    DEFAULT_ROUTE = auto()  # of `IPv4` or `IPv6`, by whatever gateway; `detail` is the one that gangway uses
    LOOPBACK = auto()  # the container's loopback interface is up


@dataclass(frozen=True, order=True, slots=True)
class Property:
    """One property of a link on the host, or of the other end of a veth."""

    link: str  # the link's name on the host
    namespace: str  # the path of the other end's namespace; empty: the link on the host itself
    kind: Kind
    value: str = ""
    detail: str = field(default="", compare=False)  # what else it takes to restore it

    def __str__(self) -> str:
        return _TEXTS[self.kind].format(self.value)


_TEXTS = {
    Kind.SETTING: "{}",
    Kind.BRIDGE: "port of {}",
    Kind.MTU: "MTU {}",
    Kind.UP: "up",
    Kind.ADDRESS: "address {}",
    Kind.ROUTE: "route {}",
    Kind.DEFAULT_ROUTE: "default route of {}",
    Kind.LOOPBACK: "lo up",
}
BRIDGE_SETTINGS = {"accept_ra": "0", "accept_dad": "0"}
"""A bridge would accept its containers' router advertisements, and wait for the detection of duplicate addresses."""
WITHOUT_BRIDGE_SETTING = {
    "accept_ra": "while the host forwards no IPv6, a container's router advertisements add routes and addresses to it",
    "accept_dad": "the bridge's link-local address may be used some seconds after it was created only",
}
"""The consequence of each that cannot be set."""


@lru_cache(4096)
def of_bridge(network: Network) -> frozenset[Property]:
    """Return the properties of a network's bridge."""
    return frozenset(_of_bridge(network))


@lru_cache(16_384)  # sixteen full bridges (BR_MAX_PORTS, net/bridge/br_private.h)
def of_veth(name: str, namespace: str, endpoint: Endpoint, network: Network) -> frozenset[Property]:
    """Return the properties of both ends of a container's veth; `name` is that of the end on the host."""
    return frozenset(_of_veth(name, namespace, endpoint, network))


def _of_bridge(network: Network) -> Iterator[Property]:
    link = network.bridge
    for name, value in BRIDGE_SETTINGS.items():
        yield Property(link, "", Kind.SETTING, f"{name}={value}")
    yield Property(link, "", Kind.MTU, str(network.mtu))
    yield Property(link, "", Kind.UP)
    for address, subnet in zip(network.gateways, network.subnets, strict=True):
        yield from _of_address(link, "", address, subnet)


def _of_veth(name: str, namespace: str, endpoint: Endpoint, network: Network) -> Iterator[Property]:
    yield Property(name, "", Kind.BRIDGE, network.bridge)
    for at in ("", namespace):
        yield Property(name, at, Kind.MTU, str(network.mtu))
        yield Property(name, at, Kind.UP)
    if endpoint.is_first:
        yield Property(name, namespace, Kind.LOOPBACK)
    for address in endpoint.addresses:
        subnet = next(subnet for subnet in network.subnets if address in subnet)
        yield from _of_address(name, namespace, address, subnet)
        if endpoint.is_first and not network.internal:
            gateway = next(gateway for gateway in network.gateways if gateway in subnet)
            yield Property(name, namespace, Kind.DEFAULT_ROUTE, f"IPv{gateway.version}", str(gateway))


def _of_address(link: str, namespace: str, address: Address, subnet: Subnet) -> Iterator[Property]:
    yield Property(link, namespace, Kind.ADDRESS, f"{address_text(address)}/{subnet.prefixlen}")
    yield Property(link, namespace, Kind.ROUTE, address_text(subnet), address_text(address))
