"""The driver for nftables: writes the rules through libnftables, and looks after them."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import cached_property

from gangway.errors import HostRefused
from gangway.firewall.base import Driver
from gangway.firewall.nat_guard import NatGuard
from gangway.firewall.nft import elements, kernel, render
from gangway.firewall.nft.answers import Answers
from gangway.firewall.nft.elements import Element
from gangway.firewall.nft.features import Features, probe
from gangway.firewall.nft.library import Nftables
from gangway.firewall.nft.transaction import TABLE, Transaction
from gangway.host.rule_notices import Change, RuleNotices
from gangway.host.saved_settings import Storage
from gangway.model import Network
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, Plan, Road, Route

KEY = "nftables rules"
"""Remembered in the storage while there are any."""

Elements = dict[str, frozenset[Element]]
"""The elements of sets and maps, by name."""


class NftDriver(Driver):
    """The rules in the table `inet gangway`."""

    def __init__(self, library: Nftables, notices: RuleNotices, guard: NatGuard, storage: Storage) -> None:
        super().__init__(notices, guard)
        self._library, self._storage = library, storage
        self._answers: Answers | None = None  # not known until all rules are written
        self._rules: tuple[bytes, ...] = ()  # those that were written last
        self._of_networks: Elements = {}  # the elements that were written with them

    @cached_property
    def _features(self) -> Features:
        return probe(self._library.accepts)

    @property
    def no_timeouts(self) -> str:  # type: ignore[override]
        return (
            "" if self._features.timeouts else "this kernel's nftables sets no timeouts (CONFIG_NF_CONNTRACK_TIMEOUT)"
        )

    @property
    def no_new_ports(self) -> str:  # type: ignore[override]
        return "" if self._features.remembers else "this kernel's nftables adds no elements to maps by rules"

    def owns(self, change: Change) -> bool:
        return f"{change.family} {change.table}" == TABLE

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        self._storage.remember(KEY, TABLE)
        self.notices.forget()
        self._write(plan)
        self._record(plan)
        self._guard.start()

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        """Delete elements of the table's maps, and add others: a long list takes several transactions."""
        answers = self._answers
        changed = answers.change(removed, added) if answers else ({}, {})
        try:
            self._carry_out(render.change(removed, added, self._features).extended(*changed))
        except HostRefused:
            if answers:
                answers.change(added, removed)
            raise
        self._record_change(removed, added)

    def change_further(self, removed: Collection[Neighbours], added: Collection[Neighbours]) -> None:
        self._carry_out(render.change_further(removed, added))
        self._record_further(removed, added)

    def has_rules_of(self, plan: Plan) -> bool:
        """Compare what is there; rules, and elements of networks, with what was there when they were written."""
        if self._plan is None or plan.networks != self._plan.networks:
            return False
        if kernel.chains_and_rules(TABLE) != self._rules:
            return False
        return _found(render.SETS_OF_NETWORKS) == self._of_networks and self._has_elements_of(plan)

    def remove(self, before: Plan | None = None) -> None:
        self._apply(render.remove())
        self._guard.stop()
        self._record(None)
        with suppress(HostRefused):  # then the table is deleted once more by a driver of another firewall
            self._storage.forget(KEY)

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network, port: int) -> Iterable[str]:
        """Return the rules that match, and the element of a map as the kernel has it now."""
        rules = [*render.matching_rules(planned, route, network, port, self._further(planned))]
        if route.road is Road.NAT:
            name, key = render.place_of(planned), elements.pack_key(*render.key_of(planned, port))
            found = kernel.element(TABLE, name, key)
            target = "nothing" if found is None else elements.unpack_target(found.target)
            rules.append(f"map {name}, as the kernel has it: {planned.mapping.protocol} port {port} leads to {target}")
        return rules

    def _write(self, plan: Plan) -> None:
        answers = Answers(plan.mappings)
        try:
            self._apply(render.render(plan, self._features, kernel.names(TABLE), answers))
        except HostRefused:  # the table has something of these names that cannot be changed in place
            self._apply(render.render(plan, self._features, answers=answers))
        self._answers = answers
        self._rules = kernel.chains_and_rules(TABLE)
        self._of_networks = _found(render.SETS_OF_NETWORKS)

    def _carry_out(self, transaction: Transaction) -> None:
        try:
            for part in transaction.split():
                self._apply(part.text())
        except HostRefused as error:
            self._restore(error)
            raise

    def _apply(self, text: str) -> None:
        with self.notices.own_change():
            self._library.apply(text)

    def _restore(self, error: HostRefused) -> None:
        """Restore the rules from before a failed change, of which some transactions may have been carried out."""
        try:
            expected = self._written()
            if not self.has_rules_of(expected):
                self._write(expected)
        except HostRefused as failure:
            self.notices.suspect()
            raise HostRefused(f"{error}; rules from before this change could not be restored: {failure}") from None

    def _has_elements_of(self, plan: Plan) -> bool:
        wanted = render.changing_elements(plan, self._features, Answers(plan.mappings))
        return _found(render.CHANGING_SETS) == {
            name: frozenset(elements.pack(text, render.is_interval(name)) for text in wanted.get(name, ()))
            for name in render.CHANGING_SETS
        }


def _found(names: Iterable[str]) -> Elements:
    """Return the elements that the kernel has."""
    return {name: kernel.elements(TABLE, name) for name in names}
