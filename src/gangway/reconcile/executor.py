"""Carries steps out.

A step may be carried out again by a daemon that does not know how far its predecessor came: what exists already counts
as done, or is created again.
"""

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from ipaddress import ip_interface, ip_network

from gangway.errors import Conflict, HostRefused, Unsupported
from gangway.firewall.base import Driver
from gangway.host import conntrack
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.links import Interface, Links
from gangway.host.sysctl import ReadOnly
from gangway.model import Address, Network, Protocol, Source, Subnet
from gangway.plan import MappingPlan, NetworkPlan, Origin, Plan, Road, Route
from gangway.reconcile import diff
from gangway.reconcile.dataplane import DataPlane, Reserved
from gangway.reconcile.diff import Step
from gangway.reconcile.properties import BRIDGE_SETTINGS, WITHOUT_BRIDGE_SETTING, Kind, Property
from gangway.reconcile.state import Attachment

_ANSWER_S = 0.05  # how long a container's answer may be on its way to the relay's client


class Executor:
    """Makes every change of the host that a request or a repair needs.

    `alias` marks every link of ours; a daemon with another database has another.  `driver` is the firewall
    in use, which may change.
    """

    def __init__(
        self, driver: Driver, links: Links, dataplane: DataPlane, forwarding: ForwardingSwitch, alias: Callable[[], str]
    ) -> None:
        self.driver = driver
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
            failures: list[Exception] = []
            for inverse in filter(None, (step.inverse() for step in reversed(done))):
                try:
                    self.do(inverse)
                except Exception as failure:
                    failures.append(failure)
            if failures and isinstance(error, Exception):
                raise ExceptionGroup("not all of what was done already could be undone", [error, *failures]) from None
            raise

    def do(self, step: Step, reserved: Reserved | None = None) -> None:
        """Carry out one step: all of it or nothing.  GangwayError: it failed."""
        match step:
            case diff.Rewrite() | diff.Rules() | diff.Further():
                self._change_rules(step)
            case diff.Forwarding(_, families):
                self.forwarding.switch(families)
            case diff.Flows(removed, added):
                self.delete_flows(removed)
                self.delete_flows(added, former=True)
            case diff.Ports((), ports):
                self.dataplane.serve(ports, reserved or {})
            case diff.Ports(ports):
                self.dataplane.remove(ports)
            case diff.Steered((), entries):
                self.dataplane.steering.add(dict(entries))
            case diff.Steered(entries):
                self.dataplane.steering.remove(block for block, _ in entries)
            case diff.Redirects((), entries):
                self.dataplane.add_redirects(dict(entries))
            case diff.Redirects(entries):
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
        return self.links.has_address(str(address))

    def matching(self, planned: MappingPlan, route: Route, network: Network | None, port: int) -> Iterable[str]:
        """Yield what a client of a mapping's port matches: an entry of the redirect, or rules."""
        if route.road is Road.REDIRECT:
            return (self.dataplane.matching(planned, port),)
        if network is None or not planned.has_rules:
            return ()
        return self.driver.matching_rules(planned, route, network, port)

    def _change_rules(self, step: Step) -> None:
        match step:
            case diff.Rewrite(before, Plan() as after):
                self.driver.rewrite(after, before)
            case diff.Rewrite(before):
                self.driver.remove(before)
            case diff.Rules(removed, added):
                self.driver.change(removed, added)
            case diff.Further(removed, added):
                self.driver.change_further(removed, added)

    def _change_link(self, step: Step) -> None:
        match step:
            case diff.Bridge(_, NetworkPlan(network)):
                alias = f"{self._alias()} {network.name}"
                addresses = _interfaces(network.gateways, network)
                self.links.create_bridge(network.bridge, alias, addresses, network.mtu, BRIDGE_SETTINGS)
            case diff.Veth(_, Attachment() as attachment):
                self._attach(step.name, attachment)
            case diff.Properties(_, missing):
                for one in missing:
                    self._restore(one)
            case diff.Isolation(_, isolated):
                self.links.set_isolated(step.name, isolated)
            case diff.Bridge() | diff.Veth():
                self.links.delete(step.name)

    def _restore(self, one: Property) -> None:
        if not one.namespace:
            return _restore(self.links, one.link, one)
        with self.links.inside(one.link, one.namespace) as (there, name):
            return _restore(there, name, one)

    def _attach(self, name: str, attachment: Attachment) -> None:
        endpoint, network = attachment.endpoint, attachment.network
        has_default_route = endpoint.is_first and not network.internal
        if attachment.udp:  # before the container has a link that its answers to these clients would take
            self.delete_flows(attachment.udp, clients=network.subnets)
        self.links.delete(name)
        self.links.attach(
            name,
            f"{self._alias()} {endpoint.container}",
            network.bridge,
            attachment.namespace,
            _interfaces(endpoint.addresses, network),
            [str(gateway) for gateway in network.gateways] if has_default_route else (),
            network.mtu,
        )
        if attachment.isolated:
            self.links.set_isolated(name, True)

    def delete_flows(
        self, planned: Iterable[MappingPlan], former: bool = False, clients: Collection[Subnet] = ()
    ) -> bool:
        """Delete tracked connections to ports of mappings; `former`: only those on another road than the plan's.

        With `clients`, only those of clients in these subnets.  Return whether there were any.

        They began before a change, and would continue on their former road.  An answer that is on its way may lead a
        client back to it, so former ones are deleted a second time if there were any.  The kernel goes through all
        tracked connections for each request, so there is one for each protocol and family.  Where it has no access to
        them, `doctor` says so.
        """
        own, is_any = self.links.addresses(), False
        kinds: dict[tuple[Protocol, int], list[conntrack.Destination]] = {}
        for one in planned:
            address, ports = one.mapping.host_address, one.mapping.host_ports
            to = own if address.is_unspecified else {str(address)}
            container = str(one.container_address) if former and _is_translated(one) else ""
            destination = conntrack.Destination(to, range(ports.first, ports.last + 1), container)
            kinds.setdefault((one.mapping.protocol, one.family), []).append(destination)
        for (protocol, family), destinations in kinds.items():
            subnets = [one for one in clients if one.version == family]
            if clients and not subnets:
                continue
            with suppress(Unsupported):
                found = conntrack.delete(protocol.value, family, destinations, subnets)
                is_any = is_any or found
                if found and former:
                    time.sleep(_ANSWER_S)
                    conntrack.delete(protocol.value, family, destinations, subnets)
        return is_any


def _is_translated(planned: MappingPlan) -> bool:
    """True if rules, which are dockerd's for a lease, lead all clients that do not use loopback to the container."""
    is_lease = planned.mapping.source is Source.LEASE
    return is_lease or all(
        route.road is Road.NAT for route in planned.roads.routes if route.origin is not Origin.LOOPBACK
    )


def _restore(links: Links, name: str, one: Property) -> None:
    """Restore a property of the interface `name` in the calling thread's network namespace."""
    match one.kind:
        case Kind.SETTING:
            _set_ipv6_setting(links, name, *one.value.split("="))
        case Kind.BRIDGE:
            links.join(name, one.value)
        case Kind.MTU:
            links.set_mtu(name, int(one.value))
        case Kind.UP:
            links.set_up(name)
        case Kind.ADDRESS:
            links.add_address(name, ip_interface(one.value))
        case Kind.ROUTE:
            links.add_route(name, ip_network(one.value), one.detail)
        case Kind.DEFAULT_ROUTE:
            links.add_default_route(name, one.detail)
        case Kind.LOOPBACK:
            links.set_up("lo")


def _set_ipv6_setting(links: Links, name: str, setting: str, value: str) -> None:
    try:
        links.set_ipv6_setting(name, setting, value)
    except ReadOnly as error:
        raise HostRefused(f"{error}: {WITHOUT_BRIDGE_SETTING[setting]}") from None


def _interfaces(addresses: Iterable[Address], network: Network) -> list[Interface]:
    """Return addresses with their subnets."""
    pairs = ((address, subnet) for address in addresses for subnet in network.subnets if address in subnet)
    return [ip_interface(f"{address}/{subnet.prefixlen}") for address, subnet in pairs]
