"""Reads the properties of links that gangway has configured (`properties.py`): on the host, and in a container."""

from collections.abc import Collection, Iterator

from gangway.errors import GangwayError
from gangway.host import dump, netns, sysctl
from gangway.host.links import Link, Links
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


def inside(links: Links, name: str, peer: int, namespace: str, inode: int) -> frozenset[Property] | None:
    """Return the properties of the other end of the veth `name`, the link number `peer` in a namespace.

    There are none if the link is not there.  None: the path leads to no namespace, or to another one than `inode`'s, as
    after `ip netns delete` while a process lives there.
    """
    if netns.current_inode(namespace) != inode:
        return None
    try:
        with netns.entered(namespace):
            return frozenset(_inside(links, name, peer, namespace))
    except GangwayError:
        return None


def _inside(links: Links, name: str, peer: int, namespace: str) -> Iterator[Property]:
    found = {link.ifindex: link for link in links.all().values()}
    if peer not in found:
        return
    yield from _of_link(found[peer], name, namespace)
    if found[dump.LOOPBACK_IFINDEX].is_up:
        yield Property(name, namespace, Kind.LOOPBACK)
    yield from (_address(name, namespace, *one[1:]) for one in links.interface_addresses() if one.ifindex == peer)
    for family in (4, 6):
        for route in links.routes(family):
            if not route.prefix_length:
                yield Property(name, namespace, Kind.DEFAULT_ROUTE, f"IPv{family}")
            elif route.ifindex == peer:
                yield _route(name, namespace, *route[:2])


def _of_link(link: Link, name: str, namespace: str) -> Iterator[Property]:
    yield Property(name, namespace, Kind.MTU, str(link.mtu))
    if link.is_up:
        yield Property(name, namespace, Kind.UP)


def _address(name: str, namespace: str, address: str, prefix_length: int) -> Property:
    return Property(name, namespace, Kind.ADDRESS, f"{address}/{prefix_length}")


def _route(name: str, namespace: str, destination: str, prefix_length: int) -> Property:
    return Property(name, namespace, Kind.ROUTE, f"{destination}/{prefix_length}")
