"""The daemon's rules, by whatever firewall it was told to use: rendered, applied, looked after, taken away.

What this file knows: which renderer goes with which way into the kernel.  What it must not know: what the rules are,
why.

How it works.  A change of a mapping is a small transaction.  Everything else (a network more, another fact about the
host, somebody else's change that has hit ours) rewrites all of it in one.  What was written is remembered in the
store, so that a daemon that uses another firewall than the last one can take that one's rules away.
"""

import json
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Protocol

from gangway.errors import HostRefused
from gangway.firewall.nft import render as nftables
from gangway.firewall.nft.library import Nftables
from gangway.host import events
from gangway.model import Network
from gangway.plan import Firewall, MappingPlan, Plan, Route
from gangway.state.database import Database

REMEMBERED = "rules"
"""What the store keeps the rules under: who wrote them, and what is needed to take them away."""


class Driver(Protocol):
    """A firewall that is in use."""

    generation: int
    """That of the host's rules (`events.generation`) after our last change or look: any other has been somebody else's
    doing."""

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        """Everything, in place of what was there: the rules of `before`, if it was known to be there."""

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        """Takes mappings out and puts others in."""

    def are_intact(self, whole: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """Nobody else has changed them; `whole` gives what should be there, if that has to be looked at.

        `thorough`: look also where the kernel gives no notice.
        """

    def are_among_others(self, family: int) -> bool:
        """Other programs have rules in the very chain that ours stand in for what is forwarded."""

    def remove(self) -> None:
        """Takes everything away."""

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """The rules that the first packet of a client meets."""


class NoFirewall:
    """--firewall none."""

    def __init__(self) -> None:
        self.generation = events.generation()

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        """Nothing."""

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        """Nothing."""

    def are_intact(self, whole: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """Always."""
        self.generation = events.generation()
        return True

    def are_among_others(self, family: int) -> bool:
        """Never."""
        return False

    def remove(self) -> None:
        """Nothing."""

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """None."""
        return ()


class NftDriver:
    """nftables."""

    def __init__(self, nft: Nftables, store: Database) -> None:
        self._nft = nft
        self._database = store
        self.generation = events.generation()
        self._listing: str | None = None

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        self._database.remember(REMEMBERED, json.dumps({"firewall": Firewall.NFTABLES}))
        self._apply(nftables.render(plan))
        self._listing = self._nft.listing(nftables.TABLE)

    def change(self, withdrawn: Collection[MappingPlan], published: Collection[MappingPlan]) -> None:
        done: list[str] = []
        try:
            for text in nftables.transactions(nftables.change(withdrawn, published)):
                self._apply(text)
                done.append(text)
        except HostRefused:
            self.generation = -1  # should something of it be left, the next look finds that
            with suppress(HostRefused):
                for text in reversed(done):
                    self._apply(nftables.opposite(text))
            raise

    def are_intact(self, whole: Callable[[], Plan | None], thorough: bool = False) -> bool:
        generation = events.generation()
        if generation == self.generation:
            return True
        wanted = whole()
        intact = (
            wanted is not None
            and self._nft.listing(nftables.TABLE) == self._listing
            and self._nft.element_counts(nftables.TABLE) == nftables.element_counts(wanted)
        )
        if intact:
            self.generation = generation
        return intact

    def are_among_others(self, family: int) -> bool:
        return False

    def remove(self) -> None:
        self._apply(nftables.remove())
        self._listing = None
        self._database.forget(REMEMBERED)

    def met(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        return nftables.rules_met(planned, route, network)

    def _apply(self, text: str) -> None:
        """A transaction makes one generation.  If there are more, somebody else's came between, and ours stays behind
        until that was looked at."""
        before = events.generation()
        self._nft.apply(text)
        after = events.generation()
        if before == self.generation and after - before <= 1:
            self.generation = after
