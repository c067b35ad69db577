"""Destination translations of other programs: what they match, and how those are found that a packet gets to.

Rules that match by a set or a map, and those that name neither an address nor a port, are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from gangway.model import Address

HOOKS = ("prerouting", "output")
"""Where destinations are translated."""

AddressSpan = tuple[Address, Address]
"""The first and the last one of some addresses."""
PortSpan = tuple[int, int]
"""The first and the last one of some ports."""


class Match(NamedTuple):
    """What a rule requires of a packet; None: anything."""

    protocol: str | None = None
    addresses: AddressSpan | None = None
    ports: PortSpan | None = None
    family: int | None = None

    def within(self, outer: "Match") -> "Match":
        """Return what a rule requires in a chain that is jumped to if `outer` matches."""
        return Match(
            self.protocol or outer.protocol,
            self.addresses or outer.addresses,
            self.ports or outer.ports,
            self.family or outer.family,
        )

    def __str__(self) -> str:
        first, last = self.ports or (0, 0)
        ports = "all ports" if self.ports is None else f"port {first}" if first == last else f"ports {first}-{last}"
        return f"{self.protocol or 'every protocol'} {ports} at {self._at()}"

    def _at(self) -> str:
        if self.addresses is None:
            return "every address"
        first, last = self.addresses
        return str(first) if first == last else f"{first}-{last}"


class Rule(NamedTuple):
    """A rule that translates destinations, or jumps to the chain `target`."""

    match: Match
    target: str = ""


class Translation(NamedTuple):
    """A destination translation, and where it stands."""

    place: str  # the firewall, and its table and chain
    hook: str
    priority: int  # of the hook
    match: Match
    is_before_ours: bool | None = None  # in the same base chain; None if ours are in another one


Chains = Mapping[str, Sequence[Rule]]
"""The rules of a table's chains, in order."""


def find_translations(chains: Chains, base: str, rules: Sequence[Rule]) -> Iterator[tuple[str, Match]]:
    """Yield the translations, each with its chain, that packets get to by some rules of the chain `base`."""
    seen: set[tuple[str, Match]] = set()

    def visit(chain: str, rules: Sequence[Rule], outer: Match) -> Iterator[tuple[str, Match]]:
        for rule in rules:
            match, target = rule.match.within(outer), rule.target
            if not target and (match.addresses or match.ports):
                yield chain, match
            elif target and (target, match) not in seen:
                seen.add((target, match))
                yield from visit(target, chains.get(target, ()), match)

    yield from visit(base, rules, Match())
