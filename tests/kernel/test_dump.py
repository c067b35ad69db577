"""The lists of links, addresses and routes, compared with ip(8)'s of the same namespace."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gangway.host.dump import FAMILIES, Link, addresses, links, routes
from lab.netns import Host

MAIN = 254


@pytest.fixture(scope="module", autouse=True)
def host() -> Iterator[Host]:
    """A host with a bridge and two containers; one bridge port is isolated and has an alias.  The tests are in it."""
    with Host() as host:
        host.container()
        host.container()
        host.ip("link", "set", "veth2", "alias", 'ours, and a "quote"')
        host.ip("link", "set", "veth2", "type", "bridge_slave", "isolated", "on")
        host.ip("route", "add", "10.1.0.0/16", "via", "172.30.0.9")
        host.ip("route", "add", "default", "via", "172.30.0.9", "proto", "ra")
        host.ip("-6", "route", "add", "default", "via", "fd30::9", "proto", "ra")
        with host.entered():
            yield host


def ip_json(host: Host, *words: str) -> Any:
    return json.loads(host.ip("-json", "-details", *words))


def test_links(host: Host) -> None:
    expected = ip_json(host, "link")
    numbers = {link["ifname"]: link["ifindex"] for link in expected}
    assert links() == [
        Link(
            link["ifindex"],
            link["ifname"],
            link.get("linkinfo", {}).get("info_kind", ""),
            link.get("ifalias", ""),
            numbers.get(link.get("master"), 0),
            link.get("linkinfo", {}).get("info_slave_data", {}).get("isolated", False),
            link.get("address", ""),
            link["mtu"],
        )
        for link in expected
    ]


@pytest.mark.parametrize(("kind", "names"), [("bridge", ["br0"]), ("veth", ["veth1", "veth2"]), ("unheard-of", [])])
def test_links_of_a_kind(kind: str, names: list[str]) -> None:
    assert [link.name for link in links(kind)] == names


def test_isolated_port() -> None:
    assert [link.name for link in links() if link.isolated] == ["veth2"]


def test_addresses(host: Host) -> None:
    assert addresses() == {one["local"] for link in ip_json(host, "address") for one in link["addr_info"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_routes(host: Host, family: int) -> None:
    numbers = {link.name: link.ifindex for link in links()}
    expected = ip_json(host, "-6" if family == socket.AF_INET6 else "-4", "route", "show", "table", "main")
    assert sorted(
        (_as_ip_prints_it(route.destination, route.prefix_length, family), route.ifindex)
        for route in routes(family)
        if route.table == MAIN
    ) == [(to, numbers[dev]) for to, dev in sorted((one["dst"], one["dev"]) for one in expected)]


@pytest.mark.parametrize("family", FAMILIES)
def test_route_protocol(family: int) -> None:
    assert [(route.destination, route.prefix_length) for route in routes(family) if route.protocol == 9] == [("", 0)]


def _as_ip_prints_it(destination: str, prefix_length: int, family: int) -> str:
    if not destination:
        return "default"
    whole = 128 if family == socket.AF_INET6 else 32
    return destination if prefix_length == whole else f"{destination}/{prefix_length}"
