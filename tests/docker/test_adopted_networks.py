"""Docker's networks, which gangway's daemon serves: their policies, and what happens when they change."""

import random
from collections.abc import Iterator
from functools import partial

import pytest

from lab import echo_server
from lab.waiting import wait_until
from tests.docker.test_adopted_ports import HOST, NEIGHBOUR, DockerSite, docker_site

MANY = 24


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerSite]:
    """This machine's dockerd without rules and proxies, and a gangway daemon that carries its ports."""
    with docker_site("", tmp_path_factory.mktemp("settings"), None, "--userland-proxy=false") as found:
        yield found


def address_on(site: DockerSite, network: str, name: str) -> str:
    """Return a container's address on a network."""
    template = f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}'
    return site.docker.run("inspect", "-f", template, name).stdout.strip()


def is_adopted(site: DockerSite, network: str) -> bool:
    return f"docker:{network}" in {one["name"] for one in site.gangway.json("network", "ls")}


def test_containers_of_an_internal_network_reach_nobody_else(bare: DockerSite) -> None:
    bare.docker.run("network", "create", "--internal", "cellar")
    wait_until(partial(is_adopted, bare, "cellar"), "the network to be adopted")
    inner, other = bare.container("--network", "cellar", serving=(80,)), bare.container("--network", "cellar")
    echo_server.serve(bare.neighbour.popen, 8300)
    client, address = partial(bare.docker.command_in, other), address_on(bare, "cellar", inner)
    assert bare.is_reached(client, address, 80)
    assert not bare.is_reached(client, NEIGHBOUR, 8300)
    bare.remove(inner, other)
    bare.docker.run("network", "rm", "cellar")
    wait_until(lambda: not is_adopted(bare, "cellar"), "the network to be gone")


def test_without_icc_containers_reach_each_other_by_published_ports_only(bare: DockerSite) -> None:
    bare.docker.run("network", "create", "-o", "com.docker.network.bridge.enable_icc=false", "apart")
    one = bare.container("--network", "apart", "-p", "8600:80", serving=(80, 81))
    other = bare.container("--network", "apart")
    bare.wait_for(f"docker:{one} 0.0.0.0 8600:80/tcp")
    client, address = partial(bare.docker.command_in, other), address_on(bare, "apart", one)
    wait_until(lambda: not bare.is_reached(client, address, 81), "the containers to be isolated")
    assert not bare.is_reached(client, address, 80)
    assert bare.is_reached(client, HOST, 8600)
    bare.remove(one, other)
    bare.docker.run("network", "rm", "apart")


def test_network_without_masquerade_keeps_the_containers_address(bare: DockerSite) -> None:
    bare.docker.run("network", "create", "-o", "com.docker.network.bridge.enable_ip_masquerade=false", "plain")
    name = bare.container("--network", "plain")
    address = address_on(bare, "plain", name)
    wait_until(partial(is_adopted, bare, "plain"), "the network to be adopted")
    bare.neighbour.ip("route", "add", f"{address}/32", "via", HOST)
    echo_server.serve(bare.neighbour.popen, 8301)
    assert echo_server.request(partial(bare.docker.command_in, name), "tcp", NEIGHBOUR, 8301).peer == address
    bare.remove(name)
    bare.docker.run("network", "rm", "plain")


def test_ipv6_network(bare: DockerSite) -> None:
    bare.docker.run("network", "create", "--ipv6", "--subnet", "fd77::/64", "dual")
    name = bare.container("--network", "dual", "-p", "8602:80", "-p", "8602:80/udp", serving=(80,))
    bare.wait_for(f"docker:{name} :: 8602:80/udp")
    for protocol in ("tcp", "udp"):
        wait_until(
            partial(_has_road, bare, "neighbour", "fd30::1", 8602, protocol, "nat", bare.neighbour.address6), "nat"
        )
        assert bare.road("host", "::1", 8602, protocol).road == "redirect"
    bare.remove(name)
    bare.docker.run("network", "rm", "dual")


def test_ports_follow_the_containers_default_route(bare: DockerSite) -> None:
    """Of several networks, Docker makes the first by name the container's default route, and so does gangway."""
    bare.docker.run("network", "create", "back")
    name = bare.container("-p", "8603:80", serving=(80,))
    bare.wait_for(f"docker:{name} 0.0.0.0 8603:80/tcp")
    for verb, network, target in (
        ("connect", "back", "back"),
        ("disconnect", "back", "bridge"),
        ("connect", "back", "back"),
        ("disconnect", "bridge", "back"),
    ):
        bare.docker.run("network", verb, network, name)
        address = address_on(bare, target, name)
        wait_until(
            lambda to=address: {one["container_address"] for one in bare.gangway.json("ls")} == {to},  # type: ignore[misc]
            f"the port to lead to {address}",
        )
        assert bare.road("neighbour", HOST, 8603) == ("nat", NEIGHBOUR)
    bare.remove(name)
    bare.docker.run("network", "rm", "back")


def test_bridge_that_is_deleted_comes_back_with_dockerd(bare: DockerSite) -> None:
    bare.host.ip("link", "delete", "docker0")
    bare.docker.kill()
    bare.docker.start()
    name = bare.container("-p", "8604:80", serving=(80,))
    wait_until(partial(_has_road, bare, "neighbour", HOST, 8604, "tcp", "nat", NEIGHBOUR), "nat")
    assert bare.road("host", "127.0.0.1", 8604).road == "redirect"
    bare.remove(name)


def test_containers_that_come_and_go_at_random(bare: DockerSite) -> None:
    """What gangway publishes is what Docker lists, and a connection to a container that stays goes on all the while."""
    chance = random.Random(14)
    stays = bare.container("-p", "9999:80", serving=(80,))
    bare.wait_for(f"docker:{stays} 0.0.0.0 9999:80/tcp")
    living: dict[str, int] = {}
    for number in range(MANY):
        if living and chance.random() < 0.4:
            name = chance.choice([*living])
            bare.remove(name)
            del living[name]
        else:
            living[bare.container("-p", f"{9000 + number}:80")] = 9000 + number
        assert bare.road("neighbour", HOST, 9999) == ("nat", NEIGHBOUR)
    wanted = {f"docker:{name} {at} {port}:80/tcp" for name, port in living.items() for at in ("0.0.0.0", "::")}
    wanted |= {f"docker:{stays} {at} 9999:80/tcp" for at in ("0.0.0.0", "::")}
    wait_until(lambda: bare.published() == wanted, "the ports that Docker lists, and no others")
    elements = bare.host.run("nft", "-j", "list", "map", "inet", "gangway", "ports4").stdout
    assert elements.count('"concat": ["tcp", ') == len(living) + 1
    bare.remove(stays, *living)
    wait_until(lambda: not bare.published(), "nothing to be published")
    assert "concat" not in bare.host.run("nft", "-j", "list", "map", "inet", "gangway", "ports4").stdout


def _has_road(site: DockerSite, origin: str, address: str, port: int, protocol: str, road: str, seen: str) -> bool:
    try:
        return site.road(origin, address, port, protocol) == (road, seen)
    except echo_server.NoAnswer:
        return False
