"""The driver for iptables and ip6tables: writes the rules, compares and removes them.

Rules in built-in chains do not show which program they belong to, so ours are remembered in the storage.

The policy of FORWARD, which has to be DROP for some plans, belongs to no program: ufw sets it, and so does dockerd.  It
is restored if no program has added a rule to FORWARD since gangway set it; one that has relies on the policy as it is.
"""

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import partial

from gangway.errors import Conflict, GangwayError, HostRefused
from gangway.firewall.base import UNKNOWN, Driver
from gangway.firewall.iptables import render as iptables
from gangway.firewall.iptables.tool import Iptables
from gangway.host import events
from gangway.host.saved_settings import SavedSettings, Setting, Storage
from gangway.model import Network
from gangway.plan import MappingPlan, Plan, Route

_KEY = "iptables rules"
_FAMILIES = (4, 6)
_CLOSED = "DROP"
_STAYS = f"left at {_CLOSED}: other programs have added rules to it: {{}}"

Tables = dict[int, tuple[iptables.Table, ...]]
"""The tables of each family."""


class IptablesDriver(Driver):
    """The rules of both families, and the policy of FORWARD."""

    has_silent_rules = True  # the legacy tables, and policies

    def __init__(self, storage: Storage, saved: SavedSettings, prefix: str) -> None:
        super().__init__()
        self.generation = UNKNOWN
        self._tools = {family: Iptables(family) for family in _FAMILIES}
        self._storage, self._saved, self._prefix = storage, saved, prefix
        self._built_in: Tables = {}  # the rules in built-in chains
        for family, tool in self._tools.items():
            foreign = partial(self._foreign_rules, family)
            saved.register(
                Setting(_policy(tool), tool.policy, tool.set_policy, dependents=foreign, reason_to_stay=_STAYS)
            )

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        wanted = self._render(plan)
        built_in = {family: iptables.built_in(tables) for family, tables in wanted.items()}
        former = self._remembered()
        self._check_chains(former)
        # Both are remembered until the new ones are written: a daemon that dies in between finds either.
        both = {family: (*former[family], *built_in[family]) for family in _FAMILIES}
        self._remember(both)
        try:
            self._close(plan.closed)  # before the rules that allow some packets
            for family in _FAMILIES:
                self._replace(family, wanted[family], former[family])
        except GangwayError:
            self._roll_back(before, former, both)  # as far as that is possible
            raise
        self._remember_less(built_in)
        self._built_in = built_in
        self.generation = events.generation()

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        before = self._built_in
        after = {family: iptables.with_mappings(tables, removed, added, family) for family, tables in before.items()}
        if after != before:
            self._remember({family: (*before[family], *after[family]) for family in _FAMILIES})
        tried = []
        try:
            for family in _FAMILIES:
                text = iptables.change(removed, added, family, self._prefix)
                if text:
                    tried.append(family)
                    self._tools[family].apply(text)
        except HostRefused:
            self.generation = UNKNOWN
            for family in reversed(tried):
                with suppress(HostRefused):  # of the one that failed, only the tables before that which was refused
                    self._tools[family].apply(iptables.change(added, removed, family, self._prefix))
            self._remember_less(before)
            raise
        if after != before:
            self._remember_less(after)
        self._built_in = after
        self.generation = events.generation()

    def has_rules_of(self, plan: Plan) -> bool:
        missing = any(
            iptables.missing(tables, self._listed(family, [table.name for table in tables]))
            for family, tables in self._render(plan).items()
        )
        return not missing and all(self._tools[family].policy() == _CLOSED for family in plan.closed)

    def shares_forward_chain(self, family: int) -> bool:
        return bool(self._foreign_rules(family))

    def remove(self, before: Plan | None = None) -> None:
        former = self._remembered()
        try:
            for family in _FAMILIES:
                self._replace(family, (), former[family])
            self._close(())
        except GangwayError:
            self._roll_back(before, former, former)
            raise
        self._built_in = {}
        with suppress(HostRefused):  # then they are removed once more by a driver of another firewall
            self._storage.forget(_KEY)

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        return iptables.matching_rules(planned, route, network, self._prefix)

    def _replace(self, family: int, wanted: Collection[iptables.Table], former: Collection[iptables.Table]) -> None:
        names = {table.name for table in (*wanted, *former)}
        if names:
            self._tools[family].apply(iptables.batch(wanted, former, self._listed(family, names)))

    def _listed(self, family: int, tables: Collection[str]) -> iptables.Listing:
        return iptables.parse_listing(self._tools[family].listing(tables))

    def _render(self, plan: Plan) -> Tables:
        return {family: iptables.render(plan, family, self._prefix) for family in _FAMILIES}

    def _close(self, families: Collection[int]) -> None:
        """Set the policy of FORWARD to DROP for these families, and restore that of the others."""
        for family, tool in self._tools.items():
            if family in families:
                self._saved.set(_policy(tool), _CLOSED)
            else:
                self._saved.restore(_policy(tool))

    def _foreign_rules(self, family: int) -> list[str]:
        """Return other programs' rules in FORWARD of the table `filter`."""
        own = {rule for table in self._remembered()[family] if table.name == "filter" for rule in table.rules}
        listed = self._listed(family, ["filter"]).get("filter", ())
        return [rule for rule in listed if rule.startswith("-A FORWARD ") and rule not in own]

    def _check_chains(self, former: Tables) -> None:
        """Raise Conflict if a chain of the prefix's name is another program's.  The default name is always ours."""
        if self._prefix == iptables.DEFAULT_PREFIX:
            return
        for family, tables in former.items():
            listed = self._listed(family, iptables.TABLES)
            known = {table.name for table in tables if table.chain == self._prefix}
            for name in iptables.TABLES:
                if name not in known and f":{self._prefix}" in listed.get(name, ()):
                    raise Conflict(
                        f"table {name} has a chain {self._prefix} that was not created by gangway: choose another "
                        "--chain-prefix, or remove the chain"
                    )

    def _roll_back(self, before: Plan | None, former: Tables, both: Tables) -> None:
        """Restore the rules and policies from before a failed change, as far as that is possible."""
        rules = self._render(before) if before is not None else former
        for family in _FAMILIES:
            with suppress(GangwayError):
                self._replace(family, rules[family], both[family])
        with suppress(GangwayError):
            self._close(before.closed if before is not None else ())
        self._remember_less(former)

    def _remember(self, tables: Tables) -> None:
        self._storage.remember(_KEY, json.dumps({"prefix": self._prefix, "tables": tables}))

    def _remember_less(self, tables: Tables) -> None:
        with suppress(HostRefused):  # what is remembered and not there does no harm
            self._remember(tables)

    def _remembered(self) -> Tables:
        found = json.loads(self._storage.recall(_KEY) or "{}").get("tables", {})
        return {
            family: tuple(
                iptables.Table(name, chain, tuple(rules)) for name, chain, rules in found.get(str(family), ())
            )
            for family in _FAMILIES
        }


def prefix_of_rules(storage: Storage) -> str | None:
    """Return the chain prefix of rules that a driver with this storage has not removed; None if there are none."""
    prefix = json.loads(storage.recall(_KEY) or "{}").get("prefix")
    return None if prefix is None else str(prefix)


def _policy(tool: Iptables) -> str:
    return f"{tool.command} policy of FORWARD"
