"""Destination translations of other programs in the table `nat`, as iptables-save(8) lists it."""

import shlex
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network

from gangway.firewall.iptables.ipset import set_matches
from gangway.firewall.iptables.tool import Iptables
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
from gangway.inet import PROTOCOLS

PRIORITY = -100
"""The table's in both hooks: include/uapi/linux/netfilter_ipv4.h, NF_IP_PRI_NAT_DST."""

_TRANSLATING = ("DNAT", "REDIRECT")
_WITHOUT_PORTS = 255  # any other protocol
_BITS = {4: 32, 6: 128}

SetMatches = Callable[[str, str], Iterable[Match]]
"""Returns what the entries of an ipset match, as `-m set --match-set NAME DIRECTIONS`.  HostRefused: unreadable."""


def foreign_translations(tool: Iptables, is_wanted: IsWanted, own_chain: str = "") -> Iterator[Translation]:
    """Yield other programs' translations that a tool lists.  HostRefused, TimedOut: they cannot be read."""
    yield from parse_translations(tool.listing(), tool.family, is_wanted, set_matches, tool.command, own_chain)


def parse_translations(
    listing: str, family: int, is_wanted: IsWanted, matches_of: SetMatches, command: str, own_chain: str = ""
) -> Iterator[Translation]:
    """Yield other programs' translations in what a command's tables list.

    `own_chain` is the name of our chain, empty if there is none.  HostRefused: a set cannot be read.
    """
    chains: dict[str, list[Sequence[str]]] = defaultdict(list)
    for line in _nat_lines(listing):
        words = shlex.split(line) if '"' in line else line.split()
        if words[0] == "-A" and words[1] != own_chain:
            chains[words[1]].append(words[2:])

    targets = {*chains, own_chain}

    def rules_of(chain: str) -> list[Rule]:
        return [rule for words in chains.get(chain, ()) for rule in _rules(words, family, matches_of, targets)]

    for hook in HOOKS:
        base = hook.upper()
        for is_before, rules in _split(rules_of(base), own_chain):
            for chain, match in find_translations(rules_of, base, rules, is_wanted):
                yield Translation(f"{command} nat {chain}", hook, PRIORITY, match, is_before)


def _nat_lines(listing: str) -> Iterator[str]:
    table = ""
    for line in listing.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line and table == "nat":
            yield line


def _split(rules: Sequence[Rule], own_chain: str) -> Iterator[tuple[bool | None, Sequence[Rule]]]:
    """Yield the rules before the jump to our chain, and those after it; without a jump, all."""
    places = [place for place, rule in enumerate(rules) if own_chain and rule.target == own_chain]
    if places:
        yield True, rules[: places[0]]
        yield False, rules[places[0] :]
    else:
        yield None, rules


def _rules(words: Sequence[str], family: int, matches_of: SetMatches, chains: Container[str]) -> Iterator[Rule]:
    """Yield what a rule does, if it translates or jumps to a chain: once for each of the alternatives it matches."""
    options = [*_options(words)]
    target = next((values[0] for _, option, values in options if option in ("-j", "-g")), "")
    if target not in _TRANSLATING and target not in chains:
        return
    matches = [Match(family=family)]
    try:
        for is_negated, option, values in options:
            found = _required(is_negated, option, values, family, matches_of)
            matches = [both for one in found for other in matches if (both := one.within(other)) is not None]
    except ValueError:  # a mask that is no prefix
        return
    yield from (Rule(match, "" if target in _TRANSLATING else target) for match in matches)


def _options(words: Sequence[str]) -> Iterator[tuple[bool, str, Sequence[str]]]:
    """Yield each option: whether it is negated, its name, and the words after it."""
    for place, word in enumerate(words):
        if word.startswith("-") and word[1:].strip("-")[:1].isalpha() and place + 1 < len(words):
            yield words[place - 1 : place] == ["!"], word, words[place + 1 :]


def _required(
    is_negated: bool, option: str, values: Sequence[str], family: int, matches_of: SetMatches
) -> Iterable[Match]:
    """Return the alternatives of what an option requires; what it does not understand requires nothing."""
    match option:
        case "-p" if values[0] != "all":
            number = PROTOCOLS.get(values[0], int(values[0]) if values[0].isdecimal() else _WITHOUT_PORTS)
            return [Match(protocols=_spans([(number, number)], is_negated, 8))]
        case "-d":
            net = ip_network(values[0])
            return [Match(addresses=_spans([(int(net[0]), int(net[-1]))], is_negated, net.max_prefixlen))]
        case "--dst-range":
            first, _, last = values[0].partition("-")
            ends = int(ip_address(first)), int(ip_address(last or first))
            return [Match(addresses=_spans([ends], is_negated, _BITS[family]))]
        case "--dport" | "--dports" | "--ports":
            return [Match(ports=_spans(_port_spans(values[0]), is_negated, 16))]
        case "--match-set" if not is_negated:
            return matches_of(values[0], values[1])
    return [Match()]


def _spans(spans: Iterable[tuple[int, int]], is_negated: bool, bits: int) -> Spans:
    found = in_order(spans)
    return all_but(found, bits) if is_negated else found


def _port_spans(text: str) -> Iterator[tuple[int, int]]:
    for span in text.split(","):
        first, _, last = span.partition(":")
        yield int(first), int(last or first)
