"""Which mapping has a host port.

What this file knows: that two mappings cannot have one port of one address.  What it must not know: other programs, how
a port is taken.
"""

from collections.abc import Iterator

from gangway.errors import Conflict
from gangway.model import Address, PortMapping, PortRange, Protocol


class Taken:
    """The mappings of a host, by port: whether one more fits costs the same however many there are, unless it is a
    range."""

    def __init__(self) -> None:
        self._single: dict[tuple[Protocol, int], list[PortMapping]] = {}
        self._ranges: list[PortMapping] = []

    def add(self, mapping: PortMapping) -> None:
        """One more.  Conflict: a port of it is another's."""
        other = self.collision(mapping)
        if other is not None:
            raise Conflict(f"{mapping} is taken: container {other.container} has {other}")
        self._place(mapping).append(mapping)

    def remove(self, mapping: PortMapping) -> None:
        """One less."""
        self._place(mapping).remove(mapping)

    def collision(self, mapping: PortMapping) -> PortMapping | None:
        """One that has a port of it already, if there is one."""
        return next(
            (other for other in self._near(mapping.protocol, mapping.host_ports) if mapping.collides(other)), None
        )

    def at(self, protocol: Protocol, address: Address, port: int) -> PortMapping | None:
        """The mapping that a client meets who asks there."""
        for mapping in self._near(protocol, PortRange(port, port)):
            of_all = mapping.host_address.is_unspecified and mapping.host_address.version == address.version
            if mapping.host_ports.overlaps(PortRange(port, port)) and (of_all or mapping.host_address == address):
                return mapping
        return None

    def _place(self, mapping: PortMapping) -> list[PortMapping]:
        if mapping.host_ports.count > 1:
            return self._ranges
        return self._single.setdefault((mapping.protocol, mapping.host_ports.first), [])

    def _near(self, protocol: Protocol, ports: PortRange) -> Iterator[PortMapping]:
        """All that have a port in `ports`, and some that have not."""
        yield from (mapping for mapping in self._ranges if mapping.protocol == protocol)
        if ports.count == 1:
            yield from self._single.get((protocol, ports.first), ())
        else:
            yield from (one for found in self._single.values() for one in found if one.protocol == protocol)
