"""What answers of a container's namespace mean: whether its clients are answered by the gateway, what its link has."""

import socket
from ipaddress import ip_address

import pytest

from gangway.host.dump import Inside, InterfaceAddress, LinkState, Route, Way
from gangway.reconcile.containers import Container, answers_elsewhere
from gangway.reconcile.observe_links import inside
from gangway.reconcile.properties import Kind, Property

OWN4, OWN6, GATEWAY4, GATEWAY6 = map(ip_address, ("172.30.0.2", "fd30::2", "172.30.0.1", "fd30::1"))
BOX = Container("gw1", "/run/netns/box", (OWN4, OWN6), (GATEWAY4, GATEWAY6))
ETH, VPN, LO = 2, 3, 1
LOCAL, DIRECT = Way(True, LO, "", ""), Way(False, ETH, "", "")
BY_GATEWAY4, BY_GATEWAY6 = Way(False, ETH, str(GATEWAY4), ""), Way(False, ETH, str(GATEWAY6), "")
DEFAULT, MAIN, LATER = Route("", 0, VPN, 254, 3), 254, 100
NO_ROUTES: dict[int, tuple[Route, ...]] = {socket.AF_INET: (), socket.AF_INET6: ()}


def lost(ways4: tuple[Way | None, ...], *routes4: Route) -> frozenset[object]:
    """Return the addresses whose answers leave elsewhere; IPv6's do not."""
    ways = *ways4, LOCAL, DIRECT, BY_GATEWAY6
    return frozenset(answers_elsewhere(BOX, Inside({}, (), NO_ROUTES | {socket.AF_INET: routes4}, ways)))


@pytest.mark.parametrize(
    ("way", "is_lost"),
    [
        (BY_GATEWAY4, False),
        (Way(False, ETH, "fe80::1", ""), False),  # by a router advertisement
        (Way(False, ETH, "172.30.0.9", ""), True),  # a neighbour
        (Way(False, VPN, "", ""), True),
        (Way(False, VPN, str(GATEWAY4), ""), True),
        (None, False),  # no default route: it is about to be restored
    ],
)
def test_answers_pass_the_gateway_or_leave_elsewhere(way: Way | None, is_lost: bool) -> None:
    assert lost((LOCAL, DIRECT, way)) == ({OWN4} if is_lost else set())


def test_a_default_route_that_refuses_packets_leaves_elsewhere() -> None:
    assert lost((LOCAL, DIRECT, None), DEFAULT) == {OWN4}
    assert lost((LOCAL, DIRECT, None), DEFAULT._replace(destination="10.0.0.0", prefix_length=8)) == set()


@pytest.mark.parametrize("ways", [(None, DIRECT), (DIRECT, DIRECT), (LOCAL, None)])
def test_a_container_without_its_link_is_not_judged(ways: tuple[Way | None, ...]) -> None:
    assert lost((*ways, Way(False, VPN, "", ""))) == set()


def test_a_container_without_gateways_or_namespace_is_not_judged() -> None:
    assert answers_elsewhere(BOX._replace(gateways=()), Inside()) == set()
    assert answers_elsewhere(BOX, None) == set()


def test_families_are_judged_each_by_its_own_ways() -> None:
    ways = LOCAL, DIRECT, BY_GATEWAY4, LOCAL, DIRECT, Way(False, VPN, "", "")
    assert answers_elsewhere(BOX, Inside({}, (), NO_ROUTES, ways)) == {OWN6}


def test_properties_are_those_of_the_link_and_of_loopback() -> None:
    found = Inside(
        {LO: LinkState(is_up=True, mtu=65536), ETH: LinkState(is_up=True, mtu=1400)},
        (InterfaceAddress(LO, "127.0.0.1", 8), InterfaceAddress(ETH, "172.30.0.2", 24)),
        {
            socket.AF_INET: (DEFAULT, Route("172.30.0.0", 24, ETH, MAIN, 2), Route("10.0.0.0", 8, VPN, MAIN, 3)),
            socket.AF_INET6: (DEFAULT._replace(table=LATER),),
        },
    )
    wanted = {(Kind.MTU, "1400"), (Kind.UP, ""), (Kind.LOOPBACK, ""), (Kind.ADDRESS, "172.30.0.2/24")}
    wanted |= {(Kind.ROUTE, "172.30.0.0/24"), (Kind.DEFAULT_ROUTE, "IPv4")}
    assert set(inside(found, "gw1", ETH, BOX.namespace)) == {Property("gw1", BOX.namespace, *one) for one in wanted}
    assert not set(inside(found, "gw1", VPN, BOX.namespace)), "the other end is not there"
