"""What Docker's API says, turned into what gangway adopts.

What this file knows: the fields of `/networks` and `/containers/ID/json`.  What it must not know: how they are read.

Facts that it leans on, seen with dockerd 20.10 and 28.5:
- Running is true for a container that waits to be restarted, too; it then has no process.
- Ports are published at the network that has the container's default route.  That is one with both IP versions, if
  there is one; of several the one with the highest GwPriority (since 28), then the first by name.  An internal network
  has no such route.
- A network created without a gateway has none in the answers of 20.10.  dockerd takes the first address of the range
  for containers (IPRange), or else the subnet's first.
- With `iptables: false` the default bridge's masquerade reads false whatever was configured; other networks' is right.
- For a port without a host address dockerd has a socket at 0.0.0.0, and at :: only if the container has IPv6.
- For an IP version with the gateway mode `routed` a published port has the host address 0.0.0.0 or ::, whatever was
  requested, and no host port: an empty one, or 0.  dockerd then opens the port at the container's own address.  With
  `isolated` the bridge has no address of the IP version, and containers get the subnet's first one.
- A container's SandboxKey is a mount, which only dockerd's mount namespace may have; its process is seen everywhere.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from ipaddress import ip_network
from itertools import groupby
from typing import NamedTuple

import msgspec

from gangway.addressing import first_gateway
from gangway.admission import parse_label
from gangway.errors import InvalidRequest
from gangway.model import (
    ANY,
    DOCKER_PREFIX,
    Address,
    Endpoint,
    Network,
    PortMapping,
    PortRange,
    Protocol,
    Source,
    Subnet,
    parse_address,
)
from gangway.state.adopted import Adopted, AdoptedContainer

BIND_LABEL = "gangway.bind"
"""The label of a container or network with the host address of ports that are published without one."""
FROM_LABEL = "gangway.from"
"""The label of a container or network with the subnets of clients that may reach its ports, separated by commas."""
_BRIDGE = "com.docker.network.bridge."
_MTU = "com.docker.network.driver.mtu"

_parse_host_address = lru_cache(64)(parse_address)  # thousands of ports have the same


class _Answer(msgspec.Struct, rename="pascal"):
    """A part of an answer; fields that are not named here are skipped.  Go writes null for an empty map or list."""


class _Pool(_Answer):
    subnet: str
    gateway: str = ""  # some releases write the prefix length with it
    ip_range: str = msgspec.field(default="", name="IPRange")


class _Ipam(_Answer):
    config: list[_Pool] | None = None


class DockerNetwork(_Answer):
    """A network of `/networks`."""

    id: str
    name: str
    driver: str
    internal: bool = False
    has_ipv4: bool = msgspec.field(default=True, name="EnableIPv4")  # since 28
    has_ipv6: bool = msgspec.field(default=False, name="EnableIPv6")
    config_only: bool = False
    ipam: _Ipam = msgspec.field(default_factory=_Ipam, name="IPAM")
    options: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class _State(_Answer):
    running: bool
    pid: int


class _Binding(_Answer):
    host_ip: str = ""
    host_port: str = ""


_Bindings = dict[str, list[_Binding] | None]
"""By container port and protocol: `80/tcp`."""


class _HostConfig(_Answer):
    port_bindings: _Bindings | None = None  # as requested
    network_mode: str = ""  # `default`, `host`, `none`, `container:ID`, or the name of a network


class _Config(_Answer):
    labels: dict[str, str] | None = None


class _Attachment(_Answer):
    network_id: str = msgspec.field(default="", name="NetworkID")
    ipv4_address: str = msgspec.field(default="", name="IPAddress")
    ipv6_address: str = msgspec.field(default="", name="GlobalIPv6Address")
    gw_priority: int = 0


class _NetworkSettings(_Answer):
    ports: _Bindings | None = None  # as published
    networks: dict[str, _Attachment] | None = None


class DockerContainer(_Answer):
    """The answer of `/containers/ID/json`."""

    id: str
    name: str
    state: _State
    config: _Config
    host_config: _HostConfig
    network_settings: _NetworkSettings


class _ListedSettings(_Answer):
    networks: dict[str, _Attachment] | None = None


class ListedContainer(_Answer):
    """A container of `/containers/json`."""

    id: str
    names: list[str] | None = None  # its own, and its aliases in other containers: `/box/web`
    state: str = ""
    network_settings: _ListedSettings = msgspec.field(default_factory=_ListedSettings)

    @property
    def name(self) -> str:
        return min(self.names or [self.id[:12]], key=lambda name: name.count("/")).removeprefix("/")

    def addresses(self) -> Iterator[str]:
        for one in (self.network_settings.networks or {}).values():
            yield from filter(None, (one.ipv4_address, one.ipv6_address))


class Bridge(NamedTuple):
    """A network of Docker's, with its labels."""

    network: Network
    labels: Mapping[str, str]


class View:
    """What Docker has, as far as it was read: networks and containers by their ids, and why some are left out.

    `has_rules`: gangway is to carry Docker's networks and published ports; False: dockerd does.
    """

    def __init__(self, has_rules: bool = True) -> None:
        self._has_rules = has_rules
        self._bridges: dict[str, Bridge] = {}
        self._names: dict[str, str] = {}  # of all containers
        self._containers: dict[str, AdoptedContainer] = {}  # those that run on a bridge network
        self._network_problems: list[str] = []
        self._container_problems: dict[str, str] = {}

    @property
    def adopted(self) -> Adopted:
        """What gangway is to serve: a container's network is always among the networks."""
        networks = tuple(bridge.network for bridge in self._bridges.values())
        names = {network.name for network in networks}
        containers = tuple(one for one in self._containers.values() if one.endpoint.network in names)
        running = {one.id for one in containers}
        return Adopted(networks, containers, {one: name for one, name in self._names.items() if one not in running})

    @property
    def problems(self) -> tuple[str, ...]:
        """What cannot be served, and why: a sentence for each network and container."""
        return *self._network_problems, *self._container_problems.values()

    def use_networks(self, networks: Iterable[DockerNetwork]) -> None:
        """Replace all networks by what was read."""
        self._bridges.clear()
        self._network_problems.clear()
        for one in networks:
            if one.driver == "bridge" and not one.config_only:
                try:
                    network = replace(read_network(one), has_rules=self._has_rules)
                    self._bridges[one.id] = Bridge(network, one.labels or {})
                except (InvalidRequest, ValueError) as error:
                    self._network_problems.append(f"network {one.name} of Docker's is not served: {error}")

    def use_container(self, container: DockerContainer) -> None:
        """Replace a container by what was read; it is stopped if it does not run, or is on no bridge network."""
        name = self.name_container(container.id, container.name)
        self.stop_container(container.id)
        found = _gateway_attachment(container, self._bridges)
        if found is None:
            return
        bridge, attachment = found
        addresses = tuple(parse_address(text) for text in (attachment.ipv4_address, attachment.ipv6_address) if text)
        mappings: tuple[PortMapping, ...] = ()
        try:
            if self._has_rules:
                mappings = tuple(_own_mappings(name, container, bridge, addresses))
        except (InvalidRequest, ValueError) as error:
            self._container_problems[container.id] = f"ports of container {name} are not published: {error}"
        endpoint, namespace = Endpoint(name, bridge.network.name, addresses), f"/proc/{container.state.pid}/ns/net"
        self._containers[container.id] = AdoptedContainer(container.id, endpoint, namespace, mappings)

    def name_container(self, container_id: str, name: str) -> str:
        """Add a container, or rename it; return its name here."""
        self._names[container_id] = DOCKER_PREFIX + name.removeprefix("/")
        return self._names[container_id]

    def stop_container(self, container_id: str) -> None:
        """Record that a container does not run; it may be unknown."""
        self._containers.pop(container_id, None)
        self._container_problems.pop(container_id, None)

    def remove_container(self, container_id: str) -> None:
        """Remove a container, which may be unknown."""
        self.stop_container(container_id)
        self._names.pop(container_id, None)


def read_network(found: DockerNetwork) -> Network:
    """Return a bridge network.  InvalidRequest, ValueError: gangway cannot serve it."""
    options = found.options or {}
    pools = [(ip_network(pool.subnet, strict=False), pool) for pool in found.ipam.config or ()]
    pools = [(subnet, pool) for subnet, pool in pools if (found.has_ipv6 if subnet.version == 6 else found.has_ipv4)]
    pools.sort(key=lambda one: one[0].version)  # some releases list IPv6 first
    modes = {family: options.get(f"{_BRIDGE}gateway_mode_ipv{family}", "nat") for family in (4, 6)}
    is_default = _is_set(options, "default_bridge", default=False)
    return Network(
        name=DOCKER_PREFIX + found.name,
        bridge=options.get(f"{_BRIDGE}name") or f"br-{found.id[:12]}",
        subnets=tuple(subnet for subnet, _ in pools),
        gateways=tuple(_gateway(subnet, pool, modes[subnet.version]) for subnet, pool in pools),
        masquerade=is_default or _is_set(options, "enable_ip_masquerade", default=True),
        icc=_is_set(options, "enable_icc", default=True),
        internal=found.internal,
        mtu=int(options.get(_MTU) or 0) or Network.mtu,
        source=Source.DOCKER,
        routed=frozenset(family for family, mode in modes.items() if mode == "routed"),
    )


def merge_ports(ports: Iterable[int]) -> Iterator[PortRange]:
    """Yield the fewest ranges that have these ports, in order."""
    for _, run in groupby(enumerate(sorted(set(ports))), key=lambda pair: pair[1] - pair[0]):
        first, *rest = (port for _, port in run)
        yield PortRange(first, rest[-1] if rest else first)


def _is_set(options: Mapping[str, str], name: str, default: bool) -> bool:
    """Return a boolean option of a bridge, which Go wrote (strconv.ParseBool)."""
    value = options.get(_BRIDGE + name)
    return value.lower() in ("1", "t", "true") if value else default


def _gateway(subnet: Subnet, pool: _Pool, mode: str) -> Address:
    """Return the bridge's address in a subnet; if it has none, the address that a container gets last."""
    if mode == "isolated":
        return subnet[-2]
    if pool.gateway:
        return parse_address(pool.gateway.partition("/")[0])
    first = ip_network(pool.ip_range, strict=False).network_address if pool.ip_range else subnet.network_address
    return first_gateway(subnet) if first == subnet.network_address else first


def _gateway_attachment(container: DockerContainer, bridges: Mapping[str, Bridge]) -> tuple[Bridge, _Attachment] | None:
    """Return the bridge network of a running container's default route; None if it does not run or is on none."""

    def order(one: tuple[Bridge, _Attachment]) -> tuple[bool, bool, int, str]:
        network, attachment = one[0].network, one[1]
        is_dual = bool(attachment.ipv4_address and attachment.ipv6_address)
        return network.internal, not is_dual, -attachment.gw_priority, network.name

    if not (container.state.running and container.state.pid):
        return None
    attachments = (container.network_settings.networks or {}).values()
    attached = (one for one in attachments if one.ipv4_address or one.ipv6_address)
    return min(
        ((bridges[one.network_id], one) for one in attached if one.network_id in bridges), key=order, default=None
    )


def _own_mappings(
    name: str, container: DockerContainer, bridge: Bridge, addresses: Iterable[Address]
) -> Iterator[PortMapping]:
    """Yield the mappings of a container's published ports.  InvalidRequest, ValueError: a port or label is invalid."""
    labels = {**bridge.labels, **(container.config.labels or {})}
    admitted = parse_label(labels[FROM_LABEL]) if FROM_LABEL in labels else ()
    yield from _mappings(name, _published(container, bridge.network, labels.get(BIND_LABEL, "")), admitted)
    yield from _mappings(name, _opened(container, bridge.network, addresses), admitted, is_routed=True)


class _Port(NamedTuple):
    """One published port."""

    protocol: Protocol
    address: Address  # of the host
    is_held: bool
    host_port: int
    container_port: int


def _published(container: DockerContainer, network: Network, bind: str) -> Iterator[_Port]:
    """Yield a container's published ports, one by one, as often as they have host addresses; `bind` is the usual."""
    requested = container.host_config.port_bindings or {}
    usual = (parse_address(bind),) if bind else ANY
    for key, bindings in (container.network_settings.ports or {}).items():
        number, _, protocol = key.partition("/")
        port = partial(_Port, Protocol.parse(protocol), container_port=int(number))
        held: dict[int, set[int]] = {4: set(), 6: set()}  # at all addresses, as none was requested
        for host_ip, host_port in ((one.host_ip, int(one.host_port or 0)) for one in bindings or ()):
            if not host_port:
                continue  # the IP version is routed: `_opened`
            address = _parse_host_address(host_ip)
            if address in ANY and _is_without_address(requested.get(key), host_port):
                held[address.version].add(host_port)
            else:
                yield port(address, True, host_port)
        for address in usual:
            if address.version not in network.routed:
                own = held[address.version]
                yield from (port(address, bool(own), host_port) for host_port in own or held[4] | held[6])


def _opened(container: DockerContainer, network: Network, addresses: Iterable[Address]) -> Iterator[_Port]:
    """Yield a container's published ports at its own addresses, one by one, some more than once."""
    own = {address.version: address for address in addresses if address.version in network.routed}
    for key, bindings in (container.network_settings.ports or {}).items():
        number, _, protocol = key.partition("/")
        for one in bindings or ():
            family = _parse_host_address(one.host_ip or "0.0.0.0").version
            if not int(one.host_port or 0) and family in own:
                yield _Port(Protocol.parse(protocol), own[family], False, int(number), int(number))


def _is_without_address(requested: list[_Binding] | None, host_port: int) -> bool:
    """True if a host port was requested without a host address: by `-p 80:80`, or by `-P`, which requests none."""
    for one in requested or [_Binding()]:
        first, _, last = one.host_port.partition("-")
        if not one.host_ip and (first in ("", "0") or int(first) <= host_port <= int(last or first)):
            return True
    return False


def _mappings(
    name: str, ports: Iterable[_Port], admitted: tuple[Subnet, ...], is_routed: bool = False
) -> Iterator[PortMapping]:
    """Yield the fewest mappings that have these ports: those with the same distance are one where they can be."""
    alike: dict[tuple[Protocol, Address, bool, int], list[int]] = defaultdict(list)
    for one in ports:
        alike[one.protocol, one.address, one.is_held, one.container_port - one.host_port].append(one.host_port)
    for (protocol, address, is_held, distance), host_ports in alike.items():
        for found in merge_ports(host_ports):
            container_ports = PortRange(found.first + distance, found.last + distance)
            where = protocol, address, found, container_ports
            yield PortMapping(name, *where, Source.DOCKER, is_held, admitted, is_routed)
