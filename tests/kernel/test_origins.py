"""The road of every kind of client to every kind of address with every firewall, and the source the container sees."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from gangway.host.sockets import has_sockets
from lab.addresses import host_port
from lab.netns import Namespace
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street, without_redirect

PROTOCOLS = ("tcp", "udp", pytest.param("sctp", marks=pytest.mark.skipif(not has_sockets("sctp"), reason="no SCTP")))
GATEWAY = {4: "172.30.0.1", 6: "fd30::1"}
OLD_GATEWAY = "172.29.0.1"
OTHER_HOST_IPS = ("0.0.0.0", "[::]", HOST4, f"[{HOST6}]", "127.0.0.1", "[::1]")
HOST_IPS = ["", *(pytest.param(host_ip, marks=pytest.mark.any_kernel) for host_ip in OTHER_HOST_IPS)]


class Client(NamedTuple):
    """A client's namespace, the address it connects to, its road, and the source address that the container sees."""

    space: Namespace
    address: str
    road: str
    source: str


class Scene(NamedTuple):
    """A street, and whether its daemon writes rules and redirects sockets."""

    street: Street
    has_rules: bool
    is_redirected: bool

    def clients(self, family: int, protocol: str) -> Iterator[Client]:
        """Yield all clients of a family."""
        street, gateway = self.street, GATEWAY[family]
        loopback_road = "redirect" if self.is_redirected and protocol != "sctp" else "relay"
        if family == 4:
            loopback, host, neighbour, far = "127.0.0.1", HOST4, NEIGHBOUR4, street.far.address4
            if protocol != "sctp":  # SCTP answers from 127.0.0.1, also clients of other loopback addresses
                yield Client(street.host, "127.0.0.7", loopback_road, gateway)
        else:
            loopback, host, neighbour, far = "::1", HOST6, NEIGHBOUR6, street.far.address6
        yield Client(street.host, loopback, loopback_road, gateway)
        for space, address, source in (
            (street.host, host, host),
            (street.host, gateway, gateway),
            (street.neighbour, host, neighbour),
            (street.far.space, host, far),
            (street.near.space, host, gateway),
            (street.server.space, host, gateway),
            (street.server.space, gateway, gateway),
        ):
            if self.has_rules:
                yield Client(space, address, "nat", source)
            else:
                yield Client(space, address, loopback_road if space is street.host else "relay", gateway)


@pytest.fixture(scope="module", params=["redirect", pytest.param("no-redirect", marks=pytest.mark.any_kernel)])
def is_redirected(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "redirect")


@pytest.fixture(scope="module", params=["nftables", "iptables", pytest.param("none", marks=pytest.mark.any_kernel)])
def scene(
    request: pytest.FixtureRequest, is_redirected: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    off = () if is_redirected else without_redirect(tmp_path_factory.mktemp("config"))
    with Street("--firewall", request.param, *off) as street:
        yield Scene(street, request.param != "none", is_redirected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("host_ip", HOST_IPS)
def test_every_origin_takes_the_road_of_the_matrix(scene: Scene, protocol: str, host_ip: str) -> None:
    street = scene.street
    with street.published(street.server, f"{host_ip}:0:80/{protocol}" if host_ip else f"80/{protocol}") as port:
        for family in (4, 6):
            for client in scene.clients(family, protocol):
                if not _is_published(host_ip, client.address):
                    assert not street.reaches(client.space, protocol, client.address, port), client
                    continue
                expected = client.road, client.source
                assert street.road(client.space, protocol, client.address, port) == expected, client


@pytest.mark.any_kernel
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_explain_names_the_road_that_is_taken(scene: Scene, protocol: str) -> None:
    street = scene.street
    with street.published(street.server, f"80/{protocol}") as port:
        for origin, neighbour, space, address in (
            ("loopback", False, street.host, "127.0.0.1"),
            ("loopback", False, street.host, "::1"),
            ("host", False, street.host, HOST4),
            ("host", False, street.host, GATEWAY[6]),
            ("remote", False, street.neighbour, HOST4),
            ("remote", False, street.neighbour, HOST6),
            ("container", False, street.far.space, HOST4),
            ("container", True, street.near.space, HOST6),
        ):
            at = host_port(address, f"{port}/{protocol}")
            (explained,) = street.gangway.json("explain", at, "--from", origin)
            (road,) = (route["road"] for route in explained["mapping"]["routes"] if route["neighbour"] == neighbour)
            assert street.road(space, protocol, address, port)[0] == road


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ipv6_loopback_is_redirected_to_an_ipv4_only_container(scene: Scene, protocol: str) -> None:
    street = scene.street
    loopback_road = "redirect" if scene.is_redirected and protocol != "sctp" else "relay"
    with street.published(street.four, f"80/{protocol}") as port:
        assert street.road(street.host, protocol, "::1", port) == (loopback_road, OLD_GATEWAY)
        (explained,) = street.gangway.json("explain", f"[::1]:{port}/{protocol}", "--from", "loopback")
        assert explained["mapping"]["routes"][0]["road"] == loopback_road
        for address in (HOST6, GATEWAY[6]):
            expected = "relay" if scene.has_rules else loopback_road
            assert street.road(street.host, protocol, address, port) == (expected, OLD_GATEWAY)
        for space in (street.neighbour, street.far.space, street.near.space):
            assert street.road(space, protocol, HOST6, port) == ("relay", OLD_GATEWAY)


def _is_published(host_ip: str, address: str) -> bool:
    if host_ip in ("", "0.0.0.0", "[::]"):
        return host_ip != ("[::]" if "." in address else "0.0.0.0")
    return host_ip.strip("[]") == address
