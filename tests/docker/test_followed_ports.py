"""Ports of Docker's containers that `gangway publish` adds where dockerd keeps its own rules and proxies.

All tests of an engine share one dockerd and one daemon, so each uses different ports.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lab import echo_server
from lab.dockerd import Dockerd
from lab.engines import engine_root
from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Host
from lab.waiting import wait_until
from tests.docker.dockerhost import ENGINE_PARAMETERS
from tests.docker.test_adopted_ports import DOCKER0, HOST, DockerSite


@pytest.fixture(scope="module", params=ENGINE_PARAMETERS)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerSite]:
    """A dockerd as it comes, and a gangway daemon that leaves its networks and ports to it."""
    root = engine_root(request.param) if request.param else None
    with Host() as host, Dockerd(host, None, engine=root) as docker:
        settings = tmp_path_factory.mktemp("settings") / "gangway.toml"
        settings.write_text(f'[docker]\nsocket = "{docker.socket}"\n')
        with Gangway(host, "--config", str(settings)) as gangway:
            yield DockerSite(host, docker, gangway)
            docker.remove_containers()


def target(site: DockerSite, port: int) -> tuple[str, str]:
    """Return the container that a port leads to, and its address; empty texts if the port is not published."""
    published = (one for one in site.gangway.json("ls") if one["host_ports"] == str(port) and not one["note"])
    return next(((one["container"], one["container_address"]) for one in published), ("", ""))


def is_served(site: DockerSite, port: int) -> bool:
    """True if a neighbour reaches the port; it is listed a moment before."""
    try:
        return bool(site.road("neighbour", HOST, port))
    except echo_server.NoAnswer:
        return False


@pytest.fixture(scope="module")
def web(stock: DockerSite) -> Iterator[str]:
    """A container with a port that dockerd publishes; gangway adds another one."""
    name = stock.container("-p", "7000:8000", serving=(8000,))
    stock.gangway("publish", f"docker:{name}", "-p", "8000:8000", "-p", "8000:8000/udp")
    yield name
    stock.remove(name)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("origin", "address", "road"),
    [
        ("host", "127.0.0.1", "redirect"),
        ("host", "::1", "redirect"),
        ("host", HOST, "relay"),
        ("neighbour", HOST, "relay"),
        ("neighbour", "fd30::1", "relay"),
    ],
)
@pytest.mark.usefixtures("web")
def test_road_of_each_origin(stock: DockerSite, origin: str, address: str, road: str, protocol: str) -> None:
    assert stock.road(origin, address, 8000, protocol) == (road, DOCKER0)


def test_containers_reach_the_port_and_dockerds_own_port_is_left_alone(stock: DockerSite, web: str) -> None:
    stock.docker.run("network", "create", "far")
    other, far = stock.container(), stock.container("--network", "far")
    for client in (other, web, far):
        for protocol in ("tcp", "udp"):
            command = partial(stock.docker.command_in, client)
            assert echo_server.request(command, protocol, HOST, 8000).peer == DOCKER0
    assert stock.request(7000, HOST) == HOST  # by dockerd's rule
    assert "7000" not in stock.gangway("ls")
    with pytest.raises(CommandFailed, match="7000"):
        stock.gangway("publish", f"docker:{web}", "-p", "7000:8000")
    stock.remove(other, far)
    stock.docker.run("network", "rm", "far")


def test_port_follows_its_container_and_ends_with_it(stock: DockerSite) -> None:
    """Also on a network of its own, while gangway's daemon does not run, and by the name that it gets."""
    stock.docker.run("network", "create", "back")
    name = stock.container("--network", "back", serving=(8100,))
    stock.gangway("publish", f"docker:{name}", "-p", "8100:8100")
    former = target(stock, 8100)
    stock.docker.run("stop", "-t", "0", name)
    wait_until(lambda: target(stock, 8100) == ("", ""), "the port to be unpublished")
    other = stock.container("--network", "back")  # takes the address
    stock.docker.run("start", name)
    stock.serve(name, 8100)
    wait_until(lambda: target(stock, 8100) not in (former, ("", "")), "the port to be published again")
    wait_until(lambda: is_served(stock, 8100), "the port to be served again")
    assert stock.road("neighbour", HOST, 8100).road == "relay"
    stock.gangway.kill()
    stock.remove(other)
    stock.docker.run("restart", "-t", "0", name)
    stock.docker.run("rename", name, "shop")
    stock.serve("shop", 8100)
    stock.gangway.start()
    wait_until(lambda: target(stock, 8100) == ("docker:shop", former[1]), "the port to follow again")
    wait_until(lambda: is_served(stock, 8100), "the port to be served by the next daemon")
    for origin, road in (("host", "redirect"), ("neighbour", "relay")):
        assert stock.road(origin, "127.0.0.1" if origin == "host" else HOST, 8100).road == road
    stock.remove("shop")
    wait_until(lambda: target(stock, 8100) == ("", ""), "the port to end")
    assert stock.is_free(8100)
    stock.docker.run("network", "rm", "back")


def test_port_admits_the_clients_of_its_subnets_and_leaves_nothing(stock: DockerSite) -> None:
    name = stock.container(serving=(8200,))
    stock.gangway("publish", f"docker:{name}", "-p", "8200:8200", "--from", "172.30.0.2/32")
    assert stock.road("host", "127.0.0.1", 8200).road == "redirect"
    assert stock.road("neighbour", HOST, 8200).road == "relay"
    with pytest.raises(echo_server.NoAnswer):
        echo_server.request(partial(stock.docker.command_in, name), "tcp", HOST, 8200)
    stock.docker.run("stop", "-t", "0", name)
    wait_until(lambda: "(container is stopped)" in stock.gangway("ls"), "the port to wait for its container")
    stock.gangway("unpublish", f"docker:{name}")
    assert name not in stock.gangway("ls") + stock.gangway("network", "ls")
    assert stock.is_free(8200)
    stock.remove(name)


def test_declared_ports_follow_every_container_of_that_name(stock: DockerSite, tmp_path: Path) -> None:
    declared = tmp_path / "shop.toml"
    declared.write_text('[[publish]]\ncontainer = "docker:declared"\nports = ["8400:8400"]\n')
    assert "container docker:declared does not exist yet" in stock.gangway.run("apply", str(declared)).stderr
    for _ in range(2):
        stock.docker.run("run", "-d", "--name", "declared", stock.docker.image, "sleep", "1h")
        stock.serve("declared", 8400)
        wait_until(lambda: is_served(stock, 8400), "the port to be served")
        with pytest.raises(CommandFailed, match=r"is declared in .*/shop\.toml"):
            stock.gangway("unpublish", "docker:declared")
        stock.remove("declared")
        wait_until(lambda: "(container does not run)" in stock.gangway("ls"), "the port to wait")
    declared.write_text("")
    stock.gangway("apply", str(declared))
    assert "8400" not in stock.gangway("ls")


def test_containers_without_a_bridge_are_refused(stock: DockerSite) -> None:
    stock.docker.run("run", "-d", "--name", "hosted", "--network", "host", stock.docker.image, "sleep", "1h")
    stock.docker.run("create", "--name", "asleep", stock.docker.image, "sleep", "1h")
    for name, reason in {
        "hosted": "its ports are the host's own",
        "asleep": "container asleep does not run: docker start asleep",
        "nobody": "Docker has no container named 'nobody'",
    }.items():
        with pytest.raises(CommandFailed, match=reason):
            stock.gangway("publish", f"docker:{name}", "-p", "8300:80")
    stock.remove("hosted", "asleep")
