"""Which published ports another program translates, too: `gangway doctor` names them."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from typing import NamedTuple

from gangway.daemon.messages import CheckAnswer
from gangway.errors import HostRefused, TimedOut
from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables import translations as iptables
from gangway.firewall.iptables.tool import all_tools
from gangway.firewall.nft import translations as nftables
from gangway.firewall.nft.render import AFTER_OTHERS
from gangway.firewall.translations import HOOKS, IsWanted, Match, Spans, Translation, in_order
from gangway.inet import PROTOCOLS
from gangway.model import Address, PortMapping, without_zone
from gangway.reconcile.observe import Tools

_CHECK = "no other program translates published ports"
_NAMED = 5  # overlaps; the others are counted
_OUR_PRIORITY = {Firewall.NFTABLES: AFTER_OTHERS, Firewall.IPTABLES: iptables.PRIORITY}
_ORDER = {
    True: "it comes first",
    False: "gangway's rule comes first",
    None: "which of the two comes first is not known",
}


class Overlap(NamedTuple):
    """A translation of another program, and a mapping whose port it translates; `match` is what both have in common."""

    translation: Translation
    match: Match
    mapping: PortMapping


def overlap_check(
    tools: Tools, facts: HostFacts, mappings: Collection[PortMapping], own: Collection[Address], prefix: str
) -> CheckAnswer:
    """Read other programs' rules, and compare them with these mappings; `own` are the host's addresses."""
    if not mappings:
        return CheckAnswer(_CHECK, True)
    found: dict[Translation, None] = {}
    failures: list[str] = []
    is_wanted = wanted_matches(mappings, own)
    for translations in _readers(tools, facts.firewall, prefix, is_wanted):
        try:
            for one in translations:
                found[one] = None
        except (HostRefused, TimedOut) as error:
            failures.append(f"not all are known: {error}")
    overlaps = [*find_overlaps(found, mappings, own, facts)]
    said = filter(None, (describe(overlaps, facts.firewall), *failures))
    return CheckAnswer(_CHECK, not (overlaps or failures), "; ".join(said))


def wanted_matches(mappings: Collection[PortMapping], own: Collection[Address]) -> IsWanted:
    """Return what is true of a match that packets to a published port may have: few of a host with many services."""
    ports = in_order((one.host_ports.first, one.host_ports.last) for one in mappings)
    places = {*own, *(without_zone(one.host_address) for one in mappings)}
    published = [
        Match(None, in_order((int(one), int(one)) for one in places if one.version == family), ports, family)
        for family in (4, 6)
    ]
    return lambda match: any(match.within(one) is not None for one in published)


def find_overlaps(
    translations: Iterable[Translation], mappings: Collection[PortMapping], own: Collection[Address], facts: HostFacts
) -> Iterator[Overlap]:
    """Yield each mapping with each translation that translates one of its ports at an address of the host."""
    seen: set[tuple[str, Match, PortMapping]] = set()
    reached = cache(partial(_reached, own, facts))
    places = {hook: [(one, _published(one, reached(one.host_address, hook))) for one in mappings] for hook in HOOKS}
    for one in translations:
        for mapping, published in places[one.hook]:
            match = one.match.narrowed_to(published)
            if match is not None and (one.place, match, mapping) not in seen:
                seen.add((one.place, match, mapping))  # in the other hook it is the same overlap
                yield Overlap(one, match, mapping)


def describe(overlaps: Sequence[Overlap], firewall: Firewall) -> str:
    """Return which overlaps there are, which rule comes first, and what to do."""
    texts = [_describe(one, firewall) for one in islice(overlaps, _NAMED)]
    if len(overlaps) > _NAMED:
        texts.append(f"{len(overlaps) - _NAMED} more")
    return "; ".join(texts)


def _readers(tools: Tools, firewall: Firewall, prefix: str, is_wanted: IsWanted) -> Iterator[Iterator[Translation]]:
    """Yield what reads the translations: of nftables, and of both variants of iptables, as far as the host has them."""
    if tools.unusable(Firewall.NFTABLES) is None:
        yield nftables.foreign_translations(is_wanted)
    for tool in all_tools() if tools.unusable(Firewall.IPTABLES) is None else ():
        own_chain = prefix if firewall is Firewall.IPTABLES and tool.is_usual else ""
        yield iptables.foreign_translations(tool, is_wanted, own_chain)


def _reached(own: Collection[Address], facts: HostFacts, at: Address, hook: str) -> Spans:
    """Return the addresses at which a mapping is published at `at`, and of which packets pass a hook."""
    found = (one for one in (own if at.is_unspecified else [without_zone(at)]) if one.version == at.version)
    return in_order(
        (int(one), int(one))
        for one in found
        if not facts.is_excluded(one) and (hook == "output" or not one.is_loopback)
    )


def _published(mapping: PortMapping, addresses: Spans) -> Match:
    protocol, ports = PROTOCOLS[mapping.protocol], mapping.host_ports
    return Match(((protocol, protocol),), addresses, ((ports.first, ports.last),), mapping.host_address.version)


def _describe(overlap: Overlap, firewall: Firewall) -> str:
    one, match, mapping = overlap
    order = _ORDER[_is_before_ours(one, firewall)]
    what = f"{one.place} translates {match}, published as {mapping}: {order}"
    if match.addresses is not None and mapping.host_address.is_unspecified:
        options = " ".join(f"--exclude {address}" for address in islice(match.each_address(), _NAMED))
        return f"{what}; gangway daemon {options} leaves the address to the other program"
    return f"{what}; publish another port, or delete the other program's rule"


def _is_before_ours(one: Translation, firewall: Firewall) -> bool | None:
    """True if a translation comes before gangway's, which then has no effect; None if that is not known."""
    if one.is_before_ours is not None:
        return one.is_before_ours
    ours = _OUR_PRIORITY.get(firewall)
    if ours is None:  # without rules, sockets serve: whatever is translated does not get to them
        return True
    return None if one.priority == ours else one.priority < ours
