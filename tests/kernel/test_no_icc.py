"""Isolated containers, whether br_netfilter passes the frames within a bridge to the firewall or not."""

from collections.abc import Iterator

import pytest

from lab import echo_server
from tests.kernel.crossings import everywhere, reached
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, PORT, Box, Street

pytestmark = pytest.mark.any_kernel

GATEWAY4, GATEWAY6 = "172.26.0.1", "fd26::1"


class Isolated(Street):
    """The street, with a network whose containers are isolated from each other."""

    one: Box
    other: Box


# Whether br_netfilter passes bridged frames of IPv4, and of IPv6, to the firewall. iptables has tables of its own for
# each family: the mixed cases test either of both.
@pytest.fixture(
    scope="module",
    params=[
        *(("nftables", seen) for seen in ((1, 1), (0, 0), (1, 0), (0, 1))),
        *(("iptables", seen) for seen in ((1, 0), (0, 1))),
    ],
    ids=lambda param: f"{param[0]}-seen{param[1][0]}{param[1][1]}",
)
def street(request: pytest.FixtureRequest) -> Iterator[Isolated]:
    firewall, seen = request.param
    settings = "net.bridge.bridge-nf-call-iptables={} net.bridge.bridge-nf-call-ip6tables={}".format(*seen)
    with Isolated("--firewall", firewall, prepare=f"sysctl -qw {settings}") as made:
        apart = "--subnet", "172.26.0.0/24", "--subnet", "fd26::/64", "--no-icc"
        made.gangway("network", "create", "apart", *apart)
        made.one, made.other = made.container("one", "apart"), made.container("other", "apart")
        echo_server.serve(made.neighbour.popen, PORT)
        yield made


def test_containers_do_not_reach_each_other(street: Isolated) -> None:
    one, other = street.one, street.other
    with street.published(other, "80:80/tcp", "80:80/udp"):
        assert reached(street, everywhere([one.space], [other.address4, other.address6], PORT)) == []


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_published_ports_of_another_container_are_reached(street: Isolated, protocol: str) -> None:
    with street.published(street.other, f"80/{protocol}") as port:
        for space in (street.one.space, street.other.space):
            assert street.road(space, protocol, HOST4, port)[1] == GATEWAY4
            assert street.road(space, protocol, HOST6, port)[1] == GATEWAY6
            assert street.road(space, protocol, GATEWAY4, port)[1] == GATEWAY4


def test_roads_are_those_that_ls_prints(street: Isolated) -> None:
    with street.published(street.other, "80") as port:
        for mapping in street.gangway.json("ls", street.other.name):
            address = HOST6 if ":" in mapping["host_address"] else HOST4
            printed = [route["road"] for route in mapping["routes"] if route["neighbour"]]
            assert [street.road(street.one.space, "tcp", address, port)[0]] == printed


def test_other_clients_are_not_affected(street: Isolated) -> None:
    with street.published(street.other, "80") as port:
        assert street.road(street.neighbour, "tcp", HOST4, port) == ("nat", NEIGHBOUR4)
        assert street.road(street.neighbour, "tcp", HOST6, port) == ("nat", NEIGHBOUR6)
        assert street.road(street.far.space, "tcp", HOST4, port) == ("nat", street.far.address4)
        assert street.road(street.host, "tcp", "127.0.0.1", port) == ("redirect", GATEWAY4)


def test_containers_reach_the_outside(street: Isolated) -> None:
    outside = everywhere([street.one.space], [NEIGHBOUR4, NEIGHBOUR6], PORT)
    assert reached(street, outside) == list(map(str, outside))
