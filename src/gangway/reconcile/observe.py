"""Reads the host: the facts that decisions depend on, and what gangway has in the kernel.

`auto` is nftables, unless another program's FORWARD chain of iptables decides what is forwarded: a drop in any table is
final, so what our own table accepts does not pass a chain that drops (dockerd's and ufw's do), and what such a chain
accepts does not pass a table of ours that drops because nothing was forwarded before.  gangway then adds its rules to
that chain.  For the same reason a family counts as dropped if the chain that drops is not one that our rules are in.
A FORWARD chain with nothing but our rules and our policy decides nothing: gangway returns to nftables.

A chain drops if that is its policy, or if its last rule drops everything (as RHEL and firewalld have it).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from secrets import token_hex

import msgspec

from gangway.daemon.config import Config
from gangway.errors import GangwayError, HostRefused, Unsupported
from gangway.exclusions import excluded_addresses
from gangway.facts import Firewall, HostFacts
from gangway.firewall.iptables.render import DOCKERS_PREFIX
from gangway.firewall.iptables.tool import Iptables
from gangway.firewall.nft import kernel
from gangway.firewall.nft.library import Nftables
from gangway.firewall.nft.transaction import TABLE
from gangway.host import netns, probe, sockets, sysctl
from gangway.host.links import Link, Links
from gangway.model import Address, Protocol, is_interface_name
from gangway.reconcile import observe_links
from gangway.reconcile.containers import Container, Looked, answers_elsewhere, look_into
from gangway.reconcile.dataplane import DataPlane
from gangway.reconcile.routing import Routing, host_addresses, read_routing, unwritable_switch
from gangway.reconcile.state import State
from gangway.state.database import Database

_FAMILIES = (4, 6)
_NOTHING = State()
_IPTABLES_CHAIN = {4: "ip filter FORWARD", 6: "ip6 filter FORWARD"}
_LEGACY_CHAIN = {4: "iptables-legacy filter FORWARD", 6: "ip6tables-legacy filter FORWARD"}

MARK = "gangway "
"""What the alias of each link of gangway's begins with."""

Chains = dict[int, dict[str, str]]
"""By family, other programs' chains for what is forwarded, and the policy of each."""


def shared_chains(family: int) -> tuple[str, ...]:
    """Return the chains that iptables' rules share with others: nft's variant, the legacy one, and mangle."""
    filtering = _IPTABLES_CHAIN[family]
    return filtering, _LEGACY_CHAIN[family], filtering.replace(" filter ", " mangle ")


class Tools:
    """The firewalls that this host has.  Each is tried once: that takes a while, and facts are gathered often."""

    def __init__(self) -> None:
        self._reasons: dict[Firewall, str | None] = {}
        self._legacy: dict[int, bool] = {}

    @cached_property
    def nft(self) -> Nftables | None:
        """libnftables; None where it is not installed."""
        return Nftables.if_installed()

    def close(self) -> None:
        """Free libnftables, if it was needed."""
        nft = self.__dict__.get("nft")
        if nft is not None:
            nft.close()

    def unusable(self, firewall: Firewall) -> str | None:
        """Return why a firewall cannot be used here; None if it can."""
        if firewall not in self._reasons:
            self._reasons[firewall] = None
            try:
                if firewall is Firewall.NFTABLES:
                    kernel.forward_chains()
                    _ = self.nft or Nftables()
                elif firewall is Firewall.IPTABLES:
                    for family in _FAMILIES:
                        Iptables(family).policy()
            except (HostRefused, Unsupported) as error:
                self._reasons[firewall] = str(error)
        return self._reasons[firewall]

    def is_legacy(self, family: int) -> bool:
        """True if iptables is the variant with tables of its own."""
        if family not in self._legacy:
            self._legacy[family] = Iptables(family).is_legacy
        return self._legacy[family]


class Observer:
    """Looks at the host of one daemon; everything is read when it is first needed.

    `adopted_bridges` returns the names of Docker's bridges that are served, `has_leases` whether there are launchers.
    `follow` is told the chains whose changes have to be noticed.  `owned_forward_chains` is the driver's.
    `changed_among`: `host.events.Notices.changed_among`; without it any namespace may have changed.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        links: Links,
        dataplane: DataPlane,
        adopted_bridges: Callable[[], Collection[str]] = tuple,
        has_leases: Callable[[], bool] = bool,
        follow: Callable[[Collection[str]], None] = lambda _: None,
        changed_among: Callable[[frozenset[int]], frozenset[int]] = lambda namespaces: namespaces,
        owned_forward_chains: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._config, self._database, self._links, self._dataplane = config, database, links, dataplane
        self._changed_among, self._owned_forward_chains = changed_among, owned_forward_chains
        self._adopted_bridges, self._has_leases, self._follow = adopted_bridges, has_leases, follow
        self.tools = Tools()
        self._chains: Chains | None = None
        self._owned: Collection[int] = ()
        self._routing: Routing | None = None
        self._excluded: frozenset[Address] | None = None
        self.answers_elsewhere: dict[str, frozenset[Address]] = {}
        """Containers' addresses whose answers do not pass the host, by the link's name."""

    def use(self, config: Config) -> None:
        """Gather facts by other settings from now on.

        The name of chains stays, as the rules that are there have it; so does `firewall` if one of them is `none`,
        which has other redirects.
        """
        former = self._config
        has_none = Firewall.NONE.value in (former.firewall, config.firewall)
        firewall = former.firewall if has_none else config.firewall
        self._config = msgspec.structs.replace(config, chain_prefix=former.chain_prefix, firewall=firewall)

    def alias(self) -> str:
        """Return what marks our links; a daemon with another database has another mark."""
        identity = self._database.recall("identity")
        if identity is None:
            identity = token_hex(4)
            self._database.remember("identity", identity)
        return MARK + identity

    def is_fresh(self) -> bool:
        """True if no daemon with this database has ever changed anything."""
        return self._database.recall("identity") is None

    def orphaned_links(self) -> list[str]:
        """Return the links that daemons with other databases have made, bridges first."""
        ours = self._database.recall("identity")
        marked = [link for link in self._links.all().values() if link.alias.startswith(MARK)]
        orphans = [link for link in marked if ours is None or not link.alias.startswith(MARK + ours)]
        return [link.name for link in sorted(orphans, key=lambda link: (link.kind != "bridge", link.name))]

    def chains(self, anew: bool = False) -> Chains:
        """Return other programs' chains that filter forwarded traffic, if `anew` as they are now."""
        if self._chains is None or anew:
            found = _read_chains()
            self._follow(list(map(str, found)))
            self._chains = _forward_chains(found)
            self._owned = ()
            with suppress(GangwayError):  # a tool failed: then others may have rules there
                self._owned = self._owned_forward_chains()
        return self._chains

    def deciding_chains(self) -> Chains:
        """Return other programs' chains, without iptables' FORWARD where it is ours alone."""
        chains = {family: dict(found) for family, found in self.chains().items()}
        for family in self._owned:
            chains[family].pop(_forward_chain(family, self.tools), None)
        return chains

    def routing(self, anew: bool = False) -> Routing:
        """Return what policy rules and interfaces' switches keep from being translated; read `anew`, or as last."""
        if self._routing is None or anew:
            served = (link.ifindex for link in self._links.bridges() if self._is_served(link))
            self._routing = read_routing(frozenset(served), _forwarded())
        return self._routing

    def excluded(self, anew: bool = False) -> frozenset[Address]:
        """Return the addresses that the setting `exclude` stands for, read `anew` or as last."""
        if self._excluded is None or anew:
            self._excluded = excluded_addresses(self._config.exclude, host_addresses() if self._config.exclude else ())
        return self._excluded

    def facts(self, switched_on: frozenset[int]) -> HostFacts:
        """Return the facts as they are now; `switched_on`: the families that we forward.

        Unsupported: the configured firewall cannot be used.
        """
        config, tools, chains = self._config, self.tools, self.deciding_chains()
        forwarding = _forwarded()
        closing = frozenset(_FAMILIES) - (forwarding - switched_on) if config.ip_forward else frozenset()
        # Without root there are leases only, and no rule is written for them.
        firewall = _choose(config.firewall, tools, chains, closing) if probe.is_root() else Firewall.NONE
        droppers = {family: _dropper(firewall, family, chains[family], tools) for family in _FAMILIES}
        filtered = frozenset(family for family in _FAMILIES if probe.bridge_filtered(family))
        routing = self.routing()
        blocked = _unforwardable(forwarding, config.ip_forward, routing) if firewall is not Firewall.NONE else ()
        return replace(
            self.lease_facts(),
            firewall=firewall,
            missing_protocols=frozenset(protocol for protocol in Protocol if not sockets.has_sockets(protocol)),
            forwarding=forwarding,
            may_forward=config.ip_forward,
            unforwardable=tuple(blocked),
            switched_on=switched_on,
            obey_input=config.obey_input,
            forward_droppers=tuple((family, chain) for family, chain in droppers.items() if chain is not None),
            own_bridge=not (firewall is Firewall.IPTABLES and config.chain_prefix == DOCKERS_PREFIX),
            bridge_filtered=filtered,
            foreign_bridges=self._foreign_bridges() if filtered else (),
            detours=routing.detours,
            lost_sources=routing.lost_sources,
            leased=self._has_leases(),
            answers_elsewhere=frozenset().union(*self.answers_elsewhere.values()),
            no_raw=sockets.no_raw(),
        )

    def lease_facts(self) -> HostFacts:
        """Return the facts that leases depend on: they need no firewall, and each comes with its socket."""
        return HostFacts(
            firewall=Firewall.NONE,
            exclude=self._config.exclude,
            excluded=self.excluded(),
            no_redirect=self._dataplane.redirect.unavailable,
            no_steering=self._dataplane.steering.unavailable,
        )

    def look_into(self, containers: Collection[Container]) -> Looked:
        """Look at the links and into each container; `answers_elsewhere` is what was found there."""
        looked = self._look(containers)
        found = {one.link: answers_elsewhere(one, looked.inside[one.link]) for one in containers}
        self.answers_elsewhere = {link: lost for link, lost in found.items() if lost}
        return looked

    def look_again(self, container: Container) -> bool:
        """Look into a container; True if its answers take another way than before."""
        found = answers_elsewhere(container, look_into(container))
        before, self.answers_elsewhere = self.answers_elsewhere, self.answers_elsewhere | {container.link: found}
        return found != before.get(container.link, frozenset())

    def found(self, wanted: State, looked: Looked) -> State:
        """Return what the host has of ours: links, the relay's ports, the entries of redirect and steering."""
        links = self.found_links(wanted, looked)
        data = self._dataplane.found()
        return replace(links, ports=data.ports, steered=data.steered, redirects=data.redirects)

    def found_links(self, wanted: State = _NOTHING, looked: Looked | None = None) -> State:
        """Return the links of ours, and their properties, without veths whose other end is not where `wanted` says.

        Without `looked`, the containers where nothing has changed since the last look are taken to be as wanted.  So
        are those whose path leads to no namespace, or to another one, as after `ip netns delete` while a process lives
        there.
        """
        attachments = {name: one for name, one in wanted.attachments.items() if one is not None}
        if looked is None:
            containers = [Container(name, one.namespace) for name, one in attachments.items()]
            looked = self._look(containers, changed_only=True)
        mark = self.alias()
        ours = {name: link for name, link in looked.links.items() if link.alias.startswith(mark)}
        veths = {name: link for name, link in ours.items() if link.kind == "veth"}
        at = {
            name: frozenset(observe_links.inside(inside, name, veths[name].peer, one.namespace))
            for name, one in attachments.items()
            if name in veths
            and (inside := looked.inside.get(name)) is not None
            and netns.current_inode(one.namespace) == one.inode
        }
        properties = {one for one in wanted.properties if one.namespace and one.link not in at}
        properties.update(observe_links.on_host(self._links, ours.values()), *at.values())
        veths = {name: link for name, link in veths.items() if at.get(name) != frozenset()}
        return State(
            bridges={name: None for name, link in ours.items() if link.kind == "bridge"},
            attachments=dict.fromkeys(veths),
            isolated=frozenset(name for name, link in veths.items() if link.isolated),
            properties=frozenset(properties),
        )

    def _look(self, containers: Collection[Container], changed_only: bool = False) -> Looked:
        """Enter each container once, or only those where something may have changed since the last look."""
        links = self._links.all()
        numbers = {one.link: links[one.link].peer_namespace for one in containers if one.link in links}
        changed = self._changed_among(frozenset(number for number in numbers.values() if number is not None))
        is_due = {link for link, number in numbers.items() if number is None or number in changed}
        chosen = (one for one in containers if one.link in is_due) if changed_only else containers
        return Looked(links, {one.link: look_into(one, links.get(one.link)) for one in chosen})

    def _is_ours(self, link: Link) -> bool:
        """True if a daemon with this database made the link."""
        return link.alias.startswith(self.alias())

    def _is_served(self, bridge: Link) -> bool:
        """True if a bridge is that of a network, ours or an adopted one."""
        return self._is_ours(bridge) or bridge.name in self._adopted_bridges()

    def _foreign_bridges(self) -> tuple[str, ...]:
        """Return the names of others' bridges, without those that a rule cannot contain."""
        foreign = (link.name for link in self._links.bridges() if not self._is_served(link))
        return tuple(sorted(filter(is_interface_name, foreign)))


def _forward_chains(found: Collection[kernel.Chain]) -> Chains:
    """Return other programs' chains for what is forwarded, and what each does with what no rule accepts."""
    chains: Chains = {family: {} for family in _FAMILIES}
    for chain in found:
        drops = kernel.last_rule_drops(chain)
        if f"{chain.family} {chain.table}" != TABLE and (drops is not None or chain.policy == "drop"):
            for family in chain.versions:  # a chain without rules that accepts decides nothing
                chains[family][str(chain)] = "drop" if drops else chain.policy
    for family in _FAMILIES:
        if (legacy := probe.legacy_forward_policy(family)) is not None:
            chains[family][_LEGACY_CHAIN[family]] = legacy
    return chains


def _forwarded() -> frozenset[int]:
    return frozenset(family for family in _FAMILIES if probe.forwards(family))


def _unforwardable(forwarding: frozenset[int], may_forward: bool, routing: Routing) -> Iterator[tuple[int, str]]:
    """Yield the families that are not forwarded and cannot be, each with the switch that cannot be written."""
    for family in _FAMILIES:
        setting = probe.FORWARDING[family][-1]
        if may_forward and family not in forwarding and (reason := sysctl.unwritable(setting)):
            yield family, unwritable_switch(setting, reason)
        elif family == 4 and routing.unwritable:
            yield family, routing.unwritable[0]


def _read_chains() -> list[kernel.Chain]:
    with suppress(HostRefused):  # the kernel has no nftables
        return kernel.forward_chains()
    return []


def _choose(wanted: str, tools: Tools, chains: Chains, closing: Collection[int]) -> Firewall:
    choices = [Firewall.NFTABLES, Firewall.IPTABLES] if wanted == "auto" else [Firewall(wanted)]
    if any(_decides(chains[family], family, closing) for family in _FAMILIES):
        choices.reverse()
    for firewall in choices:
        if tools.unusable(firewall) is None:
            return firewall
    if wanted != "auto":
        reason = tools.unusable(choices[0])
        raise Unsupported(f"the firewall {wanted} cannot be used: {reason}; or start the daemon with --firewall none")
    reasons = "; ".join(str(tools.unusable(firewall)) for firewall in (Firewall.NFTABLES, Firewall.IPTABLES))
    raise Unsupported(
        f"neither nftables nor iptables can be used ({reasons}): install one, or start the daemon with --firewall none"
    )


def _forward_chain(family: int, tools: Tools) -> str:
    """Return the chain FORWARD of the iptables that this host uses."""
    return (_LEGACY_CHAIN if tools.is_legacy(family) else _IPTABLES_CHAIN)[family]


def _decides(chains: dict[str, str], family: int, closing: Collection[int]) -> bool:
    """True if a FORWARD chain of iptables drops, or if a drop of ours would overrule what it accepts."""
    policies = [chains.get(names[family]) for names in (_IPTABLES_CHAIN, _LEGACY_CHAIN)]
    return "drop" in policies or (family in closing and any(policies))


def _dropper(firewall: Firewall, family: int, chains: dict[str, str], tools: Tools) -> str | None:
    """Return the chain that drops what our rules accept; None if there is none."""
    own = _forward_chain(family, tools) if firewall is Firewall.IPTABLES else None
    return next((name for name, policy in chains.items() if policy == "drop" and name != own), None)
