"""The facts about this host that decisions depend on.

What this file knows: whom to ask for each fact, and which firewall `auto` means.  What it must not know: what follows.

`auto` is nftables, unless another program's FORWARD chain of iptables drops by its policy (dockerd's and ufw's do): a
drop in any table is final, so nothing that a table of our own accepts would pass, whereas a rule in that very chain
does.  For the same reason a family counts as dropped if the chain that drops is not one that our rules can stand in.
"""

from contextlib import suppress

from gangway.daemon.config import Config
from gangway.errors import HostRefused, Unsupported
from gangway.firewall import apply, nftables
from gangway.firewall.iptables import DOCKERS_PREFIX
from gangway.kernel import ports, probe
from gangway.kernel.netlink import Links
from gangway.model import Protocol, is_interface_name
from gangway.plan import Firewall, HostFacts

_FAMILIES = (4, 6)
_WITHOUT = "--firewall none"
_IPTABLES_CHAIN = {4: "ip filter FORWARD", 6: "ip6 filter FORWARD"}

Chains = dict[int, dict[str, str]]
"""By family, other programs' chains for what is forwarded, and the policy of each."""


def gather(
    config: Config, nft: apply.Nftables | None, chains: Chains, links: Links, switched_on: frozenset[int]
) -> HostFacts:
    """All of them, now.  Unsupported: no firewall as it was asked for can be used here."""
    firewall = _choose(config.firewall, nft, chains)
    filtered = probe.bridge_filtered()
    droppers = {family: _dropper(firewall, family, chains[family]) for family in _FAMILIES}
    return HostFacts(
        firewall=firewall,
        forwarding=frozenset(family for family in _FAMILIES if probe.forwards(family)),
        may_forward=config.ip_forward,
        switched_on=switched_on,
        forward_droppers=tuple((family, who) for family, who in droppers.items() if who is not None),
        other_filters=any(chains.values()),
        own_bridge=not (firewall is Firewall.IPTABLES and config.chain_prefix == DOCKERS_PREFIX),
        bridge_filtered=filtered,
        foreign_bridges=_foreign_bridges(links) if filtered else (),
        missing=frozenset(protocol for protocol in Protocol if not ports.has_sockets(protocol)),
    )


def _foreign_bridges(links: Links) -> tuple[str, ...]:
    """But those whose names no rule can bear."""
    bridges = (name for name, link in links.all().items() if link.kind == "bridge" and not link.is_ours)
    return tuple(sorted(filter(is_interface_name, bridges)))


def others(nft: apply.Nftables | None) -> Chains:
    """What other programs do with what is forwarded.  With many elements in our maps this takes a while: libnftables
    reads them all."""
    chains: Chains = {family: {} for family in _FAMILIES}
    if nft is not None:
        with suppress(HostRefused):
            chains = probe.forward_chains(nft.chains(), nftables.TABLE)
    for family in _FAMILIES:
        policy = probe.legacy_forward_policy(family)
        if policy is not None:
            chains[family][_IPTABLES_CHAIN[family]] = policy.lower()
    return chains


def _choose(asked: str, nft: apply.Nftables | None, chains: Chains) -> Firewall:
    if asked != "auto":
        firewall = Firewall(asked)
        why = _unusable(firewall, nft)
        if why is not None:
            raise Unsupported(f"the firewall {firewall} cannot be used: {why}; or start the daemon with {_WITHOUT}")
        return firewall
    no_nftables = _unusable(Firewall.NFTABLES, nft)
    dropped = any(chains[family].get(_IPTABLES_CHAIN[family]) == "drop" for family in _FAMILIES)
    if no_nftables is None and not dropped:
        return Firewall.NFTABLES
    no_iptables = _unusable(Firewall.IPTABLES, nft)
    if no_iptables is None:
        return Firewall.IPTABLES
    if no_nftables is None:
        return Firewall.NFTABLES
    raise Unsupported(
        f"neither nftables nor iptables can be used ({no_nftables}; {no_iptables}): install one, or start the daemon "
        f"with {_WITHOUT}"
    )


def _unusable(firewall: Firewall, nft: apply.Nftables | None) -> str | None:
    """Why a firewall cannot be used here; None if it can."""
    try:
        if firewall is Firewall.NFTABLES:
            (nft or apply.Nftables()).chains()
        elif firewall is Firewall.IPTABLES:
            for family in _FAMILIES:
                apply.Iptables(family).policy()
    except (HostRefused, Unsupported) as error:
        return str(error)
    return None


def _dropper(firewall: Firewall, family: int, chains: dict[str, str]) -> str | None:
    """Who drops what our rules accept."""
    for name, policy in chains.items():
        if policy == "drop" and not (firewall is Firewall.IPTABLES and name == _IPTABLES_CHAIN[family]):
            return name
    return None
