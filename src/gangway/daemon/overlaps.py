"""Which published ports another program translates, too: `gangway doctor` names them."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from gangway.daemon.messages import CheckAnswer
from gangway.errors import HostRefused, TimedOut
from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables import translations as iptables
from gangway.firewall.iptables.tool import Iptables
from gangway.firewall.nft import translations as nftables
from gangway.firewall.nft.render import AFTER_OTHERS
from gangway.firewall.translations import Match, Translation
from gangway.model import Address, PortMapping, without_zone
from gangway.reconcile.observe import Tools

_CHECK = "no other program translates published ports"
_ALL_PORTS = 0, 65535
_NAMED = 5  # overlaps; the others are counted
_OUR_PRIORITY = {Firewall.NFTABLES: AFTER_OTHERS, Firewall.IPTABLES: iptables.PRIORITY}
_ORDER = {
    True: "it comes first",
    False: "gangway's rule comes first",
    None: "which of the two comes first is not known",
}


class Overlap(NamedTuple):
    """A translation of another program, and a mapping whose port it translates; `address` is the host's, if it names
    one."""

    translation: Translation
    mapping: PortMapping
    address: Address | None


def overlap_check(
    tools: Tools, facts: HostFacts, mappings: Collection[PortMapping], own: Collection[Address], prefix: str
) -> CheckAnswer:
    """Read other programs' rules, and compare them with these mappings; `own` are the host's addresses."""
    if not mappings:
        return CheckAnswer(_CHECK, True)
    try:
        found = [*dict.fromkeys(_read(tools, facts.firewall, prefix))]
    except (HostRefused, TimedOut) as error:
        return CheckAnswer(_CHECK, False, f"not known: {error}")
    overlaps = [*find_overlaps(found, mappings, own, facts)]
    return CheckAnswer(_CHECK, not overlaps, describe(overlaps, facts.firewall))


def find_overlaps(
    translations: Iterable[Translation], mappings: Iterable[PortMapping], own: Collection[Address], facts: HostFacts
) -> Iterator[Overlap]:
    """Yield each mapping with each translation that translates one of its ports at an address of the host."""
    mappings, published = [*mappings], bytearray(1 << 16)
    for mapping in mappings:
        ports = mapping.host_ports
        published[ports.first : ports.last + 1] = b"\1" * ports.count
    places = {*own, *(without_zone(mapping.host_address) for mapping in mappings)}
    seen: set[tuple[str, Match, PortMapping]] = set()
    for one in translations:
        first, last = one.match.ports or _ALL_PORTS
        if 1 not in published[first : last + 1] or not any(_includes(one.match, at) for at in places):
            continue  # as most are of a host with thousands of services
        for mapping in mappings:
            key = one.place, one.match, mapping
            if key not in seen and _has_port_of(one.match, mapping):
                for address in islice(_addresses(one, mapping, own, facts), 1):
                    seen.add(key)  # in the other hook it is the same overlap
                    yield Overlap(one, mapping, address if one.match.addresses else None)


def describe(overlaps: Sequence[Overlap], firewall: Firewall) -> str:
    """Return which overlaps there are, which rule comes first, and what to do."""
    texts = [_describe(one, firewall) for one in islice(overlaps, _NAMED)]
    if len(overlaps) > _NAMED:
        texts.append(f"{len(overlaps) - _NAMED} more")
    return "; ".join(texts)


def _read(tools: Tools, firewall: Firewall, prefix: str) -> Iterator[Translation]:
    """Yield the translations of both firewalls, as far as the host has them."""
    if tools.unusable(Firewall.NFTABLES) is None:
        yield from nftables.foreign_translations()
    if tools.unusable(Firewall.IPTABLES) is None:
        own_chain = prefix if firewall is Firewall.IPTABLES else ""
        for family in (4, 6):
            yield from iptables.parse_translations(Iptables(family).listing(), family, own_chain)


def _includes(match: Match, address: Address) -> bool:
    """True if a packet to an address may match."""
    if match.family not in (None, address.version):
        return False
    if match.addresses is None:
        return True
    first, last = match.addresses
    return first.version == address.version and int(first) <= int(address) <= int(last)


def _has_port_of(match: Match, mapping: PortMapping) -> bool:
    first, last = match.ports or _ALL_PORTS
    is_same = match.protocol in (None, "all", mapping.protocol)
    return is_same and first <= mapping.host_ports.last and mapping.host_ports.first <= last


def _addresses(one: Translation, mapping: PortMapping, own: Collection[Address], facts: HostFacts) -> Iterator[Address]:
    """Yield the host's addresses at which both hold."""
    at = mapping.host_address
    for address in own if at.is_unspecified else [without_zone(at)]:
        is_reached = one.hook == "output" or not address.is_loopback
        is_published = address.version == at.version and not facts.is_excluded(address)
        if is_published and is_reached and _includes(one.match, address):
            yield address


def _describe(overlap: Overlap, firewall: Firewall) -> str:
    one, mapping, address = overlap
    order = _ORDER[_is_before_ours(one, firewall)]
    what = f"{one.place} translates {one.match}, published as {mapping}: {order}"
    if address is not None and mapping.host_address.is_unspecified:
        return f"{what}; gangway daemon --exclude {address} leaves the address to the other program"
    return f"{what}; publish another port, or delete the other program's rule"


def _is_before_ours(one: Translation, firewall: Firewall) -> bool | None:
    """True if a translation comes before gangway's, which then has no effect; None if that is not known."""
    if one.is_before_ours is not None:
        return one.is_before_ours
    ours = _OUR_PRIORITY.get(firewall)
    if ours is None:  # without rules, sockets serve: whatever is translated does not get to them
        return True
    return None if one.priority == ours else one.priority < ours
