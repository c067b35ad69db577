"""Chooses subnets and addresses for networks and containers that name none."""

from collections.abc import Collection
from ipaddress import IPv4Network, IPv6Network

from gangway.errors import Conflict
from gangway.model import Address, Network, Subnet


def first_gateway(subnet: Subnet) -> Address:
    """Return the default gateway: the subnet's first address."""
    return subnet[0] if subnet.num_addresses == 1 else subnet[1]


def free_address(network: Network, subnet: Subnet, used: frozenset[Address]) -> Address:
    """Return the first address of `subnet` that is neither in `used` nor a gateway.  Conflict: there is none."""
    for address in subnet.hosts():
        if address not in used and address not in network.gateways:
            return address
    raise Conflict(f"network {network.name} has no free address left in {subnet}")


def free_subnets(used: Collection[Subnet], global_id: bytes) -> tuple[Subnet, Subnet]:
    """Return a private /24 that overlaps nothing in `used`, and the unique local /64 of `global_id`.

    `global_id` is 5 random bytes (RFC 4193).  Conflict: no /24 is free.
    """
    for subnet in IPv4Network("10.201.0.0/16").subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in used if other.version == 4):
            return subnet, IPv6Network((b"\xfd" + global_id + bytes(10), 64))
    raise Conflict("no private /24 is free: create a network with --subnet")
