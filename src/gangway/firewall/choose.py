"""Which rules go with which firewall, and that no other firewall's are left.

What this file knows: who has written rules before.  What it must not know: how they are written.
"""

import json

from gangway.firewall.base import REMEMBERED, Driver, NftDriver, NoFirewall
from gangway.firewall.iptables.driver import IptablesDriver
from gangway.firewall.nft.library import Nftables
from gangway.plan import Firewall
from gangway.state.database import Database


def rules_for(firewall: Firewall, nft: Nftables | None, store: Database, prefix: str) -> Driver:
    """The rules of a firewall.  Whatever another one has left is swept away."""
    remembered = json.loads(store.recall(REMEMBERED) or "{}")
    former = remembered.get("firewall")
    if former == Firewall.NFTABLES and firewall is not Firewall.NFTABLES and nft is not None:
        NftDriver(nft, store).remove()
    if former == Firewall.IPTABLES and firewall is not Firewall.IPTABLES:
        IptablesDriver(store, remembered["prefix"]).remove()
    match firewall:
        case Firewall.NFTABLES:
            return NftDriver(nft or Nftables(), store)
        case Firewall.IPTABLES:
            return IptablesDriver(store, prefix)
        case Firewall.NONE:
            return NoFirewall()
