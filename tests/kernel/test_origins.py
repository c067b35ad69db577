"""Every kind of client, at every kind of address, by every firewall: the road it gets, and what the container sees."""

from collections.abc import Iterator

import pytest

from gangway.kernel.ports import has_sockets
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street

PROTOCOLS = ("tcp", "udp", pytest.param("sctp", marks=pytest.mark.skipif(not has_sockets("sctp"), reason="no SCTP")))
GATEWAY4, GATEWAY6 = "172.30.0.1", "fd30::1"
WITHOUT_FIREWALL = ("--firewall", "none")


@pytest.fixture(
    scope="module",
    params=[("--firewall", "nftables"), ("--firewall", "iptables"), WITHOUT_FIREWALL],
    ids=["nftables", "iptables", "none"],
)
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street(*request.param) as made:
        made.has_rules = request.param != WITHOUT_FIREWALL
        yield made


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("host_ip", ["", "0.0.0.0:", "[::]:", f"{HOST4}:", f"[{HOST6}]:", "127.0.0.1:", "[::1]:"])
def test_every_origin_gets_the_road_of_the_matrix(street: Street, protocol: str, host_ip: str) -> None:
    with street.published(
        street.server, f"{host_ip}:80/{protocol}".replace("::80", ":0:80") if host_ip else f"80/{protocol}"
    ) as port:
        for family in (4, 6):
            for space, address, road, source in _clients(street, family):
                if not _is_published(host_ip, address):
                    assert not street.reaches(space, protocol, address, port), f"{address} is reached"
                    continue
                if not street.has_rules:
                    road, source = "relay", GATEWAY4 if family == 4 else GATEWAY6
                found = street.road(space, protocol, address, port)
                assert found == (road, source), f"{space.name} asks {address}"


def _clients(street: Street, family: int):
    """Who asks, where; the road and the source that the container sees where there are rules."""
    near, far, server = street.near, street.far, street.server
    if family == 4:
        loopback, host, gateway, neighbour = "127.0.0.1", HOST4, GATEWAY4, NEIGHBOUR4
        far_address = far.address4
    else:
        loopback, host, gateway, neighbour = "::1", HOST6, GATEWAY6, NEIGHBOUR6
        far_address = far.address6
    yield street.host, loopback, "relay", gateway
    if family == 4:
        yield street.host, "127.0.0.7", "relay", gateway
    yield street.host, host, "nat", host
    yield street.host, gateway, "nat", gateway
    yield street.neighbour, host, "nat", neighbour
    yield far.space, host, "nat", far_address
    yield near.space, host, "nat", gateway
    yield server.space, host, "nat", gateway
    yield server.space, gateway, "nat", gateway


def _is_published(host_ip: str, address: str) -> bool:
    match host_ip.rstrip(":"):
        case "":
            return True
        case "0.0.0.0":
            return ":" not in address
        case "[::]" | "[":
            return ":" in address
        case only:
            return only.strip("[]") == address
