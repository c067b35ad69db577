"""What every firewall driver does; the base itself is the driver for `--firewall none`, which has no rules.

A change of port mappings is a small transaction, and so is one of a container's further networks.  Anything else
(another network, a changed fact about the host, rules that another program has changed) rewrites all rules in one
transaction.  Each driver remembers in the storage that it has written rules, so that a daemon that uses another
firewall than the last one can remove them.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from gangway.errors import HostRefused
from gangway.firewall.nat_guard import NatGuard
from gangway.host.rule_notices import Change, RuleNotices
from gangway.model import Network
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, Plan, Route


class Driver:
    """A firewall that is in use.  Methods that change rules raise HostRefused, and then have changed nothing."""

    no_timeouts = ""
    """Why connections by nat have conntrack's ordinary timeouts; empty if they have their own."""
    no_new_ports = ""
    """Why answers of a UDP server from a new port may not leave from the address that was asked; empty if they do."""
    has_silent_rules = False  # True if the kernel gives no notice of some changes

    def __init__(self, notices: RuleNotices, guard: NatGuard) -> None:
        self.notices, self._guard = notices, guard
        notices.follow(self.owns)
        self._plan: Plan | None = None  # whose rules were written last
        self._mappings: dict[str, MappingPlan] | None = None  # those that have rules now, if any has changed since

    def owns(self, _change: Change) -> bool:
        """True if a change is about rules of this driver's."""
        return False

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        """Replace all rules by a plan's; `before` is the plan whose rules are known to be there."""

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        """Remove the rules of some mappings, and add those of others."""

    def change_further(self, removed: Collection[Neighbours], added: Collection[Neighbours]) -> None:
        """Remove the rules for some clients on further networks, and add those for others."""

    def is_intact(self, expected: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """True if no other program has changed our rules.

        `expected` returns the plan to compare with, if that is necessary.  `thorough`: look also where the kernel
        gives no notice of changes.
        """
        if not (self.notices.have_ours_changed() or (thorough and self.has_silent_rules)):
            return True
        self.notices.forget()
        plan, is_same = expected(), False
        try:
            is_same = plan is not None and self.has_rules_of(plan)
        finally:
            if not is_same:
                self.notices.suspect()
        return is_same

    def has_rules_of(self, plan: Plan) -> bool:
        """True if our rules in the kernel are a plan's."""
        return True

    def shares_forward_chain(self, family: int) -> bool:
        """True if other programs have rules in the FORWARD chain that ours are in."""
        return False

    def owned_forward_chains(self) -> frozenset[int]:
        """Return the families whose chain FORWARD would accept everything without our rules and our policy."""
        return frozenset()

    def remove(self, before: Plan | None = None) -> None:
        """Remove all rules; `before` is the plan whose rules are known to be there."""

    def claim(self, interfaces: Collection[str]) -> None:
        """Regard rules about these interfaces as ours, so that they are removed with the others."""

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network, port: int) -> Iterable[str]:
        """Return the rules that match the first packet of a client of one of the mapping's ports, in order."""
        return ()

    def _further(self, planned: MappingPlan) -> list[Neighbours]:
        """Return the clients on further networks of a mapping's container, as far as rules were written for them."""
        written = () if self._plan is None else self._plan.further
        return sorted((one for one in written if one.address == planned.container_address), key=str)

    def _record(self, plan: Plan | None) -> None:
        """Record that all rules have been written."""
        self._plan, self._mappings = plan, None

    def _record_change(self, removed: Iterable[MappingPlan], added: Iterable[MappingPlan]) -> None:
        """Record that rules of mappings have been written."""
        if self._mappings is None:
            written = () if self._plan is None else self._plan.mappings
            self._mappings = {str(one.mapping): one for one in written}
        for one in removed:
            self._mappings.pop(str(one.mapping), None)
        self._mappings.update((str(one.mapping), one) for one in added)

    def _record_further(self, removed: Iterable[Neighbours], added: Iterable[Neighbours]) -> None:
        """Record that rules for clients on further networks have been written."""
        if self._plan is not None:
            self._plan = replace(self._plan, further=self._plan.further.difference(removed).union(added))

    def _written(self) -> Plan:
        """Return the plan whose rules should be there.  HostRefused: there is none."""
        if self._plan is None:
            raise HostRefused("the firewall's rules are missing: the daemon's log says why they could not be written")
        return self._plan if self._mappings is None else replace(self._plan, mappings=tuple(self._mappings.values()))
