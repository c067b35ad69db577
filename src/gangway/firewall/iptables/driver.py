"""The driver for iptables and ip6tables: writes the rules, compares and removes them.

Some rules are in the built-in chains, where nothing tells them from other programs'.  So these are remembered in the
storage.
"""

import json
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from gangway.errors import Conflict, GangwayError, HostRefused
from gangway.firewall.iptables import render as iptables
from gangway.firewall.iptables.policies import ForwardPolicies
from gangway.firewall.iptables.tool import Iptables
from gangway.host import events
from gangway.host.saved_settings import SavedSettings, Storage
from gangway.model import Network
from gangway.plan import MappingPlan, Plan, Route

_KEY = "iptables rules"
_FAMILIES = (4, 6)
_UNKNOWN = -1

Tables = dict[int, tuple[iptables.Table, ...]]
"""The tables of each family."""


class IptablesDriver:
    """The rules of both families, and the policy of FORWARD."""

    def __init__(self, storage: Storage, saved: SavedSettings, prefix: str) -> None:
        self._tools = {family: Iptables(family) for family in _FAMILIES}
        self._storage = storage
        self._prefix = prefix
        self._policies = ForwardPolicies(self._tools, saved, lambda: _forward_rules(self._remembered()))
        self._built_in: Tables = {}
        """The rules in built-in chains."""
        self.generation = _UNKNOWN

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        """Replace all rules."""
        wanted = self._render(plan)
        built_in = {family: iptables.built_in(tables) for family, tables in wanted.items()}
        former = self._remembered()
        self._check_chains(former)
        # Both are remembered until the new ones are written: a daemon that dies in between finds either.
        self._remember({family: _merged((*former[family], *built_in[family])) for family in _FAMILIES})
        try:
            self._policies.close(plan.closed)  # before the rules that allow some packets
            for family in _FAMILIES:
                self._replace(family, wanted[family], former[family])
        except GangwayError:
            self._roll_back(before, former, built_in)
            raise
        self._remember_less(built_in)
        self._built_in = built_in
        self.generation = events.generation()

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        """Remove the rules of some mappings, and add those of others."""
        before = self._built_in
        after = {family: iptables.with_mappings(tables, removed, added, family) for family, tables in before.items()}
        if after != before:
            self._remember({family: _merged((*before[family], *after[family])) for family in _FAMILIES})
        tried = []
        try:
            for family in _FAMILIES:
                text = iptables.change(removed, added, family, self._prefix)
                if text:
                    tried.append(family)
                    self._tools[family].apply(text)
        except HostRefused:
            self.generation = _UNKNOWN
            for family in reversed(tried):
                with suppress(HostRefused):  # of the one that failed, only the tables before that which was refused
                    self._tools[family].apply(iptables.change(added, removed, family, self._prefix))
            self._remember_less(before)
            raise
        if after != before:
            self._remember_less(after)
        self._built_in = after
        self.generation = events.generation()

    def is_intact(self, expected: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """Compare rules and policies.  `thorough`: the kernel gives no notice of the legacy tables and of policies."""
        generation = events.generation()
        if generation == self.generation and not thorough:
            return True
        plan = expected()
        intact = (
            plan is not None
            and not any(self._missing(family, tables) for family, tables in self._render(plan).items())
            and self._policies.are_closed(plan.closed)
        )
        if intact:
            self.generation = generation
        return intact

    def shares_forward_chain(self, family: int) -> bool:
        """True if other programs have rules in FORWARD of the table `filter`."""
        return bool(self._policies.foreign_rules(family))

    def remove(self, before: Plan | None = None) -> None:
        """Remove all rules, and restore the policies."""
        former = self._remembered()
        try:
            for family in _FAMILIES:
                self._replace(family, (), former[family])
            self._policies.close(())
        except GangwayError:
            self._roll_back(before, former, dict.fromkeys(_FAMILIES, ()))
            raise
        self._built_in = {}
        with suppress(HostRefused):  # then they are removed once more by a driver of another firewall
            self._storage.forget(_KEY)

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """Return the rules that match the first packet of a client, in order."""
        return iptables.matching_rules(planned, route, network, self._prefix)

    def _replace(self, family: int, wanted: Collection[iptables.Table], former: Collection[iptables.Table]) -> None:
        names = {table.name for table in (*wanted, *former)}
        if names:
            listed = iptables.parse_listing(self._tools[family].listing(names))
            self._tools[family].apply(iptables.batch(wanted, former, listed))

    def _render(self, plan: Plan) -> Tables:
        return {family: iptables.render(plan, family, self._prefix) for family in _FAMILIES}

    def _missing(self, family: int, tables: Collection[iptables.Table]) -> tuple[str, ...]:
        listed = iptables.parse_listing(self._tools[family].listing([table.name for table in tables]))
        return iptables.missing(tables, listed)

    def _check_chains(self, former: Tables) -> None:
        """Raise Conflict if a chain of the prefix's name is another program's.  The default name is always ours."""
        if self._prefix == iptables.DEFAULT_PREFIX:
            return
        for family, tables in former.items():
            listed = iptables.parse_listing(self._tools[family].listing(iptables.TABLES))
            known = {table.name for table in tables if table.chain == self._prefix}
            for name in iptables.TABLES:
                if name not in known and f":{self._prefix}" in listed.get(name, ()):
                    raise Conflict(
                        f"table {name} has a chain {self._prefix} that was not created by gangway: choose another "
                        "--chain-prefix, or remove the chain"
                    )

    def _roll_back(self, before: Plan | None, former: Tables, built_in: Tables) -> None:
        """Restore the rules and policies from before a failed change, as far as that is possible."""
        rules = self._render(before) if before is not None else former
        for family in _FAMILIES:
            with suppress(GangwayError):
                self._replace(family, rules[family], _merged((*former[family], *built_in[family])))
        with suppress(GangwayError):
            self._policies.close(before.closed if before is not None else ())
        self._remember_less(former)

    def _remember(self, tables: Tables) -> None:
        built_in = {
            str(family): [(table.name, table.chain, table.rules) for table in found] for family, found in tables.items()
        }
        self._storage.remember(_KEY, json.dumps({"prefix": self._prefix, "tables": built_in}))

    def _remember_less(self, tables: Tables) -> None:
        with suppress(HostRefused):  # what is remembered and not there does no harm
            self._remember(tables)

    def _remembered(self) -> Tables:
        tables = json.loads(self._storage.recall(_KEY) or "{}").get("tables", {})
        return {
            family: _merged(
                iptables.Table(name, chain, tuple(rules)) for name, chain, rules in tables.get(str(family), ())
            )
            for family in _FAMILIES
        }


def prefix_of_rules(storage: Storage) -> str | None:
    """Return the chain prefix of rules that a driver with this storage has not removed; None if there are none."""
    prefix = json.loads(storage.recall(_KEY) or "{}").get("prefix")
    return None if prefix is None else str(prefix)


def _merged(tables: Iterable[iptables.Table]) -> tuple[iptables.Table, ...]:
    """Merge the tables of one name."""
    found: dict[str, iptables.Table] = {}
    for table in tables:
        before = found.get(table.name)
        rules = (*(before.rules if before else ()), *table.rules)
        found[table.name] = iptables.Table(table.name, table.chain, tuple(dict.fromkeys(rules)))
    return tuple(found.values())


def _forward_rules(tables: Tables) -> set[str]:
    """Return the rules in FORWARD of the table `filter`."""
    rules = (rule for found in tables.values() for table in found if table.name == "filter" for rule in table.rules)
    return {rule for rule in rules if iptables.chain_of(rule) == "FORWARD"}
