"""Docker's networks with other gateway modes than `nat`, which dockerd has since release 27."""

import os
from collections.abc import Iterator
from functools import partial

import pytest

from lab import echo_server
from lab.waiting import wait_until
from tests.docker.dockerhost import ENGINES
from tests.docker.test_adopted_networks import address_on, is_adopted
from tests.docker.test_adopted_ports import HOST, NEIGHBOUR, DockerSite, docker_site

pytestmark = pytest.mark.skipif("DOCKER_ENGINE" not in os.environ, reason="make test-engines: dockerd 27 or later")
MODE = "com.docker.network.bridge.gateway_mode_ipv"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerSite]:
    """A dockerd without rules and proxies, and a gangway daemon that carries its ports."""
    with docker_site(ENGINES[0], tmp_path_factory.mktemp("settings"), None, "--userland-proxy=false") as found:
        yield found


def test_routed_network_opens_published_ports_at_the_containers_address(bare: DockerSite) -> None:
    subnets = "--ipv6", "--subnet", "10.9.0.0/24", "--subnet", "fd09::/64"
    bare.docker.run("network", "create", *subnets, "-o", f"{MODE}4=routed", "-o", f"{MODE}6=routed", "direct")
    name = bare.container("--network", "direct", "-p", "8700:80", "-p", "127.0.0.1:8701:82", serving=(80, 81, 82))
    other = bare.container()
    address = address_on(bare, "direct", name)
    bare.wait_for(f"docker:{name} {address} 80:80/tcp", f"docker:{name} fd09::2 80:80/tcp")
    bare.wait_for(f"docker:{name} {address} 82:82/tcp")  # dockerd ignores the host address
    with bare.neighbour.entered():
        assert echo_server.request_here("tcp", address, 80).peer == NEIGHBOUR
        assert echo_server.request_here("tcp", "fd09::2", 80).peer == bare.neighbour.address6
        assert echo_server.request_here("tcp", address, 82).peer == NEIGHBOUR
    inner, outer = partial(bare.docker.command_in, other), bare.neighbour.command
    assert bare.is_reached(inner, address, 80)
    assert not bare.is_reached(inner, address, 81)
    assert not bare.is_reached(outer, address, 81)
    assert not bare.is_reached(outer, HOST, 8700)
    echo_server.serve(bare.neighbour.popen, 8702)
    assert echo_server.request(partial(bare.docker.command_in, name), "tcp", NEIGHBOUR, 8702).peer == address
    assert "remote: routed" in bare.gangway("explain", f"{address}:80")
    bare.remove(name, other)
    bare.docker.run("network", "rm", "direct")


def test_one_ip_version_is_routed(bare: DockerSite) -> None:
    subnets = "--ipv6", "--subnet", "10.8.0.0/24", "--subnet", "fd08::/64"
    bare.docker.run("network", "create", *subnets, "-o", f"{MODE}6=routed", "half")
    name = bare.container("--network", "half", "-p", "8710-8719:8710-8719", serving=(8710, 8719))
    bare.wait_for(f"docker:{name} fd08::2 8710-8719:8710-8719/tcp", f"docker:{name} 0.0.0.0 8710-8719:8710-8719/tcp")
    with bare.neighbour.entered():
        assert echo_server.request_here("tcp", "fd08::2", 8719).peer == bare.neighbour.address6
    assert bare.road("neighbour", HOST, 8710) == ("nat", NEIGHBOUR)
    assert not bare.is_reached(bare.neighbour.command, address_on(bare, "half", name), 8710)
    bare.remove(name)
    bare.wait_until_gone(name)
    bare.docker.run("network", "rm", "half")


def test_isolated_network_is_adopted(bare: DockerSite) -> None:
    """Its bridge has no address, and a container gets the subnet's first one."""
    subnets = "--ipv6", "--subnet", "10.5.0.0/24", "--subnet", "fd05::/64"
    bare.docker.run(
        "network", "create", "--internal", *subnets, "-o", f"{MODE}4=isolated", "-o", f"{MODE}6=isolated", "cell"
    )
    wait_until(partial(is_adopted, bare, "cell"), "the network to be adopted")
    inner, other = (
        bare.container("--network", "cell", "-p", "8720:80", serving=(80,)),
        bare.container("--network", "cell"),
    )
    address = address_on(bare, "cell", inner)
    assert address == "10.5.0.1"
    assert bare.is_reached(partial(bare.docker.command_in, other), address, 80)
    assert not bare.is_reached(bare.neighbour.command, address, 80)
    assert bare.gangway.json("ls") == [], "dockerd publishes no port of an internal network"
    bare.remove(inner, other)
    bare.docker.run("network", "rm", "cell")
    wait_until(lambda: not is_adopted(bare, "cell"), "the network to be gone")
