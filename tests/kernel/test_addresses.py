"""Which container and port a client reaches: families, link-local clients, one port of two addresses, ranges."""

from collections.abc import Iterator

import pytest

from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.crossings import arrives, everywhere, listening, reached
from tests.kernel.street import HOST4, HOST6, PORT, Street

pytestmark = pytest.mark.any_kernel

OLD_GATEWAY = "172.29.0.1"


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street("--firewall", request.param) as made:
        yield made


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("host_ip", ["", "[::]:", f"[{HOST6}]:"])
def test_ipv6_clients_reach_an_ipv4_only_container_by_relay(street: Street, protocol: str, host_ip: str) -> None:
    with street.published(street.four, f"{host_ip}8080:80/{protocol}") as port:
        for space in (street.neighbour, street.far.space, street.near.space):
            assert street.road(space, protocol, HOST6, port) == ("relay", OLD_GATEWAY), space.name
        if HOST6 not in host_ip:
            assert street.road(street.far.space, protocol, "fd31::1", port) == ("relay", OLD_GATEWAY)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_link_local_client_is_relayed(street: Street, protocol: str) -> None:
    host_address = wait_until(lambda: _link_local(street.host, "eth0"), "the host's address")
    wait_until(lambda: _link_local(street.neighbour, "eth0"), "the neighbour's address")
    with street.published(street.server, f"8080:80/{protocol}") as port:
        found = street.road(street.neighbour, protocol, f"{host_address}%eth0", port)
        assert found == ("relay", "fd30::1")
        explained = street.gangway.json("explain", f"{host_address}:{port}/{protocol}", "--from", "remote")
        assert [route["road"] for route in explained[0]["mapping"]["routes"]] == ["relay"]


def test_link_local_client_in_a_container_is_relayed(street: Street) -> None:
    bridge = street.gangway.json("network", "inspect", "web")[0]["bridge"]
    gateway = wait_until(lambda: _link_local(street.host, bridge), "the bridge's address")
    wait_until(lambda: _link_local(street.near.space, "eth0"), "the container's address")
    with street.published(street.server, "8080:80/tcp") as port:
        for box in (street.near, street.server):
            assert street.road(box.space, "tcp", f"{gateway}%eth0", port) == ("relay", "fd30::1")


def _link_local(space: Namespace, interface: str) -> str:
    """Return an interface's link-local address, or an empty string while it is tentative."""
    for line in space.ip("-6", "-oneline", "address", "show", "dev", interface, "scope", "link").splitlines():
        if "tentative" not in line:
            return line.split()[3].partition("/")[0]
    return ""


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_one_port_of_two_host_addresses_leads_to_two_containers(street: Street, protocol: str) -> None:
    with (
        listening(street.server, protocol, [81]) as at_server,
        listening(street.far, protocol, [82]) as at_far,
        street.published(street.server, f"{HOST4}:8080:81/{protocol}", f"[{HOST6}]:8080:81/{protocol}"),
        street.published(street.far, f"172.30.0.1:8080:82/{protocol}", f"127.0.0.1:8080:82/{protocol}"),
    ):
        for space in (street.host, street.neighbour, street.near.space):
            assert arrives(space, protocol, HOST4, 8080, at_server[81])
            assert arrives(space, protocol, HOST6, 8080, at_server[81])
            assert arrives(space, protocol, "172.30.0.1", 8080, at_far[82])
        assert arrives(street.host, protocol, "127.0.0.1", 8080, at_far[82])


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("host_ip", ["", f"{HOST4}:", "0.0.0.0:"])
@pytest.mark.parametrize("first", [9000, 9100], ids=["same ports", "other ports"])
def test_each_port_of_a_range_leads_to_its_own(street: Street, protocol: str, host_ip: str, first: int) -> None:
    inner = range(9000, 9005)
    offset = first - inner[0]
    wanted = f"{host_ip}{first}-{first + 4}:{inner[0]}-{inner[-1]}/{protocol}"
    with listening(street.server, protocol, inner) as at, street.published(street.server, wanted):
        for space, address in _clients(street, host_ip):
            for port in inner:
                assert arrives(space, protocol, address, port + offset, at[port]), f"{space.name} at {address}"


def _clients(street: Street, host_ip: str) -> Iterator[tuple[Namespace, str]]:
    yield from ((space, HOST4) for space in (street.host, street.neighbour, street.far.space, street.server.space))
    if HOST4 not in host_ip:
        yield street.host, "127.0.0.1"
    if not host_ip:
        yield from ((space, HOST6) for space in (street.host, street.neighbour, street.near.space))
        yield street.host, "::1"


def test_ports_beside_a_range_stay_free(street: Street) -> None:
    with street.published(street.server, "9000-9004:9000-9004", "9000-9004:9000-9004/udp"):
        for port in (8999, 9005):
            for space in (street.neighbour, street.host):
                assert not street.reaches(space, "tcp", HOST4, port)
        with street.published(street.far, "9005:80"):
            assert street.reaches(street.neighbour, "tcp", HOST4, 9005)


def test_overlapping_range_is_refused_with_the_other_containers_name(street: Street) -> None:
    with street.published(street.server, "9000-9004:9000-9004"):
        done = street.gangway.run("publish", street.far.name, "-p", "9004-9006:9004-9006")
        assert done.returncode == 1
        assert street.server.name in done.stderr
        assert street.gangway.json("ls", street.far.name) == []


def test_container_that_reuses_addresses_is_reached_at_once(street: Street) -> None:
    """The host and its other containers remember the earlier container's MAC address."""
    first = street.container("first", "web")
    same = "--ip", first.address4, "--ip", first.address6
    neighbours = everywhere([street.host, street.near.space], [first.address4, first.address6], PORT)
    assert reached(street, neighbours) == list(map(str, neighbours))
    street.gangway("detach", first.name)
    street.gangway("attach", first.name, "--network", "web", *same)
    with street.published(first, "8080:80/tcp", "8080:80/udp") as port:
        assert reached(street, neighbours) == list(map(str, neighbours))
        published = [
            *everywhere([street.neighbour, street.near.space, street.host], [HOST4, HOST6], port),
            *everywhere([street.host], ["127.0.0.1", "::1"], port),
        ]
        assert reached(street, published) == list(map(str, published))
    street.gangway("detach", first.name)


def test_new_network_serves_both_families_at_once(street: Street) -> None:
    """The kernel forwards IPv6 to an interface only once its link-local address is usable (RFC 4862, 5.4)."""
    subnets = "--subnet", "172.20.0.0/24", "--subnet", "fd20::/64"
    street.gangway("network", "create", "fresh", *subnets)
    fresh = street.container("fresh", "fresh")
    with street.published(fresh, "8080:80/tcp") as port:
        published = everywhere([street.neighbour, street.host], [HOST6, HOST4], port, ["tcp"])
        assert reached(street, published) == list(map(str, published))
    street.gangway("detach", fresh.name)
    street.gangway("network", "rm", "fresh")
