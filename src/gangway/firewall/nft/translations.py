"""Destination translations of other programs' tables in nftables, read from rules as the kernel lists them.

Expressions and their attributes: include/uapi/linux/netfilter/nf_tables.h.  Translations that iptables' nft variant has
written are its own targets: they are no expressions of nftables, and iptables-save lists them.

A rule that jumps or translates may do so by a set or a map.  Only then its elements are read: another program's address
lists may be large.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

from gangway.firewall.nft import kernel
from gangway.firewall.nft.kernel import SetElement
from gangway.firewall.nft.transaction import TABLE
from gangway.firewall.translations import (
    HOOKS,
    IsWanted,
    Match,
    Rule,
    Spans,
    Translation,
    all_but,
    find_translations,
    in_order,
)
from gangway.host.netlink import text_of

# NFTA_PAYLOAD_…, NFTA_META_…: the register comes first, as in every expression that loads something
_REGISTER, _BASE, _OFFSET, _LENGTH, _META_KEY = 1, 2, 3, 4, 2
_NETWORK_HEADER, _TRANSPORT_HEADER, _META_PROTOCOL = 1, 2, 16
_BITWISE_REGISTER, _BITWISE_MASK = 2, 4
_OPERATOR, _COMPARED, _RANGE_LAST = 2, 3, 4  # what a range begins with is compared, too
_EQUAL, _UNEQUAL, _LESS, _AT_MOST, _MORE, _AT_LEAST = range(6)  # NFT_CMP_…; NFT_RANGE_EQ and _NEQ are the first two
_LOOKUP_SET, _LOOKUP_REGISTER, _LOOKUP_RESULT, _LOOKUP_FLAGS, _INVERTED = 1, 2, 3, 5, 1
_VERDICT_REGISTER = b"\0\0\0\0"  # NFT_REG_VERDICT: the map says where to go on
_FIRST_OF_FOUR_BYTES = 8  # NFT_REG32_00; the registers NFT_REG_1 to _4 are four of these each
_NAT_TYPE, _NAT_FAMILY, _DNAT = 1, 2, 1
_FAMILIES = {2: 4, 10: 6}  # NFPROTO_IPV4, NFPROTO_IPV6
_DESTINATIONS = {16: 4, 24: 16}  # the destination address: its place in the header, and its bytes
_PROTOCOL_FIELDS = ((_NETWORK_HEADER, 9, 1), (_NETWORK_HEADER, 6, 1))  # of IPv4's header, and of IPv6's

Expression = tuple[str, Mapping[int, bytes]]
"""An expression's name and attributes."""
ElementsOf = Callable[[str], Sequence[SetElement]]
"""Returns the elements of a set or map of the table.  HostRefused: they cannot be read."""


class _Field(NamedTuple):
    """A part of a packet in a register, of which the bits of `ignored` do not count."""

    kind: str
    size: int  # bytes
    shift: int = 0
    ignored: int = 0

    @property
    def loaded(self) -> int:
        """How many bytes of it are in the register."""
        return self.size - self.shift // 8

    @property
    def top(self) -> int:
        """The highest value."""
        return (1 << 8 * self.size) - 1

    def span(self, first: bytes, last: bytes) -> tuple[int, int]:
        """Return the first and the last value of the field that these values in the register stand for."""
        low, high = (int.from_bytes(one) << self.shift for one in (first, last))
        return low, high | self.ignored

    def match(self, spans: Spans) -> Match:
        """Return the match of packets whose field has one of these values."""
        if self.kind == "addresses":
            return Match(addresses=spans, family={4: 4, 16: 6}[self.size])
        return Match(protocols=spans) if self.kind == "protocols" else Match(ports=spans)


def foreign_translations(is_wanted: IsWanted) -> Iterator[Translation]:
    """Yield other programs' translations, of all tables.  HostRefused: they cannot be read."""
    bases = [base for base in kernel.nat_chains(HOOKS) if f"{base.family} {base.table}" != TABLE]
    for family, table in dict.fromkeys((base.family, base.table) for base in bases):
        chains: dict[str, list[list[Expression]]] = defaultdict(list)
        for chain, expressions in kernel.rules(family, table):
            chains[chain].append([*expressions])
        rules_of = _rules_of(chains, cache(partial(kernel.set_elements, family, table)))
        for base in bases:
            if (base.family, base.table) == (family, table):
                for chain, match in find_translations(rules_of, base.name, rules_of(base.name), is_wanted):
                    for version in [match.family] if match.family else base.versions:
                        place = f"nftables {family} {table} {chain}"
                        yield Translation(place, base.hook, base.priority, match._replace(family=version))


def _rules_of(chains: Mapping[str, list[list[Expression]]], elements_of: ElementsOf) -> Callable[[str], list[Rule]]:
    @cache
    def rules_of(chain: str) -> list[Rule]:
        return [rule for expressions in chains.get(chain, ()) for rule in read_rule(expressions, elements_of)]

    return rules_of


def read_rule(expressions: Iterable[Expression], elements_of: ElementsOf) -> Iterator[Rule]:
    """Yield what a rule does, if it translates or jumps to a chain: once for each of the alternatives it matches."""
    reader = _Reader(elements_of)
    for name, data in expressions:
        yield from reader.outcome(name, data)
        reader.read(name, data)


class _Reader:
    """What the expressions of a rule so far have loaded, and what they require of a packet."""

    def __init__(self, elements_of: ElementsOf) -> None:
        self._elements_of = elements_of
        self._fields: dict[int, _Field] = {}  # by register
        self._requirements: list[Callable[[], Iterable[Match]]] = []  # the alternatives of each

    def outcome(self, name: str, data: Mapping[int, bytes]) -> Iterator[Rule]:
        """Yield where an expression leads the packets that get to it."""
        match name:
            case "nat" if _number(data, _NAT_TYPE) == _DNAT:
                family = Match(family=_FAMILIES.get(_number(data, _NAT_FAMILY)))
                yield from (Rule(both) for match in self._matches() if (both := match.within(family)) is not None)
            case "redir":
                yield from map(Rule, self._matches())
            case "immediate" if target := kernel.jump_target(data):
                yield from (Rule(match, target) for match in self._matches())
            case "lookup" if data.get(_LOOKUP_RESULT) == _VERDICT_REGISTER:
                lookup = _Lookup(self._fields, data, self._elements_of)
                yield from (rule for match in self._matches() for rule in lookup.jumps(match))

    def read(self, name: str, data: Mapping[int, bytes]) -> None:
        """Follow an expression that loads or compares something."""
        register = _register(data.get(_REGISTER, b""))
        match name:
            case "cmp" | "range":
                if register in self._fields:
                    self._requirements.append(partial(_compared, self._fields[register], name, data))
            case "bitwise":
                if register in self._fields:
                    self._fields[_register(data[_BITWISE_REGISTER])] = _masked(self._fields.pop(register), data)
            case "lookup":
                self._requirements.append(_Lookup(dict(self._fields), data, self._elements_of).alternatives)
                self._fields.pop(_register(data.get(_LOOKUP_RESULT, b"")), None)
            case "payload" | "meta" if found := _loaded(name, data):
                for place in range(register, register + (found.loaded + 3) // 4):
                    self._fields.pop(place, None)
                self._fields[register] = found
            case _:
                self._fields.pop(register, None)

    def _matches(self) -> list[Match]:
        """Return the alternatives of what meets all requirements."""
        found = [Match()]
        for alternatives in self._requirements:
            found = [both for one in alternatives() for other in found if (both := one.within(other)) is not None]
        return found


class _Lookup:
    """A lookup of fields of a packet in a set or a map."""

    def __init__(self, fields: Mapping[int, _Field], data: Mapping[int, bytes], elements_of: ElementsOf) -> None:
        self._first, self._name = _register(data[_LOOKUP_REGISTER]), text_of(data[_LOOKUP_SET])
        self._is_inverted = bool(_number(data, _LOOKUP_FLAGS) & _INVERTED)
        self._fields, self._elements_of = fields, elements_of

    def alternatives(self) -> list[Match]:
        """Return what packets match that are in the set, or if it is inverted, that are not."""
        elements = self._elements_of(self._name)
        field = self._fields.get(self._first)
        is_all = field is not None and all(len(one.first) == field.loaded for one in elements)
        if field is None or not is_all:  # several fields, or a catchall element
            return [Match()] if self._is_inverted else [*map(self._match, elements)]
        spans = in_order(field.span(one.first, one.last) for one in elements)
        return [field.match(all_but(spans, 8 * field.size) if self._is_inverted else spans)]

    def jumps(self, outer: Match) -> Iterator[Rule]:
        """Yield where the map leads packets of `outer`."""
        for element in self._elements_of(self._name):
            if element.target and (match := self._match(element).within(outer)) is not None:
                yield Rule(match, element.target)

    def _match(self, element: SetElement) -> Match:
        found = Match()
        for at in range(0, len(element.first), 4):
            if (field := self._fields.get(self._first + at // 4)) is not None:
                part = slice(at, at + field.loaded)
                found = field.match((field.span(element.first[part], element.last[part]),)).within(found) or found
        return found


def _register(number: bytes) -> int:
    """Return the first of the registers of four bytes that a register consists of."""
    found = int.from_bytes(number)
    return found - _FIRST_OF_FOUR_BYTES if found >= _FIRST_OF_FOUR_BYTES else 4 * (found - 1)


def _loaded(name: str, data: Mapping[int, bytes]) -> _Field | None:
    """Return the field that an expression loads; None if it does not matter."""
    if name == "meta":
        return _Field("protocols", 1) if _number(data, _META_KEY) == _META_PROTOCOL else None
    place = _number(data, _BASE), _number(data, _OFFSET), _number(data, _LENGTH)
    if place in _PROTOCOL_FIELDS:
        return _Field("protocols", 1)
    if place == (_TRANSPORT_HEADER, 2, 2):
        return _Field("ports", 2)
    base, offset, length = place
    size = _DESTINATIONS.get(offset, 0)
    if base != _NETWORK_HEADER or not 0 < length <= size:
        return None
    shift = 8 * (size - length)  # nft loads the bytes of a prefix only
    return _Field("addresses", size, shift, (1 << shift) - 1)


def _masked(field: _Field, data: Mapping[int, bytes]) -> _Field:
    mask = kernel.value_of(data.get(_BITWISE_MASK, b""))
    return field._replace(ignored=field.ignored | (int.from_bytes(mask) ^ ((1 << 8 * len(mask)) - 1)) << field.shift)


def _compared(field: _Field, name: str, data: Mapping[int, bytes]) -> list[Match]:
    """Return what a comparison of a field requires."""
    operator, compared = _number(data, _OPERATOR), kernel.value_of(data.get(_COMPARED, b""))
    low, high = field.span(compared, kernel.value_of(data[_RANGE_LAST]) if name == "range" else compared)
    spans: dict[int, Spans] = {
        _EQUAL: ((low, high),),
        _UNEQUAL: all_but(((low, high),), 8 * field.size),
        _LESS: ((0, low - 1),),
        _AT_MOST: ((0, high),),
        _MORE: ((high + 1, field.top),),
        _AT_LEAST: ((low, field.top),),
    }
    return [field.match(spans[operator])]


def _number(data: Mapping[int, bytes], kind: int) -> int:
    return int.from_bytes(data.get(kind, b""))
