"""The daemon's rules, by whatever firewall it was told to use: rendered, applied, looked after, taken away.

What this file knows: which renderer goes with which way into the kernel.  What it must not know: what the rules are,
why.

How it works.  A change of a mapping is a small transaction.  Everything else (a network more, another fact about the
host, somebody else's change that has hit ours) rewrites all of it in one.  What was written is remembered in the
store, so that a daemon that uses another firewall than the last one can take that one's rules away.
"""

import json
from collections.abc import Collection, Iterable
from typing import Protocol

from gangway.daemon.store import Store
from gangway.errors import GangwayError
from gangway.firewall import apply, iptables, nftables
from gangway.kernel import events
from gangway.model import Network
from gangway.plan import Firewall, MappingPlan, Plan, Route

_FAMILIES = (4, 6)
_REMEMBERED = "rules"


class Rules(Protocol):
    """A firewall that is in use."""

    generation: int
    """That of the host's rules (`events.generation`) after our last change or look: any other has been somebody else's
    doing."""

    def rewrite(self, plan: Plan) -> None:
        """Everything, in place of what was there."""

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        """Takes mappings out and puts others in."""

    def are_intact(self) -> bool:
        """Nobody else has changed them."""

    def remove(self) -> None:
        """Takes everything away."""

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """The rules that the first packet of a client meets."""


def rules_for(firewall: Firewall, nft: apply.Nftables | None, store: Store, prefix: str) -> Rules:
    """The rules of a firewall.  Whatever another one has left is swept away."""
    remembered = json.loads(store.recall(_REMEMBERED) or "{}")
    former = remembered.get("firewall")
    if former == Firewall.NFTABLES and firewall is not Firewall.NFTABLES and nft is not None:
        NftRules(nft, store).remove()
    if former == Firewall.IPTABLES and firewall is not Firewall.IPTABLES:
        IptRules(store, remembered["prefix"]).remove()
    match firewall:
        case Firewall.NFTABLES:
            return NftRules(nft or apply.Nftables(), store)
        case Firewall.IPTABLES:
            return IptRules(store, prefix)
        case Firewall.NONE:
            return NoRules()


class NoRules:
    """--firewall none."""

    def __init__(self) -> None:
        self.generation = events.generation()

    def rewrite(self, plan: Plan) -> None:
        """Nothing."""

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        """Nothing."""

    def are_intact(self) -> bool:
        """Always."""
        self.generation = events.generation()
        return True

    def remove(self) -> None:
        """Nothing."""

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """None."""
        return ()


class NftRules:
    """nftables."""

    def __init__(self, nft: apply.Nftables, store: Store) -> None:
        self._nft = nft
        self._store = store
        self.generation = events.generation()
        self._listing: str | None = None
        self._undisturbed = True

    def rewrite(self, plan: Plan) -> None:
        self._store.remember(_REMEMBERED, json.dumps({"firewall": Firewall.NFTABLES}))
        self._apply(nftables.render(plan))
        self._listing = self._nft.listing(nftables.TABLE)
        self._undisturbed = True

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        text = nftables.change(withdrawn, published)
        if text:
            self._apply(text)

    def are_intact(self) -> bool:
        generation = events.generation()
        if generation == self.generation and self._undisturbed:
            return True
        intact = self._listing is not None and self._nft.listing(nftables.TABLE) == self._listing
        if intact:
            self.generation, self._undisturbed = generation, True
        return intact

    def remove(self) -> None:
        self._apply(nftables.remove())
        self._listing = None
        self._store.forget(_REMEMBERED)

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        return nftables.rules_met(planned, route, network)

    def _apply(self, text: str) -> None:
        """A transaction makes one generation; if there are more, somebody else's came between."""
        before = events.generation()
        self._nft.apply(text)
        after = events.generation()
        self._undisturbed = self._undisturbed and before == self.generation and after - before <= 1
        self.generation = after


class IptRules:
    """iptables and ip6tables, with the policy of FORWARD."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._tools = {family: apply.Iptables(family) for family in _FAMILIES}
        self._store = store
        self._prefix = prefix
        self._built_in: dict[int, tuple[iptables.Table, ...]] = {}
        """The rules in built-in chains, by family."""
        self.generation = -1

    def rewrite(self, plan: Plan) -> None:
        wanted = {family: iptables.render(plan, family, self._prefix) for family in _FAMILIES}
        built_in = {family: iptables.built_in(tables) for family, tables in wanted.items()}
        former = self._remembered()
        # Both are remembered until the new ones are there: a daemon that dies between finds whichever it was.
        self._remember({family: _merged((*former[family], *built_in[family])) for family in _FAMILIES})
        done = []
        try:
            for family in _FAMILIES:
                done.append(family)
                self._bring_about(family, wanted[family], former[family])
        except GangwayError:
            for family in done:
                self._bring_about(family, former[family], built_in[family])
            self._remember(former)
            raise
        self._remember(built_in)
        self._built_in = built_in
        self._set_policies(plan.closed)
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

    def are_intact(self) -> bool:
        """Of the chain of our own it is enough that it is there: a built-in one refers to it."""
        generation = events.generation()
        if generation == self.generation:
            return True
        intact = all(not self._missing(family) for family in _FAMILIES)
        if intact:
            self.generation = generation
        return intact

    def remove(self) -> None:
        former = self._remembered()
        for family in _FAMILIES:
            self._bring_about(family, (), former[family])
        self._set_policies(frozenset())
        self._built_in = {}
        self._store.forget(_REMEMBERED)

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        return iptables.rules_met(planned, route, network, self._prefix)

    def _bring_about(self, family: int, wanted: Collection[iptables.Table], former: Collection[iptables.Table]) -> None:
        names = {table.name for table in (*wanted, *former)}
        if names:
            listed = iptables.parse_listing(self._tools[family].listing(names))
            self._tools[family].apply(iptables.batch(wanted, former, listed))

    def _missing(self, family: int) -> tuple[str, ...]:
        tables = self._built_in.get(family, ())
        if not tables:
            return ()
        listed = iptables.parse_listing(self._tools[family].listing([table.name for table in tables]))
        return iptables.missing(tables, listed)

    def _set_policies(self, closed: Collection[int]) -> None:
        """DROP where nobody forwarded before us; put back what it was when that is over."""
        for family in _FAMILIES:
            key = f"policy{family}"
            before = self._store.recall(key)
            if family in closed and before is None:
                self._store.remember(key, self._tools[family].policy())
                self._tools[family].set_policy("DROP")
            if family not in closed and before is not None:
                self._tools[family].set_policy(before)
                self._store.forget(key)

    def _remember(self, tables: dict[int, tuple[iptables.Table, ...]]) -> None:
        built_in = {
            str(family): [(table.name, table.chain, table.rules) for table in found] for family, found in tables.items()
        }
        text = json.dumps({"firewall": Firewall.IPTABLES, "prefix": self._prefix, "tables": built_in})
        self._store.remember(_REMEMBERED, text)

    def _remembered(self) -> dict[int, tuple[iptables.Table, ...]]:
        tables = json.loads(self._store.recall(_REMEMBERED) or "{}").get("tables", {})
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
