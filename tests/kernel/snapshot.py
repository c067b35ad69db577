"""All that a daemon can change on a host, as text, to compare the host before a test with the host after it."""

import re
from contextlib import suppress

from lab.netns import Namespace
from lab.waiting import wait_until

# Timers of bridges, counters of rules, duplicate address detection: these change by themselves.
_PASSING = re.compile(r" \S+_timer +[\d.]+| ?\[\d+:\d+\]| tentative| optimistic")
# So does what rules learn from packets.
_LEARNED = re.compile(r"(map asked\d \{[^}]*?)elements = \{[^}]*\}")
# So do the addresses that an interface gives itself once it is up.
_OWN = re.compile(r"fe80::|^anycast |^multicast |^ *valid_lft ")
_LISTINGS = {
    "nftables": ("nft", "--stateless", "list", "ruleset"),
    "links": ("ip", "--details", "link"),
    "addresses": ("ip", "address"),
    "routes": ("ip", "route", "show", "table", "all"),
    "routes6": ("ip", "-6", "route", "show", "table", "all"),
    # sysctl(8) reads all settings of the machine, which takes as long as all other listings together
    "settings": ("grep", "-rs", "", *(f"/proc/sys/net/{part}" for part in ("ipv4", "ipv6", "bridge"))),
}
_IPTABLES = ("iptables-save", "ip6tables-save")
_LEGACY = ("iptables-legacy-save", "ip6tables-legacy-save")

Snapshot = dict[str, list[str]]
"""The lines of each listing."""


def snapshot(host: Namespace, *, iptables: bool = False, legacy: bool = False) -> Snapshot:
    """Return the state of a host.  Listing iptables' rules creates its tables: they are listed only on request."""
    listings = {**_LISTINGS}
    for name in (*(_IPTABLES if iptables else ()), *(_LEGACY if legacy else ())):
        listings[name] = (name,)
    return {name: _lines(host, words) for name, words in listings.items()}


def wait_until_restored(host: Namespace, before: Snapshot, *, iptables: bool = False, legacy: bool = False) -> None:
    """Wait until the host is as it was before.  AssertionError: it is not; the message is the difference."""

    left: list[str] = []

    def is_restored() -> bool:
        left[:] = compare(before, snapshot(host, iptables=iptables, legacy=legacy))
        return not left

    with suppress(AssertionError):
        wait_until(is_restored, "the state of before", 5)
    if left:
        raise AssertionError("\n".join(["the host is not as it was before:", *left]))


def compare(before: Snapshot, after: Snapshot) -> list[str]:
    """Return the lines that are in one of two snapshots only."""
    found = []
    for name, lines in before.items():
        if lines == after[name]:
            continue
        then, now = set(lines), set(after[name])
        found += [f"{name}: missing: {line}" for line in lines if line not in now]
        found += [f"{name}: new: {line}" for line in after[name] if line not in then]
        if then == now:
            found.append(f"{name}: in another order")
    return found


def _lines(host: Namespace, words: tuple[str, ...]) -> list[str]:
    output = host.run(*words, check=False).stdout  # grep(1) fails where a setting cannot be read
    output = _LEARNED.sub(r"\1", output)
    lines = [_PASSING.sub("", line).rstrip() for line in output.splitlines() if not line.startswith("#")]
    return [line for line in lines if line and not _OWN.search(line)]


_BUILT_IN = {
    "raw": "PREROUTING OUTPUT",
    "mangle": "PREROUTING INPUT FORWARD OUTPUT POSTROUTING",
    "nat": "PREROUTING INPUT OUTPUT POSTROUTING",
    "filter": "INPUT FORWARD OUTPUT",
}


def make_tables(host: Namespace) -> None:
    """Create the tables of iptables: they would be created when they are first used, and stay."""
    lines = []
    for table, chains in _BUILT_IN.items():
        rules = [f"{verb} {chain} -j ACCEPT" for chain in chains.split() for verb in ("-A", "-D")]
        lines += [f"*{table}", *rules, "COMMIT"]
    for program in ("iptables-restore", "ip6tables-restore"):
        host.run(program, "--noflush", input="\n".join(lines) + "\n")
