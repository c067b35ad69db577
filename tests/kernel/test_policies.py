"""Isolation, masquerading and internal networks, by nftables and by iptables."""

from collections.abc import Iterator

import pytest

from lab import echo_server
from lab.netns import Namespace, Neighbour
from tests.kernel.crossings import Tap, everywhere, reached, routed_at
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, PORT, Box, Street

FIREWALLS = pytest.mark.parametrize("street", ["nftables", "iptables"], indirect=True)
pytestmark = [pytest.mark.any_kernel, FIREWALLS]
GATEWAY4, GATEWAY6 = "172.30.0.1", "fd30::1"


class Quarter(Street):
    """The street, with an internal network, and one without masquerading."""

    inner: Box
    within: Box
    bare: Box


@pytest.fixture(scope="module")
def street(request: pytest.FixtureRequest) -> Iterator[Quarter]:
    with Quarter("--firewall", request.param) as made:
        inner = "--subnet", "172.27.0.0/24", "--subnet", "fd27::/64"
        made.gangway("network", "create", "inner", *inner, "--internal")
        made.inner, made.within = made.container("inner", "inner"), made.container("within", "inner")
        bare = "--subnet", "172.28.0.0/24", "--subnet", "fd28::/64"
        made.gangway("network", "create", "bare", *bare, "--no-masquerade")
        made.bare = made.container("bare", "bare")
        echo_server.serve(made.neighbour.popen, PORT)
        yield made


def test_networks_are_isolated_except_for_published_ports(street: Quarter) -> None:
    server, far, four = street.server, street.far, street.four
    with street.published(server, "80:80/tcp", "80:80/udp"):
        strangers = [far.space, four.space, street.bare.space]
        assert reached(street, everywhere(strangers, [server.address4], PORT)) == []
        assert reached(street, everywhere(strangers[:1], [server.address6], PORT)) == []
        others = [far.address4, far.address6, four.address4, street.bare.address6]
        assert reached(street, everywhere([server.space], others, PORT)) == []
        published = everywhere([far.space], [HOST4, HOST6, GATEWAY4, GATEWAY6, "172.31.0.1", "fd31::1"], PORT)
        assert reached(street, published) == list(map(str, published))


def test_a_neighbour_cannot_route_to_a_containers_address(street: Quarter) -> None:
    server = street.server
    with street.published(server, "80:80/tcp", "80:80/udp"), Tap(street.host, "eth0") as tap:
        direct = everywhere([street.neighbour], [server.address4, server.address6, street.far.address4], PORT)
        assert reached(street, direct) == []
        tap.saw(server.address4, PORT)
        published = everywhere([street.neighbour], [HOST4, HOST6], PORT)
        assert reached(street, published) == list(map(str, published))


def test_without_rules_a_neighbour_can_route_to_loopback(street: Quarter) -> None:
    """Otherwise the next test would prove nothing."""
    with Namespace("host") as host, Neighbour(host) as neighbour:
        host.sysctl("net.ipv4.conf.all.route_localnet", 1)
        echo_server.serve(host.popen, 8080)
        with routed_at(host, neighbour):
            assert reached(street, everywhere([neighbour], ["127.0.0.1"], 8080)) != []


@pytest.mark.parametrize("host_ip", ["127.0.0.1:", "0.0.0.0:"])
@pytest.mark.parametrize("route_localnet", [0, 1])
def test_loopback_cannot_be_reached_from_outside(street: Quarter, host_ip: str, route_localnet: int) -> None:
    host = street.host
    host.sysctl("net.ipv4.conf.all.route_localnet", route_localnet)
    try:
        with (
            street.published(street.server, f"{host_ip}8080:80/tcp", f"{host_ip}8080:80/udp") as port,
            routed_at(host, street.neighbour),
            Tap(host, "eth0") as tap,
        ):
            assert reached(street, everywhere([street.neighbour], ["127.0.0.1"], port)) == []
            tap.saw("127.0.0.1", port)
            inside = everywhere([host], ["127.0.0.1"], port)
            assert reached(street, inside) == list(map(str, inside))
    finally:
        host.sysctl("net.ipv4.conf.all.route_localnet", 0)


def test_ipv6_loopback_cannot_be_reached_from_outside(street: Quarter) -> None:
    with (
        street.published(street.server, "[::1]:8080:80/tcp", "[::1]:8080:80/udp") as port,
        routed_at(street.host, street.neighbour),
        Tap(street.host, "eth0") as tap,
    ):
        assert reached(street, everywhere([street.neighbour], ["::1"], port)) == []
        tap.saw("::1", port)
        inside = everywhere([street.host], ["::1"], port)
        assert reached(street, inside) == list(map(str, inside))


def test_ports_published_on_loopback_are_refused_at_other_addresses(street: Quarter) -> None:
    published = "127.0.0.1:8080:80/tcp", "127.0.0.1:8080:80/udp", "[::1]:8080:80/tcp", "[::1]:8080:80/udp"
    with street.published(street.server, *published) as port:
        clients = [street.host, street.neighbour, street.far.space, street.near.space, street.server.space]
        assert reached(street, everywhere(clients, [HOST4, HOST6, GATEWAY4, GATEWAY6], port)) == []


def test_route_localnet_is_never_set(street: Quarter) -> None:
    with street.published(street.server, "127.0.0.1:8080:80"):
        settings = street.host.run("sh", "-c", "cat /proc/sys/net/ipv4/conf/*/route_localnet").stdout.split()
        assert len(settings) > 8
        assert set(settings) == {"0"}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_outgoing_connections_are_masqueraded(street: Quarter, protocol: str) -> None:
    for box in (street.server, street.far):
        assert _seen(box, protocol, NEIGHBOUR4) == HOST4
        assert _seen(box, protocol, NEIGHBOUR6) == HOST6
    assert _seen(street.four, protocol, NEIGHBOUR4) == HOST4


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_outgoing_connections_without_masquerade_keep_their_address(street: Quarter, protocol: str) -> None:
    assert _seen(street.bare, protocol, NEIGHBOUR4) == street.bare.address4
    assert _seen(street.bare, protocol, NEIGHBOUR6) == street.bare.address6


def _seen(box: Box, protocol: str, address: str) -> str:
    with box.space.entered():
        return echo_server.request_here(protocol, address, PORT).peer


def test_containers_of_a_network_reach_each_other(street: Quarter) -> None:
    for protocol in ("tcp", "udp"):
        assert _seen(street.near, protocol, street.server.address4) == street.near.address4
        assert _seen(street.near, protocol, street.server.address6) == street.near.address6


def test_an_internal_network_has_no_way_out_even_with_a_default_route(street: Quarter) -> None:
    inner = street.inner
    assert "default" not in inner.space.ip("route") + inner.space.ip("-6", "route")
    outside = [NEIGHBOUR4, NEIGHBOUR6, street.far.address4, street.far.address6]
    inner.space.ip("route", "add", "default", "via", "172.27.0.1")
    inner.space.ip("route", "add", "default", "via", "fd27::1")
    try:
        with Tap(street.host, _bridge(street, "inner")) as tap:
            assert reached(street, everywhere([inner.space], outside, PORT)) == []
            tap.saw(NEIGHBOUR4, PORT)
    finally:
        inner.space.ip("route", "del", "default")
        inner.space.ip("-6", "route", "del", "default")


def _bridge(street: Street, network: str) -> str:
    found = street.gangway.json("network", "inspect", network)[0]["bridge"]
    assert isinstance(found, str)
    return found


def test_an_internal_network_cannot_be_reached_from_outside(street: Quarter) -> None:
    clients = [street.neighbour, street.server.space, street.far.space]
    assert reached(street, everywhere(clients, [street.inner.address4, street.inner.address6], PORT)) == []


def test_containers_of_an_internal_network_reach_each_other(street: Quarter) -> None:
    inside = everywhere([street.inner.space], [street.within.address4, street.within.address6], PORT)
    assert reached(street, inside) == list(map(str, inside))


def test_an_internal_network_publishes_only_on_loopback(street: Quarter) -> None:
    with street.published(street.inner, "127.0.0.1:8080:80", "[::1]:8080:80") as port:
        assert street.road(street.host, "tcp", "127.0.0.1", port) == ("redirect", "172.27.0.1")
        assert street.road(street.host, "tcp", "::1", port) == ("redirect", "fd27::1")
    for refused in ("8080:80", "0.0.0.0:8080:80", f"{HOST4}:8080:80", "[::]:8080:80"):
        done = street.gangway.run("publish", street.inner.name, "-p", refused)
        assert done.returncode == 1
        assert "internal" in done.stderr
        assert f"as in -p {'[::1]' if refused.startswith('[') else '127.0.0.1'}:8080:80" in done.stderr
        assert done.stderr.count("\n") == 1
    assert street.gangway.json("ls", street.inner.name) == []
