"""Carries steps out.

What this file knows: which hand does which step.  What it must not know: why, in what order, what comes of a failure.

Each step may be carried out again by a daemon that does not know how far its predecessor came: what is there already
is taken for done, or made anew.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_interface
from socket import socket

from gangway.ebpf.daemon_redirect import Redirects
from gangway.ebpf.daemon_steering import Steered
from gangway.errors import Conflict, GangwayError
from gangway.firewall.base import Driver
from gangway.host import conntrack
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Interface, Link, Links
from gangway.host.saved_settings import SavedSettings
from gangway.model import Address, Network, PortMapping, Protocol, Subnet
from gangway.plan import MappingPlan, NetworkPlan, Road, Route
from gangway.reconcile.diff import (
    Attachment,
    Change,
    Entries,
    Flows,
    Forwarding,
    HostPorts,
    Ports,
    Rewrite,
    State,
    Step,
    Target,
    Verb,
)
from gangway.relay.client import Relay
from gangway.state.allocate import Reserved, take

_TW_REUSE = "net.ipv4.tcp_tw_reuse"


class Executor:
    """All that the daemon changes on this host it changes here."""

    def __init__(
        self,
        rules: Driver,
        redirects: Redirects,
        steered: Steered,
        links: Links,
        relay: Relay,
        borrowed: SavedSettings,
        switches: ForwardingSwitch,
        alias: str,
    ) -> None:
        self.rules = rules
        self.redirects = redirects
        self._steered = steered
        self._entries = {
            Verb.ENTER: redirects.enter,
            Verb.ERASE: redirects.erase,
            Verb.STEER: steered.steer,
            Verb.UNSTEER: steered.unsteer,
        }
        self.reserved: Reserved = {}
        """Ports that are about to be kept."""
        self._netlink = links
        self._relay = relay
        self._saved = borrowed
        self._forwarding = switches
        self._alias = alias
        """Of every link of ours; another daemon's, with another state, have another."""
        self.reuse_ports = True
        """ReservedPorts ports of the relay may be used again at once (`net.ipv4.tcp_tw_reuse`)."""

    def do(self, step: Step) -> None:
        """Carries one step out: all of it or nothing.  GangwayError says what was in the way."""
        match step.what:
            case Rewrite(before, after):
                if after is None:
                    self.rules.remove()
                else:
                    self.rules.rewrite(after, before)
            case Change(withdrawn, published):
                self.rules.change(withdrawn, published)
            case Forwarding(_, after):
                self._forwarding.switch(after)
            case Entries(of):
                self._entries[step.verb](of)
            case Ports(of):
                (self._keep if step.verb is Verb.KEEP else self._drop)(of)
            case Flows(of):
                self._forget(of)
            case _:
                self._link(step)

    def carry_out(self, steps: Iterable[Step]) -> None:
        """All steps, or none: when one fails, those before it are undone, the last one first.

        ExceptionGroup: some of them could not be.
        """
        done: list[Step] = []
        try:
            for step in steps:
                self.do(step)
                done.append(step)
        except BaseException as error:
            failures = [failure for step in reversed(done) if (failure := self.undo(step)) is not None]
            if failures and isinstance(error, Exception):
                raise ExceptionGroup("and what was done already could not all be undone", [error, *failures]) from None
            raise

    def undo(self, step: Step) -> Exception | None:
        """Takes a step back; gives what was in the way."""
        back = step.undo()
        try:
            if back is not None:
                self.do(back)
        except Exception as error:
            return error
        return None

    def found(self) -> State:
        """What there is of ours: links, the relay's ports, and the entries of redirect and steering."""
        ports = dict(self._relay.kept()) if self._relay.lives() else {}
        redirects, steered = self.redirects.found(), self._steered.found()
        return replace(self._found_links(), ports=ports, steered=steered, redirects=redirects)

    def _found_links(self) -> State:
        links = self._netlink.all()
        ours = {name: link for name, link in links.items() if self.is_ours(link)}
        bridges = {name: None for name, link in ours.items() if link.kind == "bridge"}
        numbers = {links[name].number for name in bridges}
        joined = {name: link for name, link in ours.items() if link.kind == "veth" and link.master in numbers}
        return State(
            bridges=bridges,
            attachments=dict.fromkeys(joined),
            isolated=frozenset(name for name, link in joined.items() if link.isolated),
        )

    def is_ours(self, link: Link) -> bool:
        """Whether it was made here."""
        return link.alias.startswith(self._alias)

    def links(self) -> set[str]:
        """The names of all links that are ours and where they should be."""
        state = self._found_links()
        return {*state.bridges, *state.attachments}

    def has_address(self, address: Address) -> bool:
        """Whether it is one of this host's."""
        return str(address).partition("%")[0] in self._netlink.addresses()

    def routed(self) -> Collection[Subnet]:
        """What this host routes by its interfaces."""
        return self._netlink.subnets().keys()

    def check_free(self, network: Network) -> None:
        """Conflict: the host has an interface of the bridge's name, or routes addresses of the network elsewhere."""
        if network.bridge in self._netlink.all():
            raise Conflict(f"there is an interface {network.bridge} already: choose another name with --bridge")
        for routed, interface in self._netlink.subnets().items():
            for subnet in network.subnets:
                if subnet.version == routed.version and subnet.overlaps(routed):
                    raise Conflict(f"subnet {subnet} overlaps {routed}, which this host routes by {interface}")

    def met(self, planned: MappingPlan, route: Route, network: Network, port: int) -> Iterable[str]:
        """What a client meets that asks for a port of a mapping: an entry of the redirect, or rules."""
        if route.road is Road.REDIRECT:
            return (self.redirects.met(planned, port),)
        return self.rules.matching_rules(planned, route, network)

    def put_back_ports(self) -> None:
        """Nothing is published any more."""
        self._saved.restore(_TW_REUSE)
        self._relay.end()

    def _link(self, step: Step) -> None:
        match step.verb, step.what:
            case Verb.MAKE_BRIDGE, NetworkPlan(network):
                self._netlink.make_bridge(
                    network.bridge, f"{self._alias} {network.name}", _gateways(network), network.mtu
                )
            case ((Verb.DELETE_BRIDGE | Verb.DETACH), _):
                self._netlink.delete(step.name)
            case Verb.ATTACH, Attachment() as attachment:
                self._attach(step.name, attachment)
            case Verb.ISOLATE, Attachment() as attachment:
                self._netlink.set_isolated(step.name, attachment.isolated)

    def _attach(self, name: str, attachment: Attachment) -> None:
        endpoint, network = attachment.endpoint, attachment.network
        addresses = [
            ip_interface(f"{address}/{subnet.prefixlen}")
            for address in endpoint.addresses
            for subnet in network.subnets
            if address in subnet
        ]
        self._netlink.delete(name)
        self._netlink.attach(
            name,
            f"{self._alias} {endpoint.container}",
            network.bridge,
            attachment.namespace,
            addresses,
            () if network.internal else [str(gateway) for gateway in network.gateways],
            network.mtu,
        )
        if attachment.isolated:
            self._netlink.set_isolated(name, True)

    def _keep(self, of: tuple[tuple[HostPorts, Target], ...]) -> None:
        if self.reuse_ports:
            with suppress(GangwayError):  # many short connections will run out of ports then, and nothing else
                self._saved.set(_TW_REUSE, "1")
        done: list[tuple[HostPorts, Target]] = []
        try:
            for ports, target in of:
                self._keep_one(ports, target)
                done.append((ports, target))
        except GangwayError:
            self._drop(tuple(done))
            raise

    def _keep_one(self, ports: HostPorts, target: Target) -> None:
        held = self.reserved.pop(ports, None) or take(ports, self._steered if target.is_steered else None)
        if isinstance(held, socket):
            with held:
                return self._relay.keep(ports, target, held)
        try:
            return self._relay.keep(ports, target, None)
        except GangwayError:
            held.close()
            raise

    def _drop(self, of: tuple[tuple[HostPorts, Target], ...]) -> None:
        for ports, target in of:
            self._relay.drop(ports)
            if target.is_steered:
                self._steered.release(ports)

    def _forget(self, of: tuple[MappingPlan, ...]) -> None:
        """Flows that were begun before the change would go on as if it had not been.

        The kernel looks at all that it tracks for each question, so there is one for each protocol and family.
        """
        kinds: dict[tuple[Protocol, int], list[PortMapping]] = {}
        for planned in of:
            kinds.setdefault((planned.mapping.protocol, planned.family), []).append(planned.mapping)
        here = self._netlink.addresses()
        for (protocol, family), mappings in kinds.items():
            if protocol in conntrack.PROTOCOLS:
                conntrack.delete(protocol.value, family, [_asked(mapping, here) for mapping in mappings])


def _asked(mapping: PortMapping, here: Collection[str]) -> conntrack.Asked:
    at = mapping.host_address
    ports_asked = range(mapping.host_ports.first, mapping.host_ports.last + 1)
    return conntrack.Asked(here if at.is_unspecified else {str(at)}, ports_asked)


def _gateways(network: Network) -> list[Interface]:
    return [
        ip_interface(f"{gateway}/{subnet.prefixlen}")
        for subnet, gateway in zip(network.subnets, network.gateways, strict=True)
    ]
