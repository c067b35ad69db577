"""What every firewall driver can do, the driver for `--firewall none`, and the choice of a driver.

A change of port mappings is a small transaction.  Anything else (another network, a changed fact about the host, rules
that another program has changed) rewrites all rules in one transaction.  Each driver remembers in the storage that it
has written rules, so that a daemon that uses another firewall than the last one can remove them.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from gangway.firewall.iptables import driver as iptables
from gangway.firewall.nft import driver as nft
from gangway.firewall.nft.library import Nftables
from gangway.host import events
from gangway.host.saved_settings import SavedSettings, Storage
from gangway.model import Network
from gangway.plan import Firewall, MappingPlan, Plan, Route


class Driver(Protocol):
    """A firewall that is in use.  Methods that change rules raise HostRefused, and then have changed nothing."""

    generation: int
    """The generation of the host's rules (`events.generation`) after our last change or check.  With any other one,
    another program has changed rules."""

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        """Replace all rules by a plan's; `before` is the plan whose rules are known to be there."""

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        """Remove the rules of some mappings, and add those of others."""

    def is_intact(self, expected: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """True if no other program has changed our rules.

        `expected` returns the plan to compare with, if that is necessary.  `thorough`: look also where the kernel
        gives no notice of changes.
        """

    def shares_forward_chain(self, family: int) -> bool:
        """True if other programs have rules in the FORWARD chain that ours are in."""

    def remove(self, before: Plan | None = None) -> None:
        """Remove all rules; `before` is the plan whose rules are known to be there."""

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """Return the rules that match the first packet of a client, in order."""


class NoFirewall:
    """The driver for --firewall none: there are no rules."""

    def __init__(self) -> None:
        self.generation = events.generation()

    def rewrite(self, plan: Plan, before: Plan | None) -> None:
        """Do nothing."""

    def change(self, removed: Collection[MappingPlan], added: Collection[MappingPlan]) -> None:
        """Do nothing."""

    def is_intact(self, expected: Callable[[], Plan | None], thorough: bool = False) -> bool:
        """Return True."""
        self.generation = events.generation()
        return True

    def shares_forward_chain(self, family: int) -> bool:
        """Return False."""
        return False

    def remove(self, before: Plan | None = None) -> None:
        """Do nothing."""

    def matching_rules(self, planned: MappingPlan, route: Route, network: Network) -> Iterable[str]:
        """Return no rules."""
        return ()


def driver_for(
    firewall: Firewall, library: Nftables | None, storage: Storage, saved: SavedSettings, prefix: str
) -> Driver:
    """Return the driver of a firewall, and remove the rules that another firewall's driver has left.

    `library` is libnftables, if it is installed; `prefix` names iptables' chains.  Unsupported: what the firewall needs
    is not installed.
    """
    if firewall is not Firewall.NFTABLES and library is not None and nft.has_rules(storage):
        nft.NftDriver(library, storage).remove()
    former_prefix = iptables.prefix_of_rules(storage)
    if firewall is not Firewall.IPTABLES and former_prefix is not None:
        iptables.IptablesDriver(storage, saved, former_prefix).remove()
    match firewall:
        case Firewall.NFTABLES:
            return nft.NftDriver(library or Nftables(), storage)
        case Firewall.IPTABLES:
            return iptables.IptablesDriver(storage, saved, prefix)
        case Firewall.NONE:
            return NoFirewall()
