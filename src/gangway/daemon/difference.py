"""What is declared, compared with what there is: the requests that make the one of the other.

What this file knows: what belongs to the files of conf.d (its source is `declared`) and may be removed when no file
declares it, and what was typed and stays.  What it must not know: how a request is carried out.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from itertools import chain
from typing import NamedTuple

from gangway.daemon.declaration import Declaration, DeclaredContainer, DeclaredNetwork
from gangway.errors import Conflict
from gangway.model import (
    ANY,
    ON_DEMAND,
    Address,
    Endpoint,
    Network,
    PortMapping,
    PortRange,
    PortRequest,
    Protocol,
    Source,
    Subnet,
    Subnets,
)
from gangway.state.port_index import PortIndex


@dataclass(frozen=True)
class Current:
    """What there is, whoever has requested it."""

    networks: tuple[Network, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    mappings: tuple[PortMapping, ...] = ()


class Unpublish(NamedTuple):
    container: str
    mappings: tuple[PortMapping, ...]

    def __str__(self) -> str:
        return f"- publish {self.container}: {', '.join(map(str, self.mappings))}"


class Detach(NamedTuple):
    container: str
    network: str

    def __str__(self) -> str:
        return f"- attach {self.container}: network {self.network}"


class RemoveNetwork(NamedTuple):
    name: str

    def __str__(self) -> str:
        return f"- network {self.name}"


class CreateNetwork(NamedTuple):
    declared: DeclaredNetwork

    def __str__(self) -> str:
        request = self.declared.request
        return f"+ network {request.name}: {', '.join(request.subnets) or 'free subnets'}"


class Attach(NamedTuple):
    container: str
    network: str
    addresses: tuple[Address, ...]

    def __str__(self) -> str:
        return f"+ attach {self.container}: network {self.network}{''.join(f', {one}' for one in self.addresses)}"


class Publish(NamedTuple):
    """Publish ports of a container that are all for the same clients."""

    container: str
    requests: tuple[PortRequest, ...]

    def __str__(self) -> str:
        clients = ", ".join(map(str, self.requests[0].admitted))
        ports = ", ".join(map(str, self.requests))
        return f"+ publish {self.container}: {ports}{clients and f' from {clients}'}"


Step = Unpublish | Detach | RemoveNetwork | CreateNetwork | Attach | Publish


def what(step: Step) -> str:
    """Return what a step makes or removes, without the sign."""
    return str(step)[2:]


class Difference(NamedTuple):
    steps: tuple[Step, ...]  # in this order
    notes: tuple[str, ...]  # what cannot be as it is declared, and why


class Match(NamedTuple):
    """How a container's mappings are those that are requested."""

    missing: tuple[PortRequest, ...]  # requests without a mapping
    unclaimed: tuple[PortMapping, ...]  # mappings that nobody requests


_Key = tuple[Protocol, Address, PortRange | None, PortRange, Subnets]


def match(requests: Iterable[PortRequest], mappings: Sequence[PortMapping], has_ipv6: bool = True) -> Match:
    """Find the mappings that each request has led to: none belongs to two of them.

    A request that leaves a choice of the host port has what is left by those that do not.  If the host has no IPv6,
    one that names no address has no mapping at `::`.
    """
    left = {_key(one): one for one in mappings}
    missing = list[PortRequest]()
    for request in sorted(requests, key=lambda one: one.is_choice):
        addresses = _host_addresses(request, has_ipv6)
        ports = _chosen_ports(request, addresses, left.values()) if request.is_choice else request.host_ports
        keys = [(request.protocol, at, ports, request.container_ports, request.admitted) for at in addresses]
        if ports is None or not left.keys() >= {*keys}:
            missing.append(request)
            continue
        for key in keys:
            del left[key]
    return Match(tuple(missing), tuple(left.values()))


def compare(
    declared: Declaration,
    current: Current,
    exists: Callable[[str], bool],
    is_complete: bool = True,
    has_ipv6: bool = True,
) -> Difference:
    """Return what makes `current` what is declared, as far as the containers exist.

    What no file declares is removed if a file has declared it, unless a file could not be read: not `is_complete`.
    Of networks and containers that files contradict each other about, nothing is removed.
    """
    comparison = _Comparison(declared, current, exists, is_complete, has_ipv6)
    removals = tuple(comparison.removals())
    return Difference((*removals, *comparison.additions()), tuple(comparison.notes))


def check_free(steps: Sequence[Step], current: Current, has_ipv6: bool = True) -> None:
    """Conflict: a step publishes a port that a mapping of gangway's or Docker's has when its turn comes.

    Whether another program has a port, or any is left where there is a choice, is known only when it is published.
    """
    index = PortIndex()
    for mapping in _not_removed(steps, current):
        index.add(mapping)
    for step in (one for one in steps if isinstance(one, Publish)):
        try:
            for request in step.requests:
                for mapping in _fixed_mappings(step.container, request, has_ipv6):
                    index.add(mapping)
        except Conflict as error:
            raise Conflict(f"{what(step)}: {error}") from None


def _fixed_mappings(container: str, request: PortRequest, has_ipv6: bool) -> Iterator[PortMapping]:
    """Yield the mappings that a request leads to, unless it leaves a choice of the host port."""
    if request.host_ports is not None and not request.is_choice:
        ports = request.host_ports, request.container_ports
        for address in _host_addresses(request, has_ipv6):
            yield PortMapping(container, request.protocol, address, *ports, request.source)


def _not_removed(steps: Iterable[Step], current: Current) -> Iterator[PortMapping]:
    """Yield the mappings that steps leave: with a container's first endpoint it loses its mappings."""
    networks = {one.container: one.network for one in current.endpoints if one.is_first}
    unpublished, detached = set[PortMapping](), set[str]()
    for step in steps:
        if isinstance(step, Unpublish):
            unpublished.update(step.mappings)
        elif isinstance(step, Detach) and networks[step.container] == step.network:
            detached.add(step.container)
    for one in current.mappings:
        if one not in unpublished and one.container not in detached:
            yield one


class _Comparison:
    def __init__(
        self,
        declared: Declaration,
        current: Current,
        exists: Callable[[str], bool],
        is_complete: bool,
        has_ipv6: bool,
    ) -> None:
        self._declared, self._exists = declared, exists
        self._is_complete, self._has_ipv6 = is_complete, has_ipv6
        self._networks = {one.name: one for one in current.networks}
        self._endpoints = defaultdict[str, list[Endpoint]](list)  # by container, the first one first
        for endpoint in current.endpoints:
            self._endpoints[endpoint.container].append(endpoint)
        self._mappings = defaultdict[str, list[PortMapping]](list)
        for mapping in current.mappings:
            self._mappings[mapping.container].append(mapping)
        self._missing = dict[str, tuple[PortRequest, ...]]()
        # A container that stays needs its network.
        needed = {one.network for one in current.endpoints if one.container in declared.unknown_containers}
        self._kept_networks = declared.unknown_networks | needed
        self.notes: list[str] = []

    def removals(self) -> Iterator[Step]:
        """Yield the requests that remove what is not declared, or otherwise; of what is left, keep what is missing."""
        stale = [name for name, one in self._networks.items() if self._is_stale(one)]
        for endpoints in self._endpoints.values():
            for endpoint in [*self._to_detach(endpoints, stale)]:
                yield Detach(endpoint.container, endpoint.network)
                endpoints.remove(endpoint)
                if endpoint.is_first:
                    self._mappings.pop(endpoint.container, None)
        for container in {**self._mappings, **self._declared.containers}:
            yield from self._unpublished(container)
        for name in stale:
            attached = sorted(
                one.container for found in self._endpoints.values() for one in found if one.network == name
            )
            if attached:
                self.notes.append(f"network {name} stays as it is: {', '.join(attached)} is attached by command")
            else:
                yield RemoveNetwork(name)
                del self._networks[name]

    def additions(self) -> Iterator[Step]:
        """Yield the requests that make what is missing."""
        for name, declared in self._declared.networks.items():
            if name not in self._networks:
                yield CreateNetwork(declared)
            elif self._networks[name].source is not Source.DECLARED and not declared.request.describes(
                self._networks[name]
            ):
                self.notes.append(
                    f"network {name} is another one than {declared.file} declares: gangway network rm {name}"
                )
        for wanted in self._declared.containers.values():
            yield from self._served(wanted)

    def _served(self, wanted: DeclaredContainer) -> Iterator[Step]:
        endpoints = self._endpoints.get(wanted.name)
        networks = wanted.networks or (ON_DEMAND,)
        if not endpoints:
            if not self._exists(wanted.name):
                return
            if not wanted.is_dockers:
                yield self._attach(wanted, networks[0])
        elif self._is_elsewhere(wanted):
            self._note_otherwise(wanted, endpoints[0])
            return
        groups = defaultdict[Subnets, list[PortRequest]](list)
        for request in self._missing.get(wanted.name, ()):
            groups[request.admitted].append(request)
        yield from (Publish(wanted.name, tuple(requests)) for requests in groups.values())
        further = {one.network: one for one in endpoints or () if not one.is_first}
        for network in networks[1:]:  # after the ports, which do not depend on it
            if network not in further:
                yield self._attach(wanted, network)
            elif not self._has_addresses(further[network], wanted):
                self._note_otherwise(wanted, further[network])

    def _attach(self, wanted: DeclaredContainer, network: str) -> Attach:
        return Attach(wanted.name, network, tuple(sorted(self._addresses(wanted, network), key=str)))

    def _note_otherwise(self, wanted: DeclaredContainer, endpoint: Endpoint) -> None:
        if wanted.name not in self._declared.unknown_containers:
            which = "" if endpoint.is_first else f" --network {endpoint.network}"
            self.notes.append(
                f"container {wanted.name} is attached to network {endpoint.network} otherwise than {wanted.file} "
                f"declares: gangway detach {wanted.name}{which}"
            )

    def _unpublished(self, container: str) -> Iterator[Step]:
        wanted = self._declared.containers.get(container)
        if wanted is not None and self._is_elsewhere(wanted):
            wanted = None
        requests = () if wanted is None else tuple(one.request for one in wanted.ports)
        self._missing[container], unclaimed = match(requests, self._mappings.get(container, ()), self._has_ipv6)
        stale = tuple(one for one in unclaimed if one.source is Source.DECLARED)
        if stale and self._is_complete and container not in self._declared.unknown_containers:
            yield Unpublish(container, stale)

    def _is_elsewhere(self, wanted: DeclaredContainer) -> bool:
        """True if a container is attached otherwise than it is declared, and stays so: its ports are not served."""
        endpoints = self._endpoints.get(wanted.name)
        if not endpoints or wanted.is_dockers:
            return False
        return not self._is_first_as_declared(endpoints[0], wanted)

    def _is_stale(self, network: Network) -> bool:
        if network.source is not Source.DECLARED or network.name in self._kept_networks:
            return False
        wanted = self._declared.networks.get(network.name)
        return self._is_complete if wanted is None else not wanted.request.describes(network)

    def _to_detach(self, endpoints: Sequence[Endpoint], stale: Collection[str]) -> Iterator[Endpoint]:
        """Yield those of a container's endpoints that are to be removed: the first one last, with all others."""
        first, *further = endpoints
        if first.container in self._declared.unknown_containers:
            return
        if self._is_undeclared(first, first, stale):
            if not (typed := self._typed(first.container, further)):
                yield from reversed(endpoints)
                return
            self.notes.append(f"container {first.container} stays attached: {typed}")
        yield from (one for one in reversed(further) if self._is_undeclared(one, first, stale))

    def _is_undeclared(self, endpoint: Endpoint, first: Endpoint, stale: Collection[str]) -> bool:
        """True if a file has declared an endpoint, and it is declared no longer, or otherwise, or its network is."""
        wanted = self._declared.containers.get(endpoint.container)
        if endpoint.source is not Source.DECLARED:
            return False
        if wanted is None:
            return self._is_complete
        if not self._is_first_as_declared(first, wanted):
            return endpoint.is_first or self._is_complete
        if not endpoint.is_first and endpoint.network not in wanted.networks:
            return self._is_complete
        return endpoint.network in stale or not self._has_addresses(endpoint, wanted)

    def _typed(self, container: str, further: Iterable[Endpoint]) -> str:
        """Return what commands have added to a container; empty if nothing."""
        if ports := [one for one in self._mappings.get(container, ()) if one.source is Source.API]:
            return f"{', '.join(map(str, ports))} is published by command"
        networks = [one.network for one in further if one.source is Source.API]
        return f"network {', '.join(networks)} was joined by command" if networks else ""

    def _is_first_as_declared(self, endpoint: Endpoint, wanted: DeclaredContainer) -> bool:
        """True if a container's first endpoint has the network and addresses that are declared.

        If no network is named, one that was typed may have any.
        """
        is_any = not wanted.networks and endpoint.source is not Source.DECLARED
        is_same = is_any or endpoint.network == (wanted.networks or (ON_DEMAND,))[0]
        return is_same and self._has_addresses(endpoint, wanted)

    def _has_addresses(self, endpoint: Endpoint, wanted: DeclaredContainer) -> bool:
        """True if an endpoint has the addresses that are declared of its network."""
        return self._addresses(wanted, endpoint.network) <= set(endpoint.addresses)

    def _addresses(self, wanted: DeclaredContainer, network: str) -> frozenset[Address]:
        """Return the declared addresses of a container on a network: on the first one, what is in no further one.

        While the subnets of a further one are not known, what is not in the first one's may be in these.
        """
        further = {name: self._subnets(name) for name in wanted.networks[1:]}
        if network in further:
            return _within(wanted.addresses, further[network])
        left = wanted.addresses - _within(wanted.addresses, chain.from_iterable(further.values()))
        own = self._subnets(network)
        return _within(left, own) if own and not all(further.values()) else left

    def _subnets(self, network: str) -> Subnets:
        """Return the subnets of a network: those that are declared, or else those that it has."""
        declared = self._declared.networks.get(network)
        if declared is not None and declared.request.subnets:
            return tuple(map(ip_network, declared.request.subnets))
        return self._networks[network].subnets if network in self._networks else ()


def _within(addresses: frozenset[Address], subnets: Iterable[Subnet]) -> frozenset[Address]:
    found = tuple(subnets)
    return frozenset(one for one in addresses if any(one in subnet for subnet in found))


def _key(mapping: PortMapping) -> _Key:
    return mapping.protocol, mapping.host_address, mapping.host_ports, mapping.container_ports, mapping.admitted


def _host_addresses(request: PortRequest, has_ipv6: bool) -> tuple[Address, ...]:
    """Return the addresses of a request: without `::`, which it did not name, if the host has no IPv6."""
    return ANY[:1] if request.host_addresses == ANY and not has_ipv6 else request.host_addresses


def _chosen_ports(
    request: PortRequest, addresses: Sequence[Address], mappings: Iterable[PortMapping]
) -> PortRange | None:
    """Return the host ports that were chosen for a request, at all of its addresses: those of files first."""
    found = [one for one in mappings if request.names(one) and one.admitted == request.admitted]
    found.sort(key=lambda one: (one.source is not Source.DECLARED, one.host_ports.first))
    at = defaultdict[PortRange, set[Address]](set)
    for one in found:
        at[one.host_ports].add(one.host_address)
    return next((ports for ports, known in at.items() if known.issuperset(addresses)), None)
