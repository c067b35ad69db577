"""The driver for iptables and ip6tables: writes the rules, compares and removes them.

Rules in built-in chains do not show which program they belong to, so ours are remembered in the storage.

The policy of FORWARD, which has to be DROP for some plans, belongs to no program: ufw sets it, and so does dockerd.  It
is restored if no program has added a rule to FORWARD since gangway set it; one that has relies on the policy as it is.
"""

import json
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import cached_property, partial

from gangway.errors import Conflict, GangwayError, HostRefused
from gangway.firewall.base import Driver
from gangway.firewall.iptables import render as iptables
from gangway.firewall.iptables import timeouts
from gangway.firewall.iptables.tables import (
    TABLES,
    Listing,
    Table,
    are_listed,
    batch,
    built_in,
    insertion,
    listed_rules,
    parse_listing,
    statements,
    with_change,
)
from gangway.firewall.iptables.tool import Iptables
from gangway.firewall.nat_guard import NatGuard
from gangway.host.rule_notices import Change, RuleNotices
from gangway.host.saved_settings import SavedSettings, Setting, Storage
from gangway.model import Network
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, Plan, Route

_KEY = "iptables rules"
_FAMILIES = (4, 6)
_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_CLOSED = "DROP"
_STAYS = f"left at {_CLOSED}: other programs have added rules to it: {{}}"

Tables = dict[int, tuple[Table, ...]]
"""The tables of each family."""


class IptablesDriver(Driver):
    """The rules of both families, and the policy of FORWARD.

    A change takes a transaction for each family and table.  If one fails, all are undone: the rules are listed and
    compared with those from before, because a tool that was ended may have written its rules nevertheless.
    """

    no_new_ports = "iptables does not know which address the client asked"
    has_silent_rules = True  # the legacy tables, and policies

    def __init__(
        self, notices: RuleNotices, guard: NatGuard, storage: Storage, saved: SavedSettings, prefix: str
    ) -> None:
        self._tools = {family: Iptables(family) for family in _FAMILIES}
        self._storage, self._saved, self._prefix = storage, saved, prefix
        super().__init__(notices, guard)
        self._no_timeouts: str | None = None  # not known yet
        self._built_in: Tables = dict.fromkeys(_FAMILIES, ())  # the rules in built-in chains
        for family, tool in self._tools.items():
            foreign = partial(self._foreign_rules, family)
            saved.register(
                Setting(policy_name(tool), tool.policy, tool.set_policy, dependents=foreign, reason_to_stay=_STAYS)
            )

    @property
    def no_timeouts(self) -> str:  # type: ignore[override]
        """Why connections by nat have conntrack's ordinary timeouts; also empty as long as no rules were written."""
        return self._no_timeouts or ""

    def _sets_timeouts(self) -> bool:
        """True if rules can set timeouts.  TimedOut: that could not be found out."""
        if self._no_timeouts is None:
            self._no_timeouts = timeouts.unavailable(self._tools.values())
        return not self._no_timeouts

    @cached_property
    def _is_legacy(self) -> bool:
        return all(tool.is_legacy for tool in self._tools.values())

    def owns(self, change: Change) -> bool:
        chains = ("", self._prefix, *_BUILT_IN)
        return change.family in ("ip", "ip6") and change.table in TABLES and change.chain in chains

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        self._check_chains()
        if self._sets_timeouts():
            timeouts.create()  # they are deleted with the rules
        wanted = self._render(plan)
        self.notices.forget()
        self._replace(wanted, plan.closed)
        self._built_in = {family: built_in(tables) for family, tables in wanted.items()}
        self._remember_less(self._built_in)
        self._record(plan)
        if not self._is_legacy:
            self._guard.start()

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        timeouts = self._sets_timeouts()

        def rules(plans: Collection[MappingPlan]) -> Tables:
            return {family: iptables.of_mappings(plans, family, self._prefix, timeouts) for family in _FAMILIES}

        self._change(rules(removed), rules(added))
        self._record_change(removed, added)

    def change_further(self, removed: Collection[Neighbours], added: Collection[Neighbours]) -> None:
        def rules(clients: Collection[Neighbours]) -> Tables:
            return {family: iptables.of_further(clients, family, self._prefix) for family in _FAMILIES}

        self._change(rules(removed), rules(added), insertion)
        self._record_further(removed, added)

    def has_rules_of(self, plan: Plan) -> bool:
        former = remembered_rules(self._storage)
        intact = (
            are_listed(tables, former[family], self._listed(family)) for family, tables in self._render(plan).items()
        )
        return all(intact) and all(self._tools[family].policy() == _CLOSED for family in plan.closed)

    def shares_forward_chain(self, family: int) -> bool:
        return bool(self._foreign_rules(family))

    def owned_forward_chains(self) -> frozenset[int]:
        found = (family for family in _FAMILIES if not self._foreign_rules(family))
        policies = {family: self._saved.original(policy_name(self._tools[family])) for family in found}
        return frozenset(family for family, policy in policies.items() if policy != _CLOSED)

    def remove(self, before: Plan | None = None) -> None:
        self._replace(dict.fromkeys(_FAMILIES, ()), ())
        timeouts.delete()
        self._built_in = dict.fromkeys(_FAMILIES, ())
        self._guard.stop()
        self._record(None)
        with suppress(HostRefused):  # then they are removed once more by a driver of another firewall
            self._storage.forget(_KEY)

    def claim(self, interfaces: Collection[str]) -> None:
        words = {*interfaces, self._prefix}
        found: Tables = {}
        for family in _FAMILIES:
            listed = self._listed(family)
            found[family] = tuple(
                Table(name, self._prefix, tuple(rule for rule in rules if words & set(rule.split()[2:])))
                for name, rules in listed.items()
            )
        self._remember(remembered_rules(self._storage), found)

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network, port: int) -> Iterable[str]:
        """Return the rules that match; those that the kernel does not have now are marked."""
        rules = [*iptables.matching_rules(planned, route, network, self._prefix, self._further(planned))]
        listed = self._listed(planned.family) if rules else {}
        for rule in rules:
            table, _, text = rule.partition(": ")
            yield rule if text in listed.get(table, ()) else f"{rule} (missing in the kernel)"

    def _change(self, removed: Tables, added: Tables, spell: Callable[[str], str] = str) -> None:
        """Remove some rules and add others, which `spell` may place: all or nothing."""
        former = self._built_in
        after = {family: with_change(tables, removed[family], added[family]) for family, tables in former.items()}
        if after != former:
            self._remember(former, after)
        try:
            for family in _FAMILIES:
                if text := statements(removed[family], added[family], spell):
                    self._apply(family, text)
        except HostRefused as error:
            self._undo(self._render(self._written()), added, error)
            self._remember_less(former)
            raise
        if after != former:
            self._remember_less(after)
        self._built_in = after

    def _replace(self, wanted: Tables, closed: Collection[int]) -> None:
        """Replace all rules, and the policies of FORWARD: all or nothing."""
        former, was_closed = remembered_rules(self._storage), self._closed()
        listed = {family: self._listed(family) for family in _FAMILIES}
        before = {family: listed_rules((*wanted[family], *former[family]), listed[family]) for family in _FAMILIES}
        # Both are remembered until the new ones are written: a daemon that dies in between finds either.
        self._remember(former, wanted)
        try:
            self._close(closed)  # before the rules that allow some packets
            for family in _FAMILIES:
                if wanted[family] or former[family]:
                    self._apply(family, batch(wanted[family], former[family], listed[family]))
        except GangwayError as error:
            self._undo(before, wanted, error, was_closed)
            self._remember_less(former)
            raise

    def _undo(
        self, before: Tables, written: Tables, error: GangwayError, closed: Collection[int] | None = None
    ) -> None:
        """Restore the rules from before a failed change, which may have written some of its own, and the policies.

        HostRefused: some were not restored; then both remain remembered.
        """
        failures = []
        for family in _FAMILIES:
            try:
                listed = self._listed(family)
                if not are_listed(before[family], written[family], listed):
                    self._apply(family, batch(before[family], (*before[family], *written[family]), listed))
            except HostRefused as failure:
                failures.append(failure)
        if closed is not None:
            with suppress(GangwayError):
                self._close(closed)
        if failures:
            self.notices.suspect()
            raise HostRefused(f"{error}; rules from before this change could not be restored: {failures[0]}") from None

    def _apply(self, family: int, text: str) -> None:
        with self.notices.own_change():
            self._tools[family].apply(text)

    def _listed(self, family: int, table: str | None = None) -> Listing:
        return parse_listing(self._tools[family].listing(table))

    def _render(self, plan: Plan) -> Tables:
        return {family: iptables.render(plan, family, self._prefix, self._sets_timeouts()) for family in _FAMILIES}

    def _closed(self) -> list[int]:
        """Return the families whose policy of FORWARD is DROP because of us."""
        return [family for family, tool in self._tools.items() if self._saved.is_changed(policy_name(tool))]

    def _close(self, families: Collection[int]) -> None:
        """Set the policy of FORWARD to DROP for these families, and restore that of the others."""
        for family, tool in self._tools.items():
            if family in families:
                self._saved.set(policy_name(tool), _CLOSED)
            else:
                self._saved.restore(policy_name(tool))

    def _foreign_rules(self, family: int) -> list[str]:
        """Return other programs' rules in FORWARD of the table `filter`."""
        own = {
            rule for table in remembered_rules(self._storage)[family] if table.name == "filter" for rule in table.rules
        }
        listed = self._listed(family, "filter").get("filter", ())
        return [rule for rule in listed if rule.startswith("-A FORWARD ") and rule not in own]

    def _check_chains(self) -> None:
        """Raise Conflict if a chain of the prefix's name is another program's.  The default name is always ours."""
        if self._prefix == iptables.DEFAULT_PREFIX:
            return
        for family, tables in remembered_rules(self._storage).items():
            listed = self._listed(family)
            known = {table.name for table in tables if table.chain == self._prefix}
            for name in TABLES:
                if name not in known and f":{self._prefix}" in listed.get(name, ()):
                    raise Conflict(
                        f"table {name} has a chain {self._prefix} that was not created by gangway: choose another "
                        "--chain-prefix, or remove the chain"
                    )

    def _remember(self, *alternatives: Tables) -> None:
        """Remember the rules in built-in chains: those of all alternatives, of which one is written."""
        tables = {
            family: [*dict.fromkeys(table for found in alternatives for table in built_in(found[family]))]
            for family in _FAMILIES
        }
        self._storage.remember(_KEY, json.dumps({"prefix": self._prefix, "tables": tables}))

    def _remember_less(self, tables: Tables) -> None:
        with suppress(HostRefused):  # what is remembered and not there does no harm
            self._remember(tables)


def remembered_rules(storage: Storage) -> Tables:
    """Return the rules in built-in chains that a driver with this storage has written and not removed."""
    found = json.loads(storage.recall(_KEY) or "{}").get("tables", {})
    return {
        family: tuple(Table(name, chain, tuple(rules)) for name, chain, rules in found.get(str(family), ()))
        for family in _FAMILIES
    }


def prefix_of_rules(storage: Storage) -> str | None:
    """Return the chain prefix of rules that a driver with this storage has not removed; None if there are none."""
    prefix = json.loads(storage.recall(_KEY) or "{}").get("prefix")
    return None if prefix is None else str(prefix)


def policy_name(tool: Iptables) -> str:
    """Return the name that the policy of FORWARD has among the saved settings."""
    return f"{tool.command} policy of FORWARD"
