"""iptables-restore --noflush and iptables-save on rules in memory, as far as gangway uses them.

An assertion fails for what iptables would refuse.
"""

import shlex

Kernel = dict[str, dict[str, list[str]]]
"""The chains of each table, and the rules of each chain."""

_BUILT_IN = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}


def bare() -> Kernel:
    """Return the tables as they are after boot."""
    return {table: {chain: [] for chain in chains} for table, chains in _BUILT_IN.items()}


def restore(kernel: Kernel, text: str) -> None:
    """Carry out the input of iptables-restore."""
    current: dict[str, list[str]] | None = None
    for line in text.splitlines():
        if line.startswith("*"):
            assert current is None, f"{line} before COMMIT"
            current = kernel[line[1:]]
        elif line == "COMMIT":
            assert current is not None, "COMMIT without a table"
            _check_jumps(current)
            current = None
        else:
            assert current is not None, f"{line} outside of a table"
            _command(current, line)
    assert current is None, "the last COMMIT is missing"


def save(kernel: Kernel) -> str:
    """Return the output of iptables-save."""
    lines: list[str] = []
    for table, chains in kernel.items():
        lines += ["# Generated", f"*{table}"]
        lines += [f":{chain} {'ACCEPT' if chain in _BUILT_IN[table] else '-'} [7:420]" for chain in chains]
        lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
        lines += ["COMMIT", "# Completed"]
    return "\n".join(lines) + "\n"


def rules(kernel: Kernel, table: str, chain: str) -> list[str]:
    """Return a chain's rules as iptables-save prints them; none if there is no such chain."""
    return [f"-A {chain} {rule}" for rule in kernel[table].get(chain, ())]


def _command(chains: dict[str, list[str]], line: str) -> None:
    verb, chain, *rest = line.split(" ", 2)
    if verb.startswith(":"):
        chains[verb[1:]] = []
        return
    assert chain in chains, f"{line}: no such chain"
    found, rule = chains[chain], rest[0] if rest else ""
    match verb:
        case "-A":
            found.append(rule)
        case "-D":
            assert rule in found, f"{line}: no such rule"
            found.remove(rule)
        case "-I":
            place, _, rule = rule.partition(" ")
            assert 1 <= int(place) <= len(found) + 1, f"{line}: no such place"
            found.insert(int(place) - 1, rule)
        case "-P":
            assert chain in ("INPUT", "FORWARD", "OUTPUT"), f"{line}: no such policy"
        case "-F":
            found.clear()
        case "-X":
            jumps = [one for each in chains.values() for one in each if f" -j {chain} " in f" {one} "]
            assert not found, f"{line}: it has rules"
            assert not jumps, f"{line}: rules jump to it"
            del chains[chain]
        case _:
            raise AssertionError(f"{line}: unknown")


def _check_jumps(chains: dict[str, list[str]]) -> None:
    targets = ["ACCEPT", "DROP", "RETURN", "MASQUERADE", "DNAT", "SNAT", "REJECT", "TCPMSS", "CHECKSUM", "MARK", "CT"]
    known = {*chains, *targets}
    for found in chains.values():
        for rule in found:
            words = shlex.split(rule)
            target = words[words.index("-j") + 1] if words else "RETURN"
            assert target in known, f"{rule}: no such target"
