"""The facts about this host that decisions depend on.

What this file knows: whom to ask for each fact, and which firewall `auto` means.  What it must not know: what follows.

`auto` is nftables, unless another program's FORWARD chain of iptables decides what is forwarded: a drop in any table is
final, so nothing that a table of our own accepts passes a chain that drops (dockerd's and ufw's do), and nothing that
such a chain accepts passes a table of our own that drops because nobody forwarded before.  Rules in that very chain do.
For the same reason a family counts as dropped if the chain that drops is not one that our rules can stand in.

A chain drops if that is its policy, or if its last rule does, whatever comes (the habit of RHEL and of firewalld).
"""

from collections.abc import Callable, Collection
from contextlib import suppress

from gangway.daemon.config import Config
from gangway.errors import HostRefused, Unsupported
from gangway.firewall.iptables.render import DOCKERS_PREFIX
from gangway.firewall.iptables.tool import Iptables
from gangway.firewall.nft import render as nftables
from gangway.firewall.nft.library import Nftables
from gangway.host import probe
from gangway.host import sockets as ports
from gangway.host.links import Link
from gangway.model import Protocol, is_interface_name
from gangway.plan import Firewall, HostFacts

_FAMILIES = (4, 6)
_WITHOUT = "--firewall none"
_IPTABLES_CHAIN = {4: "ip filter FORWARD", 6: "ip6 filter FORWARD"}
_LEGACY_CHAIN = {4: "iptables-legacy filter FORWARD", 6: "ip6tables-legacy filter FORWARD"}

Chains = dict[int, dict[str, str]]
"""By family, other programs' chains for what is forwarded, and the policy of each."""


def shared_chains(family: int) -> tuple[str, ...]:
    """Where the rules of an iptables stand beside others: in nft's variant, the legacy one, and mangle."""
    filtering = _IPTABLES_CHAIN[family]
    return filtering, _LEGACY_CHAIN[family], filtering.replace(" filter ", " mangle ")


class Tools:
    """The firewalls that this host has.  Each is tried once: that takes a while, and a host is looked at often."""

    def __init__(self) -> None:
        self.nft = Nftables.if_installed()
        self._whys: dict[Firewall, str | None] = {}
        self._legacy: dict[int, bool] = {}

    def unusable(self, firewall: Firewall) -> str | None:
        """Why a firewall cannot be used here; None if it can."""
        if firewall not in self._whys:
            self._whys[firewall] = _try(firewall, self.nft)
        return self._whys[firewall]

    def is_legacy(self, family: int) -> bool:
        """Whether iptables is the variant that has tables of its own."""
        if family not in self._legacy:
            self._legacy[family] = Iptables(family).is_legacy
        return self._legacy[family]


def gather(
    config: Config,
    tools: Tools,
    chains: Chains,
    bridges: Callable[[], Collection[Link]],
    switched_on: frozenset[int],
    no_redirect: str,
    no_steering: str,
) -> HostFacts:
    """All of them, now; `bridges` lists other programs'.  Unsupported: no firewall as it was asked for can be used."""
    forwarding = frozenset(family for family in _FAMILIES if probe.forwards(family))
    closing = frozenset(_FAMILIES) - (forwarding - switched_on) if config.ip_forward else frozenset()
    firewall = _choose(config.firewall, tools, chains, closing)
    droppers = {family: _dropper(firewall, family, chains[family], tools) for family in _FAMILIES}
    filtered = frozenset(family for family in _FAMILIES if probe.bridge_filtered(family))
    return HostFacts(
        firewall=firewall,
        forwarding=forwarding,
        may_forward=config.ip_forward,
        switched_on=switched_on,
        forward_droppers=tuple((family, who) for family, who in droppers.items() if who is not None),
        own_bridge=not (firewall is Firewall.IPTABLES and config.chain_prefix == DOCKERS_PREFIX),
        bridge_filtered=filtered,
        foreign_bridges=_bearable(bridges()) if filtered else (),
        missing=frozenset(protocol for protocol in Protocol if not ports.has_sockets(protocol)),
        no_redirect=no_redirect,
        no_steering=no_steering,
    )


def others(nft: Nftables | None) -> Chains:
    """What other programs do with what is forwarded.  With many elements in our maps this takes a while: libnftables
    reads them all."""
    chains: Chains = {family: {} for family in _FAMILIES}
    if nft is not None:
        with suppress(HostRefused):
            chains = probe.forward_chains(nft.chains(), nftables.TABLE)
    for found in chains.values():
        for name, policy in tuple(found.items()):
            table, _, chain = name.rpartition(" ")
            with suppress(HostRefused):
                last = nft.last_rule(table, chain) if nft is not None else None
                if last is None and policy == "accept":
                    del found[name]  # it says nothing
                elif last is not None and probe.drops_all(last):
                    found[name] = "drop"
    for family in _FAMILIES:
        legacy = probe.legacy_forward_policy(family)
        if legacy is not None:
            chains[family][_LEGACY_CHAIN[family]] = legacy
    return chains


def _bearable(bridges: Collection[Link]) -> tuple[str, ...]:
    """Their names, but those that no rule can bear."""
    return tuple(sorted(link.name for link in bridges if is_interface_name(link.name)))


def _choose(asked: str, tools: Tools, chains: Chains, closing: Collection[int]) -> Firewall:
    if asked != "auto":
        firewall = Firewall(asked)
        why = tools.unusable(firewall)
        if why is not None:
            raise Unsupported(f"the firewall {firewall} cannot be used: {why}; or start the daemon with {_WITHOUT}")
        return firewall
    no_nftables = tools.unusable(Firewall.NFTABLES)
    if no_nftables is None and not any(_decides(chains[family], family, closing) for family in _FAMILIES):
        return Firewall.NFTABLES
    no_iptables = tools.unusable(Firewall.IPTABLES)
    if no_iptables is None:
        return Firewall.IPTABLES
    if no_nftables is None:
        return Firewall.NFTABLES
    raise Unsupported(
        f"neither nftables nor iptables can be used ({no_nftables}; {no_iptables}): install one, or start the daemon "
        f"with {_WITHOUT}"
    )


def _decides(chains: dict[str, str], family: int, closing: Collection[int]) -> bool:
    """Whether a FORWARD chain of iptables drops, or would be cut short by a drop of ours."""
    policies = [chains.get(names[family]) for names in (_IPTABLES_CHAIN, _LEGACY_CHAIN)]
    return "drop" in policies or (family in closing and any(policies))


def _try(firewall: Firewall, nft: Nftables | None) -> str | None:
    """What is in the way."""
    try:
        if firewall is Firewall.NFTABLES:
            (nft or Nftables()).chains()
        elif firewall is Firewall.IPTABLES:
            for family in _FAMILIES:
                Iptables(family).policy()
    except (HostRefused, Unsupported) as error:
        return str(error)
    return None


def _dropper(firewall: Firewall, family: int, chains: dict[str, str], tools: Tools) -> str | None:
    """Who drops what our rules accept."""
    own = None
    if firewall is Firewall.IPTABLES:
        own = (_LEGACY_CHAIN if tools.is_legacy(family) else _IPTABLES_CHAIN)[family]
    return next((name for name, policy in chains.items() if policy == "drop" and name != own), None)
