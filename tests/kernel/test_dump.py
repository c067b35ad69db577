"""The lists of links, addresses and routes, compared with ip(8)'s of the same namespace."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from gangway.host.dump import (
    FAMILIES,
    Link,
    Rule,
    addresses,
    interface_addresses,
    links,
    not_forwarding,
    routes,
    source_rules,
    way_to,
)
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
        host.ip("rule", "add", "from", "172.30.0.0/25", "lookup", "1001")
        host.ip("-6", "rule", "add", "from", "fd30::1", "to", "fd00::/8", "lookup", "101")
        host.ip("rule", "add", "to", "10.3.0.0/16", "lookup", "102")
        host.ip("route", "add", "10.2.0.0/16", "via", "172.30.0.8", "table", "1001")
        host.ip("route", "add", "unreachable", "10.4.0.0/16", "table", "1001")
        host.sysctl("net.ipv4.ip_forward", 1)
        host.sysctl("net.ipv4.conf.br0.forwarding", 0)
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
            "UP" in link["flags"],
            link["mtu"],
            link.get("linkinfo", {}).get("info_slave_data", {}).get("hairpin", False),
            link.get("link_index", 0),
            link.get("link_netnsid"),
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


def test_interface_addresses() -> None:
    numbers = {link.name: link.ifindex for link in links()}
    assert {(numbers["br0"], "172.30.0.1"), (numbers["lo"], "127.0.0.1")} <= interface_addresses()


def test_source_rules() -> None:
    assert source_rules(socket.AF_INET) == [Rule("172.30.0.0/25", 1001)]
    assert source_rules(socket.AF_INET6) == [Rule("fd30::1/128", 101)]


def test_interfaces_that_do_not_forward() -> None:
    numbers = {link.name: link.ifindex for link in links()}
    assert not_forwarding(socket.AF_INET) == {numbers["br0"]}


def test_ways() -> None:
    bridge = next(link.ifindex for link in links() if link.name == "br0")
    local, near, far = way_to("172.30.0.1"), way_to("172.30.0.9"), way_to("10.1.0.1")
    assert local is not None
    assert (local.is_local, local.source) == (True, "172.30.0.1")
    assert near == (False, bridge, "", "172.30.0.1")
    assert far == (False, bridge, "172.30.0.9", "172.30.0.1")
    assert way_to("10.2.0.1", "172.30.0.1") == (False, bridge, "172.30.0.8", "")
    assert way_to("10.4.0.1", "172.30.0.1") is None
    assert way_to("fd30::1") == (True, 1, "", "fd30::1")


def _as_ip_prints_it(destination: str, prefix_length: int, family: int) -> str:
    if not destination:
        return "default"
    whole = 128 if family == socket.AF_INET6 else 32
    return destination if prefix_length == whole else f"{destination}/{prefix_length}"
