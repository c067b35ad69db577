"""The facts about this host that decisions depend on.

What this file knows: whom to ask for each fact, and which firewall `auto` means.  What it must not know: what follows.

`auto` is nftables, unless another program's FORWARD chain of iptables drops by its policy (dockerd's and ufw's do): a
drop in any table is final, so nothing that a table of our own accepts would pass, whereas a rule in that very chain
does.  For the same reason a family counts as dropped if the chain that drops is not one that our rules can stand in.
"""

from gangway.daemon.config import Config
from gangway.daemon.rules import refuse, usable
from gangway.errors import HostRefused, Unsupported
from gangway.firewall import apply, nftables
from gangway.kernel import ports, probe
from gangway.model import Protocol
from gangway.plan import Firewall, HostFacts

_FAMILIES = (4, 6)
_IPTABLES_CHAIN = {4: "ip filter FORWARD", 6: "ip6 filter FORWARD"}

Chains = dict[int, dict[str, str]]
"""By family, other programs' chains for what is forwarded, and the policy of each."""


def gather(config: Config, docker_layout: bool, switched_on: frozenset[int]) -> HostFacts:
    """All of them, now.  Unsupported: no firewall as it was asked for can be used here."""
    others = _others()
    firewall = _choose(config.firewall, others)
    droppers = {family: _dropper(firewall, family, others[family]) for family in _FAMILIES}
    return HostFacts(
        firewall=firewall,
        forwarding=frozenset(family for family in _FAMILIES if probe.forwards(family)),
        may_forward=config.ip_forward,
        switched_on=switched_on,
        forward_droppers=tuple((family, who) for family, who in droppers.items() if who is not None),
        other_filters=any(others.values()),
        own_bridge=not (firewall is Firewall.IPTABLES and docker_layout),
        bridge_filtered=probe.bridge_filtered(),
        missing=frozenset(protocol for protocol in Protocol if not ports.has_sockets(protocol)),
    )


def _others() -> Chains:
    try:
        chains = probe.forward_chains(apply.Nftables().chains(), nftables.TABLE)
    except (HostRefused, Unsupported):
        chains = {family: {} for family in _FAMILIES}
    for family in _FAMILIES:
        policy = probe.legacy_forward_policy(family)
        if policy is not None:
            chains[family][_IPTABLES_CHAIN[family]] = policy.lower()
    return chains


def _choose(asked: str, others: Chains) -> Firewall:
    if asked != "auto":
        firewall = Firewall(asked)
        why = usable(firewall)
        if why is not None:
            raise refuse(firewall, why)
        return firewall
    whys = {firewall: usable(firewall) for firewall in (Firewall.NFTABLES, Firewall.IPTABLES)}
    if all(whys.values()):
        raise Unsupported(
            f"neither nftables nor iptables can be used ({whys[Firewall.NFTABLES]}; {whys[Firewall.IPTABLES]}): "
            "install one, or start the daemon with --firewall none"
        )
    iptables_drops = any(others[family].get(_IPTABLES_CHAIN[family]) == "drop" for family in _FAMILIES)
    if whys[Firewall.NFTABLES] is not None or (iptables_drops and whys[Firewall.IPTABLES] is None):
        return Firewall.IPTABLES
    return Firewall.NFTABLES


def _dropper(firewall: Firewall, family: int, chains: dict[str, str]) -> str | None:
    """Who drops what our rules accept."""
    for name, policy in chains.items():
        if policy == "drop" and not (firewall is Firewall.IPTABLES and name == _IPTABLES_CHAIN[family]):
            return name
    return None
