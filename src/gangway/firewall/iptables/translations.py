"""Destination translations of other programs in the table `nat`, as iptables-save(8) lists it."""

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_network

from gangway.firewall.translations import HOOKS, Match, PortSpan, Rule, Translation, find_translations

PRIORITY = -100
"""The table's in both hooks: include/uapi/linux/netfilter_ipv4.h, NF_IP_PRI_NAT_DST."""

_TRANSLATING = ("DNAT", "REDIRECT")


def parse_translations(listing: str, family: int, own_chain: str = "") -> Iterator[Translation]:
    """Yield other programs' translations; `own_chain` is the name of our chain, empty if there is none."""
    chains: dict[str, list[Rule]] = defaultdict(list)
    for line in _nat_lines(listing):
        words = shlex.split(line) if '"' in line else line.split()
        if words[0] == "-A" and words[1] != own_chain:
            chains[words[1]] += _rules(words[2:], family)
    command = {4: "iptables", 6: "ip6tables"}[family]
    for hook in HOOKS:
        base = hook.upper()
        for is_before, rules in _split(chains[base], own_chain):
            for chain, match in find_translations(chains, base, rules):
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


def _rules(words: Sequence[str], family: int) -> Iterator[Rule]:
    """Yield what a rule does, for each of its ranges of ports."""
    options = _options(words)
    target = options.get("-j") or options.get("-g")
    if target is None or "--match-set" in words:
        return
    try:
        found = ip_network(options["-d"]) if "-d" in options else None
        spans: Iterable[PortSpan | None] = [*_spans(options.get("--dports") or options.get("--dport", ""))] or [None]
    except ValueError:  # a mask that is no prefix
        return
    addresses = None if found is None else (found[0], found[-1])
    for ports in spans:
        match = Match(options.get("-p"), addresses, ports, family)
        yield Rule(match, "" if target in _TRANSLATING else target)


def _options(words: Sequence[str]) -> dict[str, str]:
    """Return the options that are not negated, with their values."""
    each = zip(("", *words), words, words[1:], strict=False)
    return {name: value for before, name, value in each if name.startswith("-") and before != "!"}


def _spans(text: str) -> Iterator[PortSpan]:
    for span in filter(None, text.split(",")):
        first, _, last = span.partition(":")
        yield int(first), int(last or first)
