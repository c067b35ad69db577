"""Destination translations of other programs' tables in nftables, read from rules as the kernel lists them.

Expressions and their attributes: include/uapi/linux/netfilter/nf_tables.h.  Translations that iptables' nft variant has
written are its own targets: they are no expressions of nftables, and iptables-save lists them.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import NamedTuple

from gangway.firewall.nft import kernel
from gangway.firewall.nft.transaction import TABLE
from gangway.firewall.translations import HOOKS, AddressSpan, Match, Rule, Translation, find_translations

# NFTA_PAYLOAD_…, NFTA_META_…: the register comes first, as in every expression that loads something
_REGISTER, _BASE, _OFFSET, _LENGTH, _META_KEY = 1, 2, 3, 4, 2
_NETWORK_HEADER, _TRANSPORT_HEADER, _META_PROTOCOL = 1, 2, 16
_BITWISE_REGISTER, _BITWISE_MASK = 2, 4
_OPERATOR, _COMPARED, _RANGE_LAST = 2, 3, 4  # what a range begins with is compared, too
_NARROWING = _EQUAL, _AT_MOST, _AT_LEAST = 0, 3, 5  # NFT_CMP_EQ, NFT_CMP_LTE, NFT_CMP_GTE; NFT_RANGE_EQ
_LOOKUP_REGISTER = 2
_NAT_TYPE, _NAT_FAMILY, _DNAT = 1, 2, 1
_FAMILIES = {2: 4, 10: 6}  # NFPROTO_IPV4, NFPROTO_IPV6
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}  # include/uapi/linux/in.h: IPPROTO_…
_DESTINATIONS = {16: 4, 24: 16}  # the destination address: its place in the header, and its bytes
_PROTOCOL_FIELDS = ((_NETWORK_HEADER, 9, 1), (_NETWORK_HEADER, 6, 1))  # of IPv4's header, and of IPv6's

Expression = tuple[str, Mapping[int, bytes]]
"""An expression's name and attributes."""


class _Field(NamedTuple):
    """A part of a packet in a register, of which the bits of `ignored` do not count."""

    kind: str
    size: int  # bytes
    shift: int = 0
    ignored: int = 0

    def span(self, value: bytes) -> tuple[int, int]:
        """Return the first and the last value of the field that equal `value` in this register."""
        first = int.from_bytes(value) << self.shift
        return first, first | self.ignored


def foreign_translations() -> Iterator[Translation]:
    """Yield other programs' translations, of all tables.  HostRefused: they cannot be read."""
    bases = [base for base in kernel.nat_chains(HOOKS) if f"{base.family} {base.table}" != TABLE]
    for family, table in dict.fromkeys((base.family, base.table) for base in bases):
        chains: dict[str, list[Rule]] = defaultdict(list)
        for chain, expressions in kernel.rules(family, table):
            chains[chain] += read_rule(expressions)
        for base in bases:
            if (base.family, base.table) == (family, table):
                for chain, match in find_translations(chains, base.name, chains[base.name]):
                    versions = [match.family] if match.family else base.versions
                    for version in versions:
                        place = f"nftables {family} {table} {chain}"
                        yield Translation(place, base.hook, base.priority, match._replace(family=version))


def read_rule(expressions: Iterable[Expression]) -> Iterator[Rule]:
    """Yield what a rule does, if it translates or jumps to a chain, and does not match by a set."""
    fields: dict[int, _Field] = {}
    spans: dict[_Field, tuple[int, int]] = {}
    for name, data in expressions:
        register = int.from_bytes(data.get(_REGISTER, b""))
        match name:
            case "cmp" | "range":
                if register in fields and _number(data, _OPERATOR) in _NARROWING:
                    field = fields[register]
                    spans[field] = _narrowed(field, spans.get(field), name, data)
            case "bitwise":
                if register in fields:
                    fields[_number(data, _BITWISE_REGISTER)] = _masked(fields.pop(register), data)
            case "lookup":
                if _number(data, _LOOKUP_REGISTER) in fields:
                    return
            case "nat" if _number(data, _NAT_TYPE) == _DNAT:
                yield Rule(_match(spans, _FAMILIES.get(_number(data, _NAT_FAMILY))))
            case "redir":
                yield Rule(_match(spans, None))
            case "immediate" if target := kernel.jump_target(data):
                yield Rule(_match(spans, None), target)
            case "payload" | "meta" if found := _loaded(name, data):
                fields[register] = found
            case _:
                fields.pop(register, None)


def _loaded(name: str, data: Mapping[int, bytes]) -> _Field | None:
    """Return the field that an expression loads; None if it does not matter."""
    if name == "meta":
        return _Field("protocol", 1) if _number(data, _META_KEY) == _META_PROTOCOL else None
    place = _number(data, _BASE), _number(data, _OFFSET), _number(data, _LENGTH)
    if place in _PROTOCOL_FIELDS:
        return _Field("protocol", 1)
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


def _narrowed(field: _Field, before: tuple[int, int] | None, name: str, data: Mapping[int, bytes]) -> tuple[int, int]:
    """Return which values of a field are left after a comparison."""
    first, last = before or (0, (1 << 8 * field.size) - 1)
    operator, compared = _number(data, _OPERATOR), kernel.value_of(data.get(_COMPARED, b""))
    low, high = field.span(compared)
    if name == "range":
        return low, field.span(kernel.value_of(data.get(_RANGE_LAST, b"")))[1]
    if operator == _EQUAL:
        return low, high
    return (low, last) if operator == _AT_LEAST else (first, high)


def _match(spans: Mapping[_Field, tuple[int, int]], family: int | None) -> Match:
    found = {field.kind: (field, span) for field, span in spans.items()}
    protocol, addresses, ports = (found.get(kind) for kind in ("protocol", "addresses", "ports"))
    return Match(
        _PROTOCOLS.get(protocol[1][0], "other") if protocol and protocol[1][0] == protocol[1][1] else None,
        _addresses(*addresses) if addresses else None,
        ports[1] if ports else None,
        family,
    )


def _addresses(field: _Field, span: tuple[int, int]) -> AddressSpan:
    first, last = (ip_address(one.to_bytes(field.size)) for one in span)
    return first, last


def _number(data: Mapping[int, bytes], kind: int) -> int:
    return int.from_bytes(data.get(kind, b""))
