"""What is wanted: networks, endpoints, port mappings, and how `-p` says it.

What this file knows: which values make sense, by themselves and beside one another.  What it must not know: roads,
rules, the host.

How it works.  Each class refuses, when it is made, what makes no sense by itself; so who holds one need not ask again.
`parse_port` reads one `-p` as Docker does (github.com/docker/go-connections, nat.ParsePortSpec), its corners included:
the text is cut at its last two colons, so an IPv6 address needs no brackets; a protocol may be in capitals; a host
range for one container port means "one of these".
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import blake2s
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from gangway.errors import Conflict, InvalidRequest
from gangway.text import in_brackets as in_brackets

Address = IPv4Address | IPv6Address
Subnet = IPv4Network | IPv6Network

ANY = (IPv4Address("0.0.0.0"), IPv6Address("::"))
"""What a host address that is left out means."""

_LAST_PORT = 65535
_INTERFACE_NAME_CHARACTERS = 15  # include/uapi/linux/if.h: IFNAMSIZ counts the closing zero
_LEAST_MTU = {4: 68, 6: 1280}  # RFC 791, RFC 8200
_MOST_MTU = 65535  # net/bridge: ETH_MAX_MTU
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# The kernel allows more (net/core/dev.c, dev_valid_name).  But rules name interfaces, and there a quote ends a name,
# and + and * stand for any characters.
_INTERFACE_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.][A-Za-z0-9_.@-]*")


class Protocol(StrEnum):
    """The protocols that have ports."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"

    @classmethod
    def parse(cls, text: str) -> "Protocol":
        """In capitals or not."""
        try:
            return cls(text.lower())
        except ValueError:
            raise InvalidRequest(f"unknown protocol {text!r}: tcp, udp or sctp") from None


@dataclass(frozen=True, order=True)
class PortRange:
    """Ports from `first` to `last`, both included; mostly it is one."""

    first: int
    last: int

    def __post_init__(self) -> None:
        for port in (self.first, self.last):
            if not 1 <= port <= _LAST_PORT:
                raise InvalidRequest(f"{port} is not a port: ports go from 1 to {_LAST_PORT}")
        if self.first > self.last:
            raise InvalidRequest(f"the range {self.first}-{self.last} is upside down: write {self.last}-{self.first}")

    @classmethod
    def parse(cls, text: str) -> "PortRange":
        """`8000` or `8000-8010`."""
        first, dash, last = text.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            raise InvalidRequest(f"{text!r} is neither a port nor a range of ports")
        return cls(int(first), int(last or first))

    @property
    def count(self) -> int:
        """How many ports."""
        return self.last - self.first + 1

    def includes(self, other: "PortRange") -> bool:
        """Whether all of another's ports are in it."""
        return self.first <= other.first and other.last <= self.last

    def overlaps(self, other: "PortRange") -> bool:
        """Whether a port is in both."""
        return self.first <= other.last and other.first <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.count == 1 else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class PortRequest:
    """What one `-p` asks for.  Without `host_ports` any free port will do; where one container port has several, any
    one of these."""

    protocol: Protocol
    host_addresses: tuple[Address, ...]
    host_ports: PortRange | None
    container_ports: PortRange

    def __post_init__(self) -> None:
        host, container = self.host_ports, self.container_ports
        if host is not None and container.count not in (1, host.count):
            raise InvalidRequest(
                f"{host} are {host.count} host ports and {container} are {container.count} container ports: "
                "they must be as many"
            )

    @property
    def is_choice(self) -> bool:
        """A host port has to be chosen."""
        return self.host_ports is None or self.host_ports.count != self.container_ports.count

    def apart(self) -> Iterator["PortRequest"]:
        """Where any host ports will do, each container port gets one of its own; else it is one request."""
        if self.host_ports is not None:
            yield self
            return
        for port in range(self.container_ports.first, self.container_ports.last + 1):
            yield replace(self, container_ports=PortRange(port, port))


def parse_port(text: str) -> PortRequest:
    """One `-p`: [HOST-IP:]HOST-PORT[-END]:PORT[-END][/PROTOCOL] or [HOST-IP::]PORT[/PROTOCOL].

    InvalidRequest names it, and what is wrong.
    """
    try:
        ports, _, protocol = text.partition("/")
        *host, container_ports = ports.rsplit(":", 2)
        host_ports = host.pop() if host else ""
        return PortRequest(
            Protocol.parse(protocol or Protocol.TCP),
            (parse_address(host[0]),) if host and host[0] else ANY,
            None if host_ports in ("", "0") else PortRange.parse(host_ports),
            PortRange.parse(container_ports),
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"-p {text}: {error}") from None


def parse_address(text: str) -> Address:
    """An address, in brackets or not."""
    try:
        address = ip_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not an address") from None
    zone = getattr(address, "scope_id", None)
    if zone is not None and not (address.is_link_local and is_interface_name(zone)):
        raise InvalidRequest(f"{text!r} is not an address")  # only a link-local one has a zone: an interface
    return address


def is_interface_name(text: str) -> bool:
    """Whether an interface may have this name; the kernel would allow some more."""
    return len(text) <= _INTERFACE_NAME_CHARACTERS and _INTERFACE_NAME.fullmatch(text) is not None


@dataclass(frozen=True)
class PortMapping:
    """Ports of one host address that lead to a container's."""

    container: str
    protocol: Protocol
    host_address: Address
    host_ports: PortRange
    container_ports: PortRange

    def __post_init__(self) -> None:
        if self.host_ports.count != self.container_ports.count:
            raise InvalidRequest(f"{self.host_ports} and {self.container_ports} must be as many ports")

    @property
    def keeps_ports(self) -> bool:
        """Each port is the same on both sides."""
        return self.host_ports == self.container_ports

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Each host port, and the container port where it leads."""
        offset = self.container_ports.first - self.host_ports.first
        for port in range(self.host_ports.first, self.host_ports.last + 1):
            yield port, port + offset

    def collides(self, other: "PortMapping") -> bool:
        """Whether the two want a port of the same address.  An unspecified address (0.0.0.0, ::) wants all of its
        family."""
        return (
            self.protocol == other.protocol
            and self.host_ports.overlaps(other.host_ports)
            and self.host_address.version == other.host_address.version
            and (
                self.host_address == other.host_address
                or self.host_address.is_unspecified
                or other.host_address.is_unspecified
            )
        )

    def __str__(self) -> str:
        return f"{in_brackets(self.host_address)}:{self.host_ports}:{self.container_ports}/{self.protocol}"


@dataclass(frozen=True)
class Network:
    """A bridge, the subnets behind it (one of a family at most) with the host's address in each, and a policy."""

    name: str
    bridge: str
    subnets: tuple[Subnet, ...]
    gateways: tuple[Address, ...]
    masquerade: bool = True
    icc: bool = True
    internal: bool = False
    mtu: int = 1500
    """Bytes."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(f"{self.name!r} is no name for a network: letters, digits, '_', '.' and '-'")
        if len(self.bridge.encode()) > _INTERFACE_NAME_CHARACTERS:
            raise InvalidRequest(f"the bridge's name {self.bridge!r} is longer than {_INTERFACE_NAME_CHARACTERS}")
        if not is_interface_name(self.bridge):
            raise InvalidRequest(f"{self.bridge!r} is no name for an interface")
        versions = [subnet.version for subnet in self.subnets]
        if not versions or len(set(versions)) != len(versions):
            raise InvalidRequest(f"network {self.name} must have one subnet of IPv4, one of IPv6, or both")
        for subnet, gateway in zip(self.subnets, self.gateways, strict=True):
            _check_subnet(subnet)
            _check_gateway(subnet, gateway)
        least = max(_LEAST_MTU[version] for version in versions)
        if not least <= self.mtu <= _MOST_MTU:
            raise InvalidRequest(f"an MTU of {self.mtu} does not do for network {self.name}: {least} to {_MOST_MTU}")

    def overlaps(self, other: "Network") -> tuple[Subnet, Subnet] | None:
        """A subnet of each with addresses in common, if there are any."""
        for own in self.subnets:
            for foreign in other.subnets:
                if own.version == foreign.version and own.overlaps(foreign):
                    return own, foreign
        return None


@dataclass(frozen=True)
class Endpoint:
    """A container on a network, and its addresses there: one in each subnet."""

    container: str
    network: str
    addresses: tuple[Address, ...]

    def address_for(self, host_address: Address) -> Address:
        """The address where a mapping of `host_address` leads: of the same family, if there is one."""
        same = (address for address in self.addresses if address.version == host_address.version)
        return next(same, self.addresses[0])


def bridge_name(network: str) -> str:
    """The bridge's name when nobody said another; a long one is cut, and told from others by a digest."""
    name = f"gw-{network}"
    if len(name) <= _INTERFACE_NAME_CHARACTERS:
        return name
    return f"{name[: _INTERFACE_NAME_CHARACTERS - 7]}-{blake2s(network.encode(), digest_size=3).hexdigest()}"


def first_gateway(subnet: Subnet) -> Address:
    """The gateway when nobody said another: the subnet's first address."""
    return subnet[0] if subnet.num_addresses == 1 else subnet[1]


def free_address(network: Network, subnet: Subnet, taken: frozenset[Address]) -> Address:
    """The first address of `subnet` that neither the gateway nor anybody else has."""
    used = taken | set(network.gateways)
    for address in subnet.hosts():
        if address not in used:
            return address
    raise Conflict(f"network {network.name} has no free address left in {subnet}")


def free_subnets(taken: Collection[Subnet], global_id: bytes) -> tuple[Subnet, Subnet]:
    """A private /24 and a unique local /64 (RFC 4193, of these 5 random bytes) of which nothing is taken.

    Conflict: there is none.
    """
    used = [subnet for subnet in taken if subnet.version == 4]
    for subnet in IPv4Network("10.201.0.0/16").subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in used):
            return subnet, IPv6Network((b"\xfd" + global_id + bytes(10), 64))
    raise Conflict("no private /24 is free: create a network with --subnet")


def check_fits(network: Network, others: Iterable[Network]) -> None:
    """One more network on a host: no name, no bridge and no address twice.  Conflict says which."""
    for other in others:
        if other.name == network.name:
            raise Conflict(f"there is a network {network.name} already")
        if other.bridge == network.bridge:
            raise Conflict(f"network {other.name} has the bridge {network.bridge} already")
        common = other.overlaps(network)
        if common is not None:
            raise Conflict(f"subnet {common[1]} overlaps {common[0]} of network {other.name}")


def any_of(address: Address) -> Address:
    """The unspecified address of the same family."""
    return ANY[address.version == 6]


def _check_subnet(subnet: Subnet) -> None:
    if subnet.is_multicast or subnet.is_loopback or subnet.is_link_local or subnet.network_address.is_unspecified:
        raise InvalidRequest(f"{subnet} is not a subnet for containers: its addresses have another meaning")


def _check_gateway(subnet: Subnet, gateway: Address) -> None:
    if gateway not in subnet:
        raise InvalidRequest(f"the gateway {gateway} is not in {subnet}")
    if subnet.num_addresses < 3:
        raise InvalidRequest(f"{subnet} has no room for a gateway and a container")
    if gateway == subnet.network_address or (subnet.version == 4 and gateway == subnet.broadcast_address):
        raise InvalidRequest(f"the gateway {gateway} is not an address for a host of {subnet}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
