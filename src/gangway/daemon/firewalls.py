"""Which rules go with which firewall, and that no other firewall's are left.

What this file knows: who has written rules before.  What it must not know: how they are written.
"""

import json

from gangway.daemon.ipt_rules import IptRules
from gangway.daemon.rules import REMEMBERED, NftRules, NoRules, Rules
from gangway.daemon.store import Store
from gangway.firewall import apply
from gangway.plan import Firewall


def rules_for(firewall: Firewall, nft: apply.Nftables | None, store: Store, prefix: str) -> Rules:
    """The rules of a firewall.  Whatever another one has left is swept away."""
    remembered = json.loads(store.recall(REMEMBERED) or "{}")
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
