"""What follows for requests from a host, or a container, on which IPv6 cannot be used."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from gangway.errors import Unsupported
from gangway.host import netns, probe, sockets
from gangway.model import ANY, Address, Endpoint, Network, PortRequest, Subnet


def ipv6_off(namespace: str) -> str:
    """Return why a container cannot use IPv6; empty if it can.  `namespace` is the path of its network namespace."""
    with netns.entered(namespace):
        return probe.ipv6_off()


def families_without(namespace: str, requested: Sequence[Address]) -> Collection[int]:
    """Return the families that a container cannot use.  Unsupported: an address of one was requested."""
    reason = ipv6_off(namespace)
    wanted = next((address for address in requested if address.version == 6), None)
    if reason and wanted is not None:
        raise Unsupported(f"the container cannot have the address {wanted}: {reason}")
    return (6,) if reason else ()


def without_unusable(subnets: Sequence[Subnet]) -> tuple[Subnet, ...]:
    """Return the subnets that a network on this host can have."""
    reason = probe.ipv6_off()
    return tuple(subnet for subnet in subnets if subnet.version == 4 or not reason)


def require_usable(network: Network) -> None:
    """Unsupported: the host cannot use a subnet of a network."""
    reason = probe.ipv6_off()
    unusable = next((subnet for subnet in network.subnets if subnet.version == 6 and reason), None)
    if unusable is not None:
        advice = "leave it out, or switch IPv6 on"
        raise Unsupported(f"network {network.name} cannot have the subnet {unusable}: {reason}; {advice}")


def without_missing(request: PortRequest) -> PortRequest:
    """Return a request without the address `::` that it did not name, if the kernel has no IPv6 sockets."""
    if request.host_addresses == ANY and not sockets.has_sockets("udp", 6):
        return replace(request, host_addresses=ANY[:1])
    return request


def ipv4_only(endpoint: Endpoint, network: Network, namespace: str, is_on_demand: bool) -> str:
    """Return why a container has no IPv6 address; empty if it has one, or if its network was requested without."""
    if any(address.version == 6 for address in endpoint.addresses):
        return ""
    if any(subnet.version == 6 for subnet in network.subnets):
        what, reason = "", ipv6_off(namespace)
    else:
        what, reason = f"network {network.name} has ", probe.ipv6_off() if is_on_demand else ""
    return f"{what}IPv4 only: {reason}" if reason else ""
