"""Carries steps out.

What this file knows: what does which step.  What it must not know: why, in what order, what follows from a failure.

A step may be carried out again by a daemon that does not know how far its predecessor came: what is there already
counts as done, or is made anew.
"""

from collections.abc import Callable, Collection, Iterable
from ipaddress import ip_interface

from gangway.errors import Conflict
from gangway.firewall.base import Driver, NoFirewall
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Interface, Links
from gangway.model import Address, Network, PortMapping, Protocol, Subnet
from gangway.plan import MappingPlan, NetworkPlan, Road, Route
from gangway.reconcile.dataplane import DataPlane, Reserved
from gangway.reconcile.diff import Blocks, Change, Flows, Forwarding, Ports, Redirects, Rewrite, Step, Verb
from gangway.reconcile.state import Attachment


class Executor:
    """Everything that the daemon changes on the host it changes here.

    `alias` marks every link of ours; a daemon with another database has another.  `driver` is the firewall in use.
    """

    def __init__(
        self, links: Links, dataplane: DataPlane, forwarding: ForwardingSwitch, alias: Callable[[], str]
    ) -> None:
        self.driver: Driver = NoFirewall()
        self.links = links
        self.dataplane = dataplane
        self.forwarding = forwarding
        self._alias = alias

    def carry_out(self, steps: Iterable[Step], reserved: Reserved | None = None) -> None:
        """Carry out all steps or none: when one fails, those before it are undone, the last one first.

        ExceptionGroup: some of them could not be undone.
        """
        done: list[Step] = []
        try:
            for step in steps:
                self.do(step, reserved)
                done.append(step)
        except BaseException as error:
            failures = [failure for step in reversed(done) if (failure := self._undo(step)) is not None]
            if failures and isinstance(error, Exception):
                raise ExceptionGroup("not all of what was done already could be undone", [error, *failures]) from None
            raise

    def do(self, step: Step, reserved: Reserved | None = None) -> None:
        """Carry out one step: all of it or nothing.  GangwayError: it failed."""
        match step.verb, step.what:
            case _, Rewrite(before, after):
                if after is None:
                    self.driver.remove(before)
                else:
                    self.driver.rewrite(after, before)
            case _, Change(removed, added):
                self.driver.change(removed, added)
            case _, Forwarding(_, after):
                self.forwarding.switch(after)
            case _, Flows(mappings):
                self._flush(mappings)
            case Verb.SERVE, Ports(ports):
                self.dataplane.serve(ports, reserved or {})
            case Verb.REMOVE, Ports(ports):
                self.dataplane.remove(ports)
            case Verb.STEER, Blocks(blocks):
                self.dataplane.steering.add(blocks)
            case Verb.UNSTEER, Blocks(blocks):
                self.dataplane.steering.remove(blocks)
            case Verb.REDIRECT, Redirects(entries):
                self.dataplane.redirect.add(dict(entries))
            case Verb.UNREDIRECT, Redirects(entries):
                self.dataplane.remove_redirects(block for block, _ in entries)
            case _:
                self._change_link(step)

    def check_free(self, network: Network) -> None:
        """Conflict: the host has an interface of the bridge's name, or routes addresses of the network elsewhere."""
        if network.bridge in self.links.all():
            raise Conflict(f"interface {network.bridge} exists already: choose another name with --bridge")
        for routed, interface in self.links.routed_subnets().items():
            for subnet in network.subnets:
                if subnet.version == routed.version and subnet.overlaps(routed):
                    raise Conflict(f"subnet {subnet} overlaps {routed}, which this host routes by {interface}")

    def has_address(self, address: Address) -> bool:
        """True if an address is one of this host's."""
        return str(address).partition("%")[0] in self.links.addresses()

    def routed(self) -> Collection[Subnet]:
        """Return the subnets that this host routes by its interfaces."""
        return self.links.routed_subnets().keys()

    def matching(self, planned: MappingPlan, route: Route, network: Network | None, port: int) -> Iterable[str]:
        """Yield what a client of a mapping's port matches: an entry of the redirect, or rules."""
        if route.road is Road.REDIRECT:
            return (self.dataplane.matching(planned, port),)
        return () if network is None else self.driver.matching_rules(planned, route, network)

    def _undo(self, step: Step) -> Exception | None:
        """Undo a step; return what prevented it."""
        inverse = step.inverse()
        try:
            if inverse is not None:
                self.do(inverse)
        except Exception as error:
            return error
        return None

    def _change_link(self, step: Step) -> None:
        match step.verb, step.what:
            case Verb.MAKE_BRIDGE, NetworkPlan(network):
                alias = f"{self._alias()} {network.name}"
                self.links.create_bridge(network.bridge, alias, _gateways(network), network.mtu)
            case ((Verb.DELETE_BRIDGE | Verb.DETACH), _):
                self.links.delete(step.name)
            case Verb.ATTACH, Attachment() as attachment:
                self._attach(step.name, attachment)
            case Verb.ISOLATE, Attachment() as attachment:
                self.links.set_isolated(step.name, attachment.isolated)

    def _attach(self, name: str, attachment: Attachment) -> None:
        endpoint, network = attachment.endpoint, attachment.network
        addresses = [
            ip_interface(f"{address}/{subnet.prefixlen}")
            for address in endpoint.addresses
            for subnet in network.subnets
            if address in subnet
        ]
        self.links.delete(name)
        self.links.attach(
            name,
            f"{self._alias()} {endpoint.container}",
            network.bridge,
            attachment.namespace,
            addresses,
            () if network.internal else [str(gateway) for gateway in network.gateways],
            network.mtu,
        )
        if attachment.isolated:
            self.links.set_isolated(name, True)

    def _flush(self, planned: Iterable[MappingPlan]) -> None:
        """Delete tracked connections that began before a change: they would go on as if it had not been made.

        The kernel goes through all tracked connections for each request, so there is one for each protocol and family.
        """
        from gangway.host import conntrack  # as for links: it takes megabytes

        kinds: dict[tuple[Protocol, int], list[PortMapping]] = {}
        for one in planned:
            kinds.setdefault((one.mapping.protocol, one.family), []).append(one.mapping)
        own = self.links.addresses()
        for (protocol, family), mappings in kinds.items():
            if protocol in conntrack.SUPPORTED:
                destinations = [conntrack.Destination(*_destination(mapping, own)) for mapping in mappings]
                conntrack.delete(protocol.value, family, destinations)


def _destination(mapping: PortMapping, own: Collection[str]) -> tuple[Collection[str], range]:
    """Return the addresses and ports that clients of a mapping connect to."""
    address, ports = mapping.host_address, mapping.host_ports
    return own if address.is_unspecified else {str(address)}, range(ports.first, ports.last + 1)


def _gateways(network: Network) -> list[Interface]:
    return [
        ip_interface(f"{gateway}/{subnet.prefixlen}")
        for subnet, gateway in zip(network.subnets, network.gateways, strict=True)
    ]
