"""Rules of iptables in tables: compared with a listing of iptables-save(8), and written by iptables-restore(8).

What this file knows: the spelling of both, and that rules of other programs share the built-in chains with ours.  What
it must not know: what a rule is for.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

TABLES = ("raw", "mangle", "nat", "filter")  # that have rules, in the order in which they are written

Listing = Mapping[str, Counter[str]]
"""The rules of each table, and how often each is listed; each chain is listed as the rule `:NAME`."""


class Table(NamedTuple):
    """The rules in one table.  `rules` are `-A CHAIN …`; each CHAIN is either `chain` or a built-in one."""

    name: str
    chain: str
    rules: tuple[str, ...]

    @property
    def has_chain(self) -> bool:
        """True if a rule is in our own chain, or jumps to it."""
        return any(f" {self.chain} " in f"{rule} " for rule in self.rules)

    @property
    def built_in(self) -> tuple[str, ...]:
        """Return the rules in built-in chains, in order."""
        return tuple(rule for rule in self.rules if chain_of(rule) != self.chain)

    @property
    def own(self) -> tuple[str, ...]:
        """Return the rules in our own chain, in order."""
        return tuple(rule for rule in self.rules if chain_of(rule) == self.chain)


def batch(wanted: Collection[Table], applied: Collection[Table], listed: Listing) -> str:
    """Return the text for iptables-restore --noflush that replaces the rules `applied` by those `wanted`.

    `listed` are the rules that the kernel has, ours and other programs'.  With nothing wanted, all that was applied is
    removed.  Several tables of one name count as one.
    """
    text = []
    for name in dict.fromkeys(table.name for table in (*applied, *wanted)):
        old, new = _joined(name, applied), _joined(name, wanted)
        rules = listed.get(name, Counter())
        text.append(f"*{name}")
        if new.has_chain:
            text.append(f":{new.chain} - [0:0]")
        moved = [*_out_of_place(old.built_in, new.built_in, rules)]
        # A rule may be listed twice: for two mappings to the same port of a container.
        ours = dict.fromkeys(rule for rule in (*old.built_in, *new.built_in) if chain_of(rule) in moved)
        text += [deletion(rule) for rule in ours for _ in range(rules[rule])]
        text += [*_insertions(name, (rule for rule in new.built_in if chain_of(rule) in moved)), *new.own]
        if new.chain != old.chain and f":{old.chain}" in rules:
            text += [f"-F {old.chain}", f"-X {old.chain}"]
        text.append("COMMIT")
    return "\n".join(text) + "\n"


def statements(removed: Iterable[Table], added: Iterable[Table], spell: Callable[[str], str] = str) -> str:
    """Return the text that removes rules and adds others, which `spell` may place; empty if there are none."""
    lines: dict[str, list[str]] = {}
    for tables, spelled in ((removed, deletion), (added, spell)):
        for table in filter(lambda one: one.rules, tables):
            lines.setdefault(table.name, []).extend(map(spelled, table.rules))
    return "".join(f"*{name}\n" + "\n".join(rules) + "\nCOMMIT\n" for name, rules in lines.items())


def with_change(tables: Iterable[Table], removed: Collection[Table], added: Collection[Table]) -> tuple[Table, ...]:
    """Return what `built_in` returns, after a change."""

    def changed(table: Table) -> Table:
        left = list(table.rules)
        for rule in _joined(table.name, removed).built_in:
            if rule in left:
                left.remove(rule)
        return table._replace(rules=(*left, *_joined(table.name, added).built_in))

    return tuple(map(changed, tables))


def built_in(tables: Iterable[Table]) -> tuple[Table, ...]:
    """Return the tables with only their rules in built-in chains."""
    return tuple(table._replace(rules=table.built_in) for table in tables)


def listed_rules(tables: Collection[Table], listed: Listing) -> tuple[Table, ...]:
    """Return what is listed of some tables: every rule in our own chains, and the other rules that the tables have."""
    found = []
    for name in dict.fromkeys(table.name for table in tables):
        table = _joined(name, tables)
        known = set(table.built_in)
        rules = Counter(
            {rule: n for rule, n in listed.get(name, {}).items() if rule in known or _is_in(rule, table.chain)}
        )
        if rules:
            found.append(Table(name, table.chain, tuple(rules.elements())))
    return tuple(found)


def are_listed(tables: Collection[Table], former: Collection[Table], listed: Listing) -> bool:
    """True if the rules of some tables are listed, as often as they should be, and none of former ones besides."""
    found = {table.name: Counter(table.rules) for table in listed_rules((*former, *tables), listed)}
    names = {table.name for table in tables}
    return found == {name: rules for name in names if (rules := Counter(_joined(name, tables).rules))}


def parse_listing(text: str) -> dict[str, Counter[str]]:
    """Parse the output of iptables-save(8)."""
    found: dict[str, Counter[str]] = {}
    rules: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("*"):
            rules = found.setdefault(line[1:], Counter())
        elif line.startswith(("-A ", ":")):
            rules[line if line.startswith("-") else line.split()[0]] += 1
    return found


def chain_of(rule: str) -> str:
    """Return CHAIN of a rule `-A CHAIN …`."""
    return rule.split(" ", 2)[1]


def deletion(rule: str) -> str:
    """Return what deletes a rule."""
    return f"-D{rule[2:]}"


def insertion(rule: str, place: int = 1) -> str:
    """Return what inserts a rule at a place in its chain, of which the first is 1."""
    chain = chain_of(rule)
    return f"-I {chain} {place}{rule[len('-A ') + len(chain) :]}"


def _is_in(rule: str, chain: str) -> bool:
    return rule.startswith(f"-A {chain} ")


def _joined(name: str, tables: Collection[Table]) -> Table:
    found = [table for table in tables if table.name == name]
    chain = found[-1].chain if found else ""
    return Table(name, chain, tuple(rule for table in found for rule in table.rules))


def _out_of_place(old: Collection[str], new: Collection[str], listed: Counter[str]) -> Iterator[str]:
    """Yield the built-in chains where our rules have to be written anew: others keep their place in the chain."""
    ours = {*old, *new}
    for chain in dict.fromkeys(map(chain_of, (*old, *new))):
        found = [rule for rule in listed.elements() if rule in ours and chain_of(rule) == chain]
        if found != [rule for rule in new if chain_of(rule) == chain]:
            yield chain


def _insertions(table: str, rules: Iterable[str]) -> Iterator[str]:
    """Insert rules at the head of each chain, in order, before other programs' rules.

    What translates destinations is appended: other programs' translations are for an address and a port.
    """
    places: Counter[str] = Counter()
    for rule in rules:
        chain = chain_of(rule)
        places[chain] += 1
        is_last = table == "nat" and chain in ("PREROUTING", "OUTPUT")
        yield rule if is_last else insertion(rule, places[chain])
