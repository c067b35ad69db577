"""The daemon's rules by iptables and ip6tables: written, compared, taken away.

What this file knows: that rules stand in built-in chains too, and are remembered for that.  What it must not know: what
they are, why.
"""

import json
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from gangway.daemon.config import PREFIX
from gangway.errors import Conflict, GangwayError
from gangway.firewall.base import REMEMBERED
from gangway.firewall.iptables import render as iptables
from gangway.firewall.iptables.policies import ForwardPolicies
from gangway.firewall.iptables.tool import Iptables
from gangway.host import events
from gangway.model import Network
from gangway.plan import Firewall, MappingPlan, Plan, Route
from gangway.state.database import Database

_FAMILIES = (4, 6)

Tables = dict[int, tuple[iptables.Table, ...]]
"""By family."""


class IptablesDriver:
    """iptables and ip6tables, with the policy of FORWARD."""

    def __init__(self, store: Database, prefix: str) -> None:
        self._tools = {family: Iptables(family) for family in _FAMILIES}
        self._database = store
        self._prefix = prefix
        self._policies = ForwardPolicies(self._tools, store)
        self._built_in: Tables = {}
        """The rules in built-in chains, by family."""
        self.generation = -1

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        wanted = self._render(plan)
        built_in = {family: iptables.built_in(tables) for family, tables in wanted.items()}
        former = self._remembered()
        self._check_chains(former)
        # Both are remembered until the new ones are there: a daemon that dies between finds whichever it was.
        self._remember({family: _merged((*former[family], *built_in[family])) for family in _FAMILIES})
        try:
            # What is closed is closed first.
            self._policies.close(plan.closed, _forward(former) | _forward(built_in))
            for family in _FAMILIES:
                self._bring_about(family, wanted[family], former[family])
        except GangwayError:
            self._go_back(before, former, built_in)
            raise
        self._remember(built_in)
        self._built_in = built_in
        self.generation = events.generation()

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        before = self._built_in
        after = {
            family: iptables.with_mappings(tables, withdrawn, published, family) for family, tables in before.items()
        }
        if after != before:
            self._remember({family: _merged((*before[family], *after[family])) for family in _FAMILIES})
        for family in _FAMILIES:
            text = iptables.change(withdrawn, published, family, self._prefix)
            if text:
                self._tools[family].apply(text)
        if after != before:
            self._remember(after)
        self._built_in = after
        self.generation = events.generation()

    def are_intact(self, whole: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """The legacy tables give no notice; nor does any variant of a policy."""
        generation = events.generation()
        if generation == self.generation and not thorough:
            return True
        wanted = whole()
        intact = (
            wanted is not None
            and not any(self._missing(family, tables) for family, tables in self._render(wanted).items())
            and self._policies.are_as(wanted.closed)
        )
        if intact:
            self.generation = generation
        return intact

    def are_among_others(self, family: int) -> bool:
        return bool(self._policies.foreign(family, _forward(self._remembered())))

    def remove(self) -> None:
        former = self._remembered()
        for family in _FAMILIES:
            self._bring_about(family, (), former[family])
        self._policies.close((), ())
        self._built_in = {}
        self._database.forget(REMEMBERED)

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        return iptables.rules_met(planned, route, network, self._prefix)

    def _bring_about(self, family: int, wanted: Collection[iptables.Table], former: Collection[iptables.Table]) -> None:
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
        """Conflict: a chain of that name is another program's.  One of the usual name is ours in any case."""
        if self._prefix == PREFIX:
            return
        for family, tables in former.items():
            listed = iptables.parse_listing(self._tools[family].listing(iptables.TABLES))
            known = {table.name for table in tables if table.chain == self._prefix}
            for name in iptables.TABLES:
                if name not in known and f":{self._prefix}" in listed.get(name, ()):
                    raise Conflict(
                        f"there is a chain {self._prefix} in table {name} that is not gangway's: choose another "
                        "--chain-prefix, or remove it"
                    )

    def _go_back(self, before: Plan | None, former: Tables, built_in: Tables) -> None:
        """As it was, as far as that can be had."""
        whole = self._render(before) if before is not None else former
        for family in _FAMILIES:
            with suppress(GangwayError):
                self._bring_about(family, whole[family], _merged((*former[family], *built_in[family])))
        with suppress(GangwayError):
            self._policies.close(before.closed if before is not None else (), _forward(former))
        self._remember(former)

    def _remember(self, tables: Tables) -> None:
        built_in = {
            str(family): [(table.name, table.chain, table.rules) for table in found] for family, found in tables.items()
        }
        text = json.dumps({"firewall": Firewall.IPTABLES, "prefix": self._prefix, "tables": built_in})
        self._database.remember(REMEMBERED, text)

    def _remembered(self) -> Tables:
        tables = json.loads(self._database.recall(REMEMBERED) or "{}").get("tables", {})
        return {
            family: _merged(
                iptables.Table(name, chain, tuple(rules)) for name, chain, rules in tables.get(str(family), ())
            )
            for family in _FAMILIES
        }


def _merged(tables: Iterable[iptables.Table]) -> tuple[iptables.Table, ...]:
    """One of each name."""
    found: dict[str, iptables.Table] = {}
    for table in tables:
        before = found.get(table.name)
        rules = (*(before.rules if before else ()), *table.rules)
        found[table.name] = iptables.Table(table.name, table.chain, tuple(dict.fromkeys(rules)))
    return tuple(found.values())


def _forward(tables: Tables) -> set[str]:
    """The rules in FORWARD of filter."""
    every = (rule for found in tables.values() for table in found if table.name == "filter" for rule in table.rules)
    return {rule for rule in every if iptables.chain_of(rule) == "FORWARD"}
