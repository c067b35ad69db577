"""The index of host ports: which mapping has a port of an address.

Other programs' ports are not in it.
"""

from collections.abc import Iterator
from threading import RLock

from gangway.errors import Conflict
from gangway.inet import format_host
from gangway.intervals import Intervals
from gangway.model import Address, PortMapping, Protocol, Source, any_address

_Table = dict[Protocol, dict[Address, Intervals[PortMapping]]]


class PortIndex:
    """The mappings of a host by protocol, address and port.  Thread-safe: requests and leases share it.

    A port that Docker publishes may be in it twice: as a launcher's lease, and as Docker's API has it.

    The cost of a lookup does not depend on how many there are, nor on the length of their ranges.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._mappings: _Table = {one: {} for one in Protocol}
        self._leases: _Table = {one: {} for one in Protocol}

    def add(self, mapping: PortMapping) -> None:
        """Add a mapping.  Conflict: another mapping has a port of it."""
        ports = mapping.host_ports
        with self._lock:
            self.require_free(mapping)
            intervals = self._table(mapping)[mapping.protocol].setdefault(mapping.host_address, Intervals())
            intervals.add(ports.first, ports.last, mapping)

    def remove(self, mapping: PortMapping) -> None:
        """Remove a mapping.  KeyError: it is not in the index."""
        by_address = self._table(mapping)[mapping.protocol]
        with self._lock:
            by_address[mapping.host_address].remove(mapping.host_ports.first)
            if not by_address[mapping.host_address]:
                del by_address[mapping.host_address]

    def replace(self, mapping: PortMapping, renamed: PortMapping) -> None:
        """Replace a mapping by one of the same ports, of which nobody can take one meanwhile."""
        with self._lock:
            self.remove(mapping)
            self.add(renamed)

    def require_free(self, mapping: PortMapping) -> None:
        """Conflict: another mapping has a port of this one."""
        other = self.collision(mapping)
        if other is not None:
            at = f"{format_host(other.host_address)}:{other.host_ports}/{other.protocol}"
            is_dockers = other.source in (Source.DOCKER, Source.LEASE)
            by = "published by Docker for" if is_dockers else "already published for container"
            raise Conflict(f"{at} is {by} {other.container}: choose another port")

    def collision(self, mapping: PortMapping) -> PortMapping | None:
        """Return a mapping in the index that has a port of this one; None if there is none."""
        first, last = mapping.host_ports.first, mapping.host_ports.last
        with self._lock:
            found = (other for near in self._near(mapping) for other in near.overlapping(first, last))
            return next((other for other in found if not _may_share(mapping, other)), None)

    def at(self, protocol: Protocol, address: Address, port: int) -> PortMapping | None:
        """Return the mapping that serves clients of an address and port, rather than a lease; None if there is none."""
        tables = self._mappings[protocol], self._leases[protocol]
        addresses = address, any_address(address)
        with self._lock:
            found = (table[one].at(port) for table in tables for one in addresses if one in table)
            return next((mapping for mapping in found if mapping is not None), None)

    def with_port(self, protocol: Protocol, port: int) -> tuple[PortMapping, ...]:
        """Return the mappings of a port at any address."""
        with self._lock:
            tables = self._mappings[protocol], self._leases[protocol]
            found = (mappings.at(port) for table in tables for mappings in table.values())
            return tuple(mapping for mapping in found if mapping is not None)

    def _table(self, mapping: PortMapping) -> "_Table":
        return self._leases if mapping.source is Source.LEASE else self._mappings

    def _near(self, mapping: PortMapping) -> Iterator[Intervals[PortMapping]]:
        """Yield the mappings of each address at which this one could collide."""
        at = mapping.host_address
        for by_address in (self._mappings[mapping.protocol], self._leases[mapping.protocol]):
            if at.is_unspecified:
                yield from (mappings for address, mappings in by_address.items() if address.version == at.version)
            else:
                yield from (by_address[one] for one in (at, any_address(at)) if one in by_address)


def _may_share(one: PortMapping, other: PortMapping) -> bool:
    """True if both are the same port of Docker's: by its API, and by the lease of its launcher; or if one is not at an
    address of the host."""
    is_same = Source.LEASE in (one.source, other.source) and (one.is_held or other.is_held)
    return is_same or one.is_routed is not other.is_routed
