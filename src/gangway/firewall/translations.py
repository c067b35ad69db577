"""Destination translations of other programs: what they match, and how those are found that a packet gets to.

Rules that name neither an address nor a port are left out.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from typing import NamedTuple

from gangway.inet import PROTOCOLS
from gangway.model import Address

HOOKS = ("prerouting", "output")
"""Where destinations are translated."""

Spans = tuple[tuple[int, int], ...]
"""The first and the last one of numbers in a row: in order, without overlaps."""

_LISTED = 5  # spans in a text; the others are counted


class Match(NamedTuple):
    """What a rule requires of a packet; None: anything.  `addresses` are numbers, of the IP version `family`."""

    protocols: Spans | None = None
    addresses: Spans | None = None
    ports: Spans | None = None
    family: int | None = None

    def within(self, outer: "Match") -> "Match | None":
        """Return what both require, as of a rule in a chain that `outer` leads to; None if no packet has all of it."""
        family = self.family or outer.family
        if outer.family not in (None, family):
            return None
        protocols, addresses, ports = map(_common, self[:3], outer[:3])
        return None if () in (protocols, addresses, ports) else Match(protocols, addresses, ports, family)

    def narrowed_to(self, published: "Match") -> "Match | None":
        """Return the part that some published ports have; what is not required is still not.  None: there is none."""
        both = self.within(published)
        if both is None:
            return None
        protocols, addresses, ports = (before and now for before, now in zip(self[:3], both[:3], strict=True))
        return Match(protocols, addresses, ports, both.family)

    def each_address(self) -> Iterator[Address]:
        """Yield the addresses, if some are required."""
        for first, last in self.addresses or ():
            yield from map(self._address, range(first, last + 1))

    def __str__(self) -> str:
        names = [name for name, number in PROTOCOLS.items() if _common(self.protocols, ((number, number),))]
        protocol = "every protocol" if self.protocols is None else " and ".join(names) or "another protocol"
        return f"{protocol} {self._ports()} at {self._addresses()}"

    def _ports(self) -> str:
        if self.ports is None:
            return "all ports"
        is_one = len(self.ports) == 1 and self.ports[0][0] == self.ports[0][1]
        return f"port{'s' * (not is_one)} {_listed(self.ports, int)}"

    def _addresses(self) -> str:
        return "every address" if self.addresses is None else _listed(self.addresses, self._address)

    def _address(self, number: int) -> Address:
        return IPv6Address(number) if self.family == 6 else IPv4Address(number)


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


RulesOf = Callable[[str], Iterable[Rule]]
"""Returns the rules of a chain, in order."""
IsWanted = Callable[[Match], bool]
"""True if packets that are looked for may match.  What only others get to is passed over unread."""


def find_translations(
    rules_of: RulesOf, base: str, rules: Iterable[Rule], is_wanted: IsWanted
) -> Iterator[tuple[str, Match]]:
    """Yield the translations, each with its chain, that packets get to by some rules of the chain `base`."""
    seen: set[tuple[str, Match]] = set()

    def visit(chain: str, rules: Iterable[Rule], outer: Match) -> Iterator[tuple[str, Match]]:
        for rule in rules:
            match, target = rule.match.within(outer), rule.target
            if match is None or not is_wanted(match):
                continue
            if not target and (match.addresses or match.ports):
                yield chain, match
            elif target and (target, match) not in seen:
                seen.add((target, match))
                yield from visit(target, rules_of(target), match)

    yield from visit(base, rules, Match())


def in_order(spans: Iterable[tuple[int, int]]) -> Spans:
    """Return spans in order, and join those that touch or overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return tuple(found)


def all_but(spans: Spans, bits: int) -> Spans:
    """Return the numbers of so many bits that are in none of the spans."""
    firsts, lasts = [0, *(last + 1 for _, last in spans)], [*(first - 1 for first, _ in spans), (1 << bits) - 1]
    return tuple((first, last) for first, last in zip(firsts, lasts, strict=True) if first <= last)


def _common(one: Spans | None, other: Spans | None) -> Spans | None:
    if one is None or other is None:
        return other if one is None else one
    few, many = (one, other) if len(one) < len(other) else (other, one)
    return tuple((max(first, low), min(last, high)) for first, last in few for low, high in _among(many, first, last))


def _among(spans: Spans, first: int, last: int) -> Sequence[tuple[int, int]]:
    """Return the spans that have a number from `first` to `last`."""
    begin = bisect_left(spans, first, key=lambda span: span[1])
    end = bisect_left(spans, last + 1, begin, key=lambda span: span[0])
    return spans[begin:end]


def _listed(spans: Spans, text: Callable[[int], object]) -> str:
    some = islice(spans, _LISTED)
    listed = (f"{text(first)}" if first == last else f"{text(first)}-{text(last)}" for first, last in some)
    more = len(spans) - _LISTED
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")
