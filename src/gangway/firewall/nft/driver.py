"""The driver for nftables: writes the rules through libnftables, and looks after them."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import cached_property

from gangway.errors import HostRefused
from gangway.firewall.base import UNKNOWN, Driver
from gangway.firewall.nft import render
from gangway.firewall.nft.answers import Answers, Elements
from gangway.firewall.nft.library import Nftables
from gangway.host import events
from gangway.host.saved_settings import Storage
from gangway.model import Network
from gangway.plan import MappingPlan, Plan, Route

KEY = "nftables rules"
"""Remembered in the storage while there are any."""


class NftDriver(Driver):
    """The rules in the table `inet gangway`."""

    def __init__(self, library: Nftables, storage: Storage) -> None:
        super().__init__()
        self._library, self._storage = library, storage
        self._listing: str | None = None
        self._answers: Answers | None = None  # not known until all rules are written

    @cached_property
    def _features(self) -> render.Features:
        return render.probe_features(self._library.accepts)

    @property
    def no_timeouts(self) -> str:  # type: ignore[override]
        return (
            "" if self._features.timeouts else "this kernel's nftables sets no timeouts (CONFIG_NF_CONNTRACK_TIMEOUT)"
        )

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        self._storage.remember(KEY, render.TABLE)
        self._replace(plan)
        self._answers = Answers(plan.mappings)
        self._listing = self._library.listing(render.TABLE)

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        """Delete elements of the table's maps, and add others: a long list takes several transactions."""
        changed: tuple[Elements, Elements] = self._answers.change(removed, added) if self._answers else ({}, {})
        done: list[render.Transaction] = []
        try:
            for transaction in render.change(removed, added, self._features).extended(*changed).split():
                self._apply(transaction.text())
                done.append(transaction)
        except HostRefused:
            if self._answers:
                self._answers.change(added, removed)
            self.generation = UNKNOWN  # should a part of it be left, the next check finds that
            with suppress(HostRefused):
                for transaction in reversed(done):
                    self._apply(transaction.inverse().text())
            raise

    def has_rules_of(self, plan: Plan) -> bool:
        is_listed = self._library.listing(render.TABLE) == self._listing
        return is_listed and self._library.element_counts(render.TABLE) == render.element_counts(plan, self._features)

    def remove(self, before: Plan | None = None) -> None:
        self._apply(render.remove())
        self._listing = None
        with suppress(HostRefused):  # then the table is deleted once more by a driver of another firewall
            self._storage.forget(KEY)

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network, port: int) -> Iterable[str]:
        return render.matching_rules(planned, route, network, port)

    def _replace(self, plan: Plan) -> None:
        try:
            self._apply(render.render(plan, self._features, self._library.listing(render.TABLE)))
        except HostRefused:  # the table has something of these names that cannot be changed in place
            self._apply(render.render(plan, self._features))

    def _apply(self, text: str) -> None:
        """Carry out a transaction, which increments the generation by one.

        If it has grown by more, another program has changed rules in between; ours then stays behind, so that the next
        check compares them.
        """
        before = events.generation()
        self._library.apply(text)
        after = events.generation()
        if before == self.generation and after - before <= 1:
            self.generation = after
