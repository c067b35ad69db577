"""The choice of a driver."""

from gangway.facts import Firewall
from gangway.firewall.base import Driver
from gangway.firewall.iptables import driver as iptables
from gangway.firewall.nat_guard import NatGuard
from gangway.firewall.nft import driver as nft
from gangway.firewall.nft.library import Nftables
from gangway.host.rule_notices import RuleNotices
from gangway.host.saved_settings import SavedSettings, Storage


def driver_for(
    firewall: Firewall,
    library: Nftables | None,
    notices: RuleNotices,
    guard: NatGuard,
    storage: Storage,
    saved: SavedSettings,
    prefix: str,
) -> Driver:
    """Return the driver of a firewall, and remove the rules that another firewall's driver has left.

    `library` is libnftables, if it is installed; `prefix` names iptables' chains.  Unsupported: what the firewall needs
    is not installed.
    """
    if firewall is not Firewall.NFTABLES and library is not None and storage.recall(nft.KEY) is not None:
        nft.NftDriver(library, notices, guard, storage).remove()
    former_prefix = iptables.prefix_of_rules(storage)
    if firewall is not Firewall.IPTABLES and former_prefix is not None:
        iptables.IptablesDriver(notices, guard, storage, saved, former_prefix).remove()
    match firewall:
        case Firewall.NFTABLES:
            return nft.NftDriver(library or Nftables(), notices, guard, storage)
        case Firewall.IPTABLES:
            return iptables.IptablesDriver(notices, guard, storage, saved, prefix)
        case Firewall.NONE:
            return Driver(notices, guard)
