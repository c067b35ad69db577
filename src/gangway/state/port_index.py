"""Which mapping has a host port.

What this file knows: that two mappings cannot have one port of one address.  What it must not know: other programs, how
a port is taken.
"""

from collections.abc import Iterator

from gangway.errors import Conflict
from gangway.intervals import Intervals
from gangway.model import Address, PortMapping, Protocol, Source, any_of, in_brackets


class PortIndex:
    """The mappings of a host, by protocol, address and port: whether one more fits costs the same however many there
    are, and however long they are."""

    def __init__(self) -> None:
        self._found: dict[Protocol, dict[Address, Intervals[PortMapping]]] = {protocol: {} for protocol in Protocol}

    def add(self, mapping: PortMapping) -> None:
        """One more.  Conflict: a port of it is another's."""
        self.require_free(mapping)
        ports = mapping.host_ports
        place = self._found[mapping.protocol].setdefault(mapping.host_address, Intervals())
        place.add(ports.first, ports.last, mapping)

    def remove(self, mapping: PortMapping) -> None:
        """One less."""
        places = self._found[mapping.protocol]
        places[mapping.host_address].remove(mapping.host_ports.first)
        if not places[mapping.host_address]:
            del places[mapping.host_address]

    def require_free(self, mapping: PortMapping) -> None:
        """Conflict: another mapping has a port of this one."""
        other = self.collision(mapping)
        if other is not None:
            raise Conflict(_conflict_text(other))

    def collision(self, mapping: PortMapping) -> PortMapping | None:
        """One that has a port of it already, if there is one."""
        ports = mapping.host_ports
        return next((one for place in self._near(mapping) for one in place.overlapping(ports.first, ports.last)), None)

    def at(self, protocol: Protocol, address: Address, port: int) -> PortMapping | None:
        """The mapping that a client meets who asks there."""
        places = (self._found[protocol].get(one) for one in (address, any_of(address)))
        return next((one for place in places if place is not None and (one := place.at(port)) is not None), None)

    def _near(self, mapping: PortMapping) -> Iterator[Intervals[PortMapping]]:
        """What there is at addresses where it would be in the way."""
        at, places = mapping.host_address, self._found[mapping.protocol]
        if at.is_unspecified:
            yield from (place for address, place in places.items() if address.version == at.version)
        else:
            yield from (places[one] for one in (at, any_of(at)) if one in places)


def _conflict_text(other: PortMapping) -> str:
    at = f"{in_brackets(other.host_address)}:{other.host_ports}/{other.protocol}"
    by = "published by Docker for" if other.source is Source.LEASE else "already published for container"
    return f"{at} is {by} {other.container}: choose another port"
