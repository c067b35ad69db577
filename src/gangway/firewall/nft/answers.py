"""Which published TCP port a container's port answers for: elements of nftables sets and maps.

Conntrack may forget a connection (its table was flushed, or an entry expired).  If the container is the next to send,
its segment begins a new entry, and the rule that masquerades would give it another port than the client's.
These elements give the connection back to its client:

    answers     container . port → port              published at 0.0.0.0 or ::; the outgoing interface has the address
    answers_at  container . port → address . port    published at one address
    ambiguous   container . port                     published more than once: the container gets a reset

A range whose ports stay the same has none: masquerading keeps the port, if it is free.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gangway.firewall.nft.transaction import Elements
from gangway.model import Protocol, address_text
from gangway.plan import MappingPlan


class _Element(NamedTuple):
    name: str  # of the set or map
    text: str


class Answers:
    """The elements for some mappings, which change with them."""

    def __init__(self, plans: Iterable[MappingPlan] = ()) -> None:
        self._elements: dict[_Element, list[_Element]] = {}
        """For each port of a container, as an element of `ambiguous`, those that each of its mappings would have."""
        self._add(plans)

    def elements(self) -> Elements:
        """Return all elements."""
        return _grouped(map(self._element, self._elements))

    def change(self, removed: Iterable[MappingPlan], added: Iterable[MappingPlan]) -> tuple[Elements, Elements]:
        """Remove mappings and add others; return the elements to delete, and those to add.

        A mapping may have been removed before, if a request failed after that.
        """
        removed, added = tuple(removed), tuple(added)
        touched = dict.fromkeys(port for one in (*removed, *added) for port, _ in _elements(one))
        before = {port: self._element(port) for port in touched}
        for planned in removed:
            for port, element in _elements(planned):
                if element in self._elements.get(port, ()):
                    self._elements[port].remove(element)
        self._add(added)
        after = {port: self._element(port) for port in touched}
        for port in touched:
            if not self._elements.get(port):
                self._elements.pop(port, None)
        changed = [port for port in touched if before[port] != after[port]]
        return _grouped(before[port] for port in changed), _grouped(after[port] for port in changed)

    def _add(self, plans: Iterable[MappingPlan]) -> None:
        for planned in plans:
            for port, element in _elements(planned):
                self._elements.setdefault(port, []).append(element)

    def _element(self, port: _Element) -> _Element | None:
        found = self._elements.get(port)
        if not found:
            return None
        return found[0] if len(found) == 1 else port


def _elements(planned: MappingPlan) -> Iterator[tuple[_Element, _Element]]:
    """Yield each port of the container as an element of `ambiguous`, and the element for the host's port."""
    mapping, family, to = planned.mapping, planned.family, address_text(planned.container_address)
    is_kept_range = mapping.host_ports.count > 1 and mapping.keeps_ports
    if not planned.is_nat or mapping.protocol is not Protocol.TCP or is_kept_range:
        return
    name, at = (f"answers_at{family}", f"{mapping.host_address} . ")
    if mapping.host_address.is_unspecified:
        name, at = (f"answers{family}", "")
    for host_port, port in mapping.pairs():
        yield _Element(f"ambiguous{family}", f"{to} . {port}"), _Element(name, f"{to} . {port} : {at}{host_port}")


def _grouped(elements: Iterable[_Element | None]) -> Elements:
    found: Elements = defaultdict(list)
    for name, text in filter(None, elements):
        found[name].append(text)
    return dict(found)
