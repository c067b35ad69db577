"""Reads the properties of links that gangway has configured (`properties.py`): on the host, and in a container."""

from collections.abc import Collection, Iterator

from gangway.host import dump, sysctl
from gangway.host.links import Link, Links, main_routes
from gangway.inet import FAMILIES
from gangway.reconcile.properties import BRIDGE_SETTINGS, Kind, Property


def on_host(links: Links, ours: Collection[Link]) -> Iterator[Property]:
    """Yield the properties of the ends on the host of our links."""
    bridges = {link.ifindex: link.name for link in ours if link.kind == "bridge"}
    for link in ours:
        yield from _of_link(link, link.name, "")
        if link.hairpin and link.master in bridges:
            yield Property(link.name, "", Kind.BRIDGE, bridges[link.master])
    for index, name in bridges.items():
        for family in (4, 6):
            yield from (_route(name, "", *route[:2]) for route in links.routes(family, index))
        for setting, value in BRIDGE_SETTINGS.items():
            now = sysctl.read(f"net/ipv6/conf/{name}/{setting}")
            yield Property(name, "", Kind.SETTING, f"{setting}={value if now is None else now}")
    for address in links.interface_addresses():
        if address.ifindex in bridges:
            yield _address(bridges[address.ifindex], "", *address[1:])


def inside(found: dump.Inside, name: str, peer: int, namespace: str) -> Iterator[Property]:
    """Yield the properties of the other end of the veth `name`, the link number `peer` in a namespace.

    There are none if the link is not there.
    """
    if peer not in found.links:
        return
    yield from _of_link(found.links[peer], name, namespace)
    if found.links[dump.LOOPBACK_IFINDEX].is_up:
        yield Property(name, namespace, Kind.LOOPBACK)
    yield from (_address(name, namespace, *one[1:]) for one in found.addresses if one.ifindex == peer)
    for version, family in FAMILIES.items():
        for route in main_routes(found.routes[family]):
            if not route.prefix_length:
                yield Property(name, namespace, Kind.DEFAULT_ROUTE, f"IPv{version}")
            elif route.ifindex == peer:
                yield _route(name, namespace, *route[:2])


def _of_link(link: Link | dump.LinkState, name: str, namespace: str) -> Iterator[Property]:
    yield Property(name, namespace, Kind.MTU, str(link.mtu))
    if link.is_up:
        yield Property(name, namespace, Kind.UP)


def _address(name: str, namespace: str, address: str, prefix_length: int) -> Property:
    return Property(name, namespace, Kind.ADDRESS, f"{address}/{prefix_length}")


def _route(name: str, namespace: str, destination: str, prefix_length: int) -> Property:
    return Property(name, namespace, Kind.ROUTE, f"{destination}/{prefix_length}")
