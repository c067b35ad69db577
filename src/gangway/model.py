"""What can be requested: networks, endpoints, port mappings, and the syntax of `-p`.

What this file knows: which values are valid, alone and in combination.  What it must not know: roads, rules, the
host.

Each class checks its values when it is created, so no other code has to check them again.  `parse_port` reads one `-p`
as Docker does (github.com/docker/go-connections, nat.ParsePortSpec), corner cases included: the text is split at its
last two colons, so an IPv6 address needs no brackets; the protocol's case does not matter; a host range for one
container port means "one of these".
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2s
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import product

from gangway.errors import Conflict, InvalidRequest
from gangway.inet import format_host

Address = IPv4Address | IPv6Address
Subnet = IPv4Network | IPv6Network
Subnets = tuple[Subnet, ...]

ANY = (IPv4Address("0.0.0.0"), IPv6Address("::"))
"""The host addresses of a mapping that names none."""

_MAX_PORT = 65535
_INTERFACE_NAME_BYTES = 15  # include/uapi/linux/if.h: IFNAMSIZ counts the closing zero
_MIN_MTU = {4: 68, 6: 1280}  # RFC 791, RFC 8200
_MAX_MTU = 65535  # net/bridge: ETH_MAX_MTU
_ETHERNET_MTU = 1500
_NUMBER = re.compile(r"[0-9]{1,9}")
_MAX_NAME_LENGTH = 128
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,{_MAX_NAME_LENGTH - 1}}}")
DOCKER_PREFIX = "docker:"
"""What the names of Docker's networks and containers begin with."""
ON_DEMAND = "gangway0"
"""The network that is created when a container is attached and no network was named."""
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095  # include/uapi/linux/limits.h; PATH_MAX counts the closing zero
_IPV4_BROADCAST = IPv4Address("255.255.255.255")
# The kernel allows more (net/core/dev.c, dev_valid_name).  But rules contain interface names, and there a quote ends a
# name, and + and * are wildcards.
_INTERFACE_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.][A-Za-z0-9_.@-]*")


class Protocol(StrEnum):
    """The protocols that have ports."""

    TCP = "tcp"
    UDP = "udp"
    SCTP = "sctp"

    @classmethod
    def parse(cls, text: str) -> "Protocol":
        """Return the protocol of that name, in lower or upper case."""
        try:
            return cls(text.lower())
        except ValueError:
            raise InvalidRequest(f"unknown protocol {text!r}: use tcp, udp or sctp") from None


class Source(StrEnum):
    """Who requests a network, an endpoint or a mapping."""

    API = "api"  # a client of the API; the mapping is stored in the database
    LEASE = "lease"  # a docker-proxy launcher; the mapping is in memory only, and lasts as long as its connection
    DECLARED = "declared"  # a file of conf.d; it is in the database, too, and removed when no file declares it
    DOCKER = "docker"  # Docker's API says so: a network, container or port of dockerd's, which is adopted


@dataclass(frozen=True, order=True, slots=True)
class PortRange:
    """The ports from `first` to `last`, both included."""

    first: int
    last: int

    def __post_init__(self) -> None:
        for port in (self.first, self.last):
            if not 1 <= port <= _MAX_PORT:
                raise InvalidRequest(f"port {port} is out of range (1 to {_MAX_PORT})")
        if self.first > self.last:
            raise InvalidRequest(f"the range {self.first}-{self.last} is reversed: write {self.last}-{self.first}")

    @classmethod
    def parse(cls, text: str) -> "PortRange":
        """Read `8000` or `8000-8010`."""
        first, dash, last = text.partition("-")
        if not _NUMBER.fullmatch(first) or (dash and not _NUMBER.fullmatch(last)):
            raise InvalidRequest(f"{text!r} is not a port or a range of ports")
        return cls(int(first), int(last or first))

    @property
    def count(self) -> int:
        """The number of ports."""
        return self.last - self.first + 1

    def includes(self, other: "PortRange") -> bool:
        """True if this range has all ports of the other one."""
        return self.first <= other.first and other.last <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.count == 1 else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class PortRequest:
    """The request of one `-p`.

    Without `host_ports` any free port will do; several host ports for one container port mean any one of them.
    """

    protocol: Protocol
    host_addresses: tuple[Address, ...]
    host_ports: PortRange | None
    container_ports: PortRange
    admitted: Subnets = ()  # as in PortMapping
    source: Source = Source.API

    def __post_init__(self) -> None:
        for address in self.host_addresses:
            _check_host_address(address)
        host, container = self.host_ports, self.container_ports
        if host is not None and container.count not in (1, host.count):
            last = host.first + container.count - 1
            hint = f"; for example {replace(self, host_ports=PortRange(host.first, last))}" if last <= _MAX_PORT else ""
            raise InvalidRequest(
                f"{host.count} host port{'s' * (host.count > 1)} for {container.count} container ports{hint}"
            )

    @property
    def is_choice(self) -> bool:
        """True if gangway has to choose the host port."""
        return self.host_ports is None or self.host_ports.count != self.container_ports.count

    def names(self, mapping: "PortMapping") -> bool:
        """True if this request may have led to a mapping."""
        if mapping.protocol != self.protocol or mapping.host_address not in self.host_addresses:
            return False
        if not self.is_choice:
            return (mapping.host_ports, mapping.container_ports) == (self.host_ports, self.container_ports)
        is_host_port = self.host_ports is None or self.host_ports.includes(mapping.host_ports)
        return is_host_port and self.container_ports.includes(mapping.container_ports)

    def split_ports(self) -> Iterator["PortRequest"]:
        """Yield one request for each container port if any host ports will do; else this request."""
        if self.host_ports is not None:
            return iter([self])
        ports = range(self.container_ports.first, self.container_ports.last + 1)
        return (replace(self, container_ports=PortRange(port, port)) for port in ports)

    def __str__(self) -> str:
        """Return what is written after `-p`; `parse_port` reads the same from it, but for the admitted clients."""
        host = "" if self.host_addresses == ANY else f"{format_host(self.host_addresses[0])}:"
        ports = f"{self.host_ports or ''}:" if host or self.host_ports else ""
        protocol = "" if self.protocol is Protocol.TCP else f"/{self.protocol}"
        return f"{host}{ports}{self.container_ports}{protocol}"


def parse_port(text: str, admitted: Subnets = ()) -> PortRequest:
    """Read one `-p`: [HOST-IP:]HOST-PORT[-END]:PORT[-END][/PROTOCOL] or [HOST-IP::]PORT[/PROTOCOL]."""
    try:
        ports, _, protocol = text.partition("/")
        *host, container_ports = ports.rsplit(":", 2)
        host_ports = host.pop() if host else ""
        if not container_ports:
            raise InvalidRequest("no container port" + " after the colon" * (":" in ports))
        return PortRequest(
            Protocol.parse(protocol or Protocol.TCP),
            (parse_address(host[0]),) if host and host[0] else ANY,
            None if host_ports in ("", "0") else PortRange.parse(host_ports),
            PortRange.parse(container_ports),
            admitted,
        )
    except InvalidRequest as error:
        raise InvalidRequest(f"invalid -p {text!r}: {error}") from None


@lru_cache(4096)
def address_text(address: Address | Subnet) -> str:
    """Return an address's or subnet's text, which is needed again for each of thousands of ports and containers."""
    return str(address)


def parse_address(text: str) -> Address:
    """Read an address; one of IPv6 may be in brackets."""
    is_bracketed = text.startswith("[") and text.endswith("]")
    try:
        address = ip_address(text[1:-1] if is_bracketed else text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not an IP address") from None
    if is_bracketed and address.version == 4:
        raise InvalidRequest(f"{text!r} is not an IPv6 address: write {address} without brackets")
    zone = getattr(address, "scope_id", None)
    if zone is not None and not (address.is_link_local and is_interface_name(zone)):
        raise InvalidRequest(f"{text!r} is not an IP address: only a link-local address has a zone, an interface")
    return address


def without_zone(address: Address) -> Address:
    """Return an address without its zone, the interface of a link-local one."""
    return IPv6Address(int(address)) if address.version == 6 else address


def is_interface_name(text: str) -> bool:
    """True if gangway accepts this name of an interface; the kernel would accept a few more."""
    return len(text) <= _INTERFACE_NAME_BYTES and _INTERFACE_NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class PortMapping:
    """Ports of one host address that lead to ports of a container."""

    container: str  # the container's name; for a lease its address: Docker's launchers do not have the name
    protocol: Protocol
    host_address: Address
    host_ports: PortRange
    container_ports: PortRange
    source: Source = Source.API
    is_held: bool = False  # dockerd has a socket at each port, which keeps other programs from binding it
    admitted: Subnets = ()
    """The clients that may connect, besides the host itself; empty: everybody."""
    is_routed: bool = False
    """True if the host address is the container's own, to which the kernel routes packets: nothing is translated."""

    def __post_init__(self) -> None:
        _check_host_address(self.host_address)
        if self.host_ports.count != self.container_ports.count:
            raise InvalidRequest(f"{self}: host ports and container ports differ in number")

    @property
    def keeps_ports(self) -> bool:
        """True if each host port leads to the container port of the same number."""
        return self.host_ports == self.container_ports

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield each host port with the container port that it leads to."""
        offset = self.container_ports.first - self.host_ports.first
        for port in range(self.host_ports.first, self.host_ports.last + 1):
            yield port, port + offset

    def __str__(self) -> str:
        host = format_host(address_text(self.host_address))
        return f"{host}:{self.host_ports}:{self.container_ports}/{self.protocol}"


@dataclass(frozen=True)
class Network:
    """A bridge, its subnets (at most one of each family) with the host's address in each, and a policy.

    One that is adopted is Docker's: gangway writes its rules only.
    """

    name: str
    bridge: str
    subnets: tuple[Subnet, ...]
    gateways: tuple[Address, ...]
    masquerade: bool = True
    icc: bool = True
    internal: bool = False
    mtu: int = _ETHERNET_MTU  # bytes
    source: Source = Source.API
    routed: frozenset[int] = frozenset()
    """Families (4, 6) in which clients connect to the containers' own addresses: nothing is translated."""
    has_rules: bool = True
    """False: gangway writes no rules, because dockerd does; redirect and relay serve what gangway publishes."""

    def __hash__(self) -> int:
        return hash(self.name)  # decisions about thousands of mappings are looked up by their network

    def opens(self, family: int) -> bool:
        """True if clients elsewhere may connect to the containers' own addresses, at published ports."""
        return family in self.routed and self.has_rules and not self.internal

    @property
    def is_adopted(self) -> bool:
        """True if Docker creates and deletes the bridge, the containers' interfaces and their addresses."""
        return self.source is Source.DOCKER

    def masquerades(self, subnet: Subnet) -> bool:
        """True if connections from a subnet of the network to other machines leave with the host's address."""
        return self.masquerade and not self.internal and subnet.version not in self.routed

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name.removeprefix(DOCKER_PREFIX if self.is_adopted else "")):
            rule = "use letters, digits, '_', '.' and '-'" + ", at most 128" * (len(self.name) > _MAX_NAME_LENGTH)
            raise InvalidRequest(f"invalid network name {self.name!r}: {rule}")
        if len(self.bridge.encode()) > _INTERFACE_NAME_BYTES:
            raise InvalidRequest(f"invalid bridge name {self.bridge!r}: longer than {_INTERFACE_NAME_BYTES} bytes")
        if not is_interface_name(self.bridge):
            raise InvalidRequest(f"invalid bridge name {self.bridge!r}: use letters, digits, '_', '.', '@' and '-'")
        versions = [subnet.version for subnet in self.subnets]
        if not versions or len(set(versions)) != len(versions):
            raise InvalidRequest(f"network {self.name} needs one subnet of IPv4, one of IPv6, or both")
        for subnet, gateway in zip(self.subnets, self.gateways, strict=True):
            _check_subnet(subnet, gateway)
        smallest = _smallest_mtu(self.subnets)
        if not smallest <= self.mtu <= _MAX_MTU:
            raise InvalidRequest(f"MTU {self.mtu} is out of range for network {self.name} ({smallest} to {_MAX_MTU})")


@dataclass(frozen=True)
class Endpoint:
    """A container's attachment to a network, with its addresses there: one in each subnet."""

    container: str
    network: str
    addresses: tuple[Address, ...]
    source: Source = Source.API
    is_first: bool = True
    """True if the network has the container's default route and its published ports, which others have not."""

    def __hash__(self) -> int:
        return hash(self.container)  # properties of its links are looked up by it

    def address_for(self, host_address: Address) -> Address:
        """Return the address that a mapping of `host_address` leads to: of the same family, if there is one."""
        same = (address for address in self.addresses if address.version == host_address.version)
        return next(same, self.addresses[0])


def lease_endpoint(mapping: PortMapping) -> Endpoint:
    """Return the endpoint of a lease: the container's address, on no network of gangway's."""
    return Endpoint(mapping.container, network="", addresses=(parse_address(mapping.container),))


def bridge_name(network: str) -> str:
    """Return the default name of a network's bridge; a long one is cut, and made unique by a digest."""
    name, digest = f"gw-{network}", blake2s(network.encode(), digest_size=3).hexdigest()
    return name if len(name) <= _INTERFACE_NAME_BYTES else f"{name[: _INTERFACE_NAME_BYTES - 7]}-{digest}"


def default_mtu(uplink: int | None, subnets: Collection[Subnet]) -> int:
    """Return a new network's MTU: that of the host's uplink, if it has one and the subnets allow it."""
    return min(max(uplink or _ETHERNET_MTU, _smallest_mtu(subnets)), _MAX_MTU)


def require_no_conflict(network: Network, others: Iterable[Network]) -> None:
    """Conflict: one of `others` has this network's name, its bridge, or some of its addresses."""
    for other in others:
        if other.name == network.name:
            raise Conflict(f"network {network.name} exists already")
        if other.bridge == network.bridge:
            raise Conflict(f"bridge {network.bridge} belongs to network {other.name} already")
        for own, foreign in product(network.subnets, other.subnets):
            if own.version == foreign.version and own.overlaps(foreign):
                raise Conflict(f"subnet {own} overlaps {foreign} of network {other.name}")


def check_container(container: str, namespace: str | None) -> None:
    """InvalidRequest: these cannot be a container's name and the path of its network namespace."""
    names_place = "/" in container or container.startswith("pid:")
    limit = _MAX_PATH_BYTES if names_place else _MAX_NAME_BYTES
    if not _is_printable(container, limit) or (" " in container and not names_place):
        rule = f"use at most {limit} bytes, no spaces and no control characters"
        raise InvalidRequest(f"invalid container {container!r}: {rule}")
    if namespace is not None and names_place:
        raise InvalidRequest(f"invalid container name {container!r}: it names another namespace than {namespace}")
    if namespace is not None and not _is_printable(namespace, _MAX_PATH_BYTES):
        rule = f"use at most {_MAX_PATH_BYTES} bytes, and no control characters"
        raise InvalidRequest(f"invalid path of a namespace {namespace!r}: {rule}")


def any_address(address: Address) -> Address:
    """Return the unspecified address of the same family."""
    return ANY[address.version == 6]


def _smallest_mtu(subnets: Collection[Subnet]) -> int:
    return max((_MIN_MTU[subnet.version] for subnet in subnets), default=0)


def _is_printable(text: str, limit: int) -> bool:
    return bool(text) and text.isprintable() and len(text.encode(errors="replace")) <= limit


def _check_host_address(address: Address) -> None:
    if address.is_multicast or address == _IPV4_BROADCAST:
        kind = "multicast" if address.is_multicast else "broadcast"
        raise InvalidRequest(f"{address} is a {kind} address: publish on an address of this host")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        raise InvalidRequest(f"{address} is an IPv4 address in IPv6 notation: write {address.ipv4_mapped}")


def _check_subnet(subnet: Subnet, gateway: Address) -> None:
    for kind in ("multicast", "loopback", "link_local"):
        if getattr(subnet, f"is_{kind}"):
            raise InvalidRequest(f"invalid subnet {subnet}: these are {kind.replace('_', '-')} addresses")
    if subnet.network_address.is_unspecified:
        raise InvalidRequest(f"invalid subnet {subnet}: it includes {subnet.network_address}")
    if gateway not in subnet:
        raise InvalidRequest(f"gateway {gateway} is not in subnet {subnet}")
    if subnet.num_addresses < 3:
        raise InvalidRequest(f"subnet {subnet} has no room for a gateway and a container")
    if gateway == subnet.network_address or (subnet.version == 4 and gateway == subnet.broadcast_address):
        raise InvalidRequest(f"gateway {gateway} is not a host address of {subnet}")
