"""Ports of a real dockerd without rules of its own, which gangway's daemon carries: the road of each origin.

All tests of an engine share one dockerd and one daemon, so each uses different ports.
"""

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from lab import echo_server
from lab.dockerd import Dockerd
from lab.engines import engine_root
from lab.gangwayd import Gangway
from lab.netns import Host, Namespace
from lab.roads import ObservedRoad, observe_road
from lab.waiting import wait_until
from tests.docker.dockerhost import ENGINE_PARAMETERS, PROXY, Site

DOCKER0, HOST, NEIGHBOUR = "172.17.0.1", "172.30.0.1", "172.30.0.2"


class DockerSite(Site):
    """A site whose containers' ports a gangway daemon carries."""

    def __init__(self, host: Host, docker: Dockerd, gangway: Gangway) -> None:
        super().__init__(host, docker)
        self.gangway = gangway

    def published(self) -> set[str]:
        """Return the ports that are published, as gangway lists them."""
        return {
            f"{one['container']} {one['host_address']} {one['host_ports']}:{one['container_ports']}/{one['protocol']}"
            for one in self.gangway.json("ls")
            if not one["note"]
        }

    def wait_for(self, *ports: str) -> None:
        wait_until(lambda: self.published() >= set(ports), f"{ports} to be published")

    def wait_until_gone(self, name: str) -> None:
        wait_until(lambda: not any(f"docker:{name} " in one for one in self.published()), f"{name} to be unpublished")

    def is_reached(self, command: Callable[..., list[str]], address: str, port: int) -> bool:
        """True if a client connects to an address and port within a second."""
        words = command("socat", "-u", "/dev/null", f"TCP4:{address}:{port},connect-timeout=1")
        return subprocess.run(words, check=False, capture_output=True).returncode == 0

    def road(self, origin: str, address: str, port: int, protocol: str = "tcp") -> ObservedRoad:
        space = self.host if origin == "host" else self.neighbour
        return observe_road(self.host, space, protocol, address, port)


@contextmanager
def docker_site(engine: str, folder: Path, proxy: Path | None = None, *flags: str) -> Iterator[DockerSite]:
    """Create a dockerd without rules, and a gangway daemon that carries its ports."""
    root = engine_root(engine) if engine else None
    with Host() as host, Dockerd(host, proxy, "--iptables=false", "--ip6tables=false", *flags, engine=root) as docker:
        settings = folder / "gangway.toml"
        settings.write_text(f'[docker]\nsocket = "{docker.socket}"\n')
        with Gangway(host, "--docker", "--config", str(settings)) as gangway:
            yield DockerSite(host, docker, gangway)
            docker.remove_containers()


@pytest.fixture(scope="module", params=ENGINE_PARAMETERS)
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerSite]:
    """A dockerd without rules and proxies, and a gangway daemon that carries its ports."""
    with docker_site(request.param, tmp_path_factory.mktemp("settings"), None, "--userland-proxy=false") as found:
        yield found


@pytest.fixture(scope="module")
def web(bare: DockerSite) -> Iterator[str]:
    """A container with port 8000 published, TCP and UDP."""
    name = bare.container("-p", "8000:8000", "-p", "8000:8000/udp", serving=(8000,))
    bare.wait_for(f"docker:{name} 0.0.0.0 8000:8000/udp", f"docker:{name} :: 8000:8000/tcp")
    yield name
    bare.remove(name)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("origin", "address", "road", "seen"),
    [
        ("host", "127.0.0.1", "redirect", DOCKER0),
        ("host", "127.1.2.3", "redirect", DOCKER0),
        ("host", "::1", "redirect", DOCKER0),
        ("host", HOST, "nat", HOST),
        ("host", "fd30::1", "relay", DOCKER0),
        ("neighbour", HOST, "nat", NEIGHBOUR),
        ("neighbour", "fd30::1", "relay", DOCKER0),
    ],
)
@pytest.mark.usefixtures("web")
def test_road_of_each_origin(bare: DockerSite, origin: str, address: str, road: str, seen: str, protocol: str) -> None:
    wait_until(lambda: bare.road(origin, address, 8000, protocol) == (road, seen), f"{road}, with {seen} as client")


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", [DOCKER0, HOST])
def test_containers_reach_published_port(bare: DockerSite, web: str, address: str, protocol: str) -> None:
    other = bare.container()
    peer = bare.docker.address_of(other)
    for client, seen in ((other, {DOCKER0, peer}), (web, {DOCKER0})):
        command = partial(bare.docker.command_in, client)
        assert echo_server.request(command, protocol, address, 8000).peer in seen
    bare.remove(other)


def test_range_is_one_mapping_and_ends_with_the_container(bare: DockerSite) -> None:
    name = bare.container("-p", "20000-20199:20000-20199", serving=(20000, 20199))
    bare.wait_for(f"docker:{name} 0.0.0.0 20000-20199:20000-20199/tcp")
    for port in (20000, 20199):
        assert bare.road("neighbour", HOST, port) == ("nat", NEIGHBOUR)
        assert bare.road("host", "127.0.0.1", port) == ("redirect", DOCKER0)
    bare.remove(name)
    bare.wait_until_gone(name)
    assert not bare.is_reached(bare.neighbour.command, HOST, 20000)
    assert not bare.is_reached(bare.host.command, "127.0.0.1", 20000)


def test_restarted_container_is_served_again(bare: DockerSite) -> None:
    name = bare.container("-p", "8100:8100", serving=(8100,))
    bare.wait_for(f"docker:{name} 0.0.0.0 8100:8100/tcp")
    bare.gangway("publish", f"docker:{name}", "-p", "8101:8100")
    assert bare.road("neighbour", HOST, 8101) == ("nat", NEIGHBOUR)
    first = bare.docker.address_of(name)
    bare.gangway("publish", f"docker:{name}", "-p", "8102:8100")
    bare.docker.run("stop", "-t", "0", name)
    bare.wait_until_gone(name)
    bare.gangway("unpublish", f"docker:{name}", "-p", "8102:8100")
    listed = bare.gangway("ls", f"docker:{name}", "--format", "{published} {port} {roads}").splitlines()
    assert listed == [f"{at}:8101/tcp 8100 (container is stopped)" for at in ("0.0.0.0", "[::]")]
    other = bare.container()  # takes the address
    bare.docker.run("start", name)
    bare.serve(name, 8100)
    bare.wait_for(f"docker:{name} 0.0.0.0 8100:8100/tcp", f"docker:{name} 0.0.0.0 8101:8100/tcp")
    assert bare.docker.address_of(name) != first
    for port in (8100, 8101):
        assert bare.road("neighbour", HOST, port) == ("nat", NEIGHBOUR)
        assert bare.road("host", "127.0.0.1", port).road == "redirect"
    assert not bare.is_reached(bare.host.command, "127.0.0.1", 8102)
    bare.remove(name, other)
    bare.wait_until_gone(name)


def test_renamed_container_keeps_its_ports_and_connections(bare: DockerSite) -> None:
    name = bare.container("-p", "8110:8110", serving=(8110,))
    bare.wait_for(f"docker:{name} 0.0.0.0 8110:8110/tcp")
    bare.gangway("publish", f"docker:{name}", "-p", "8111:8110")
    with bare.neighbour.entered(), socket.create_connection((HOST, 8111), 5) as client:
        bare.docker.run("rename", name, "shop")
        bare.wait_for("docker:shop 0.0.0.0 8110:8110/tcp", "docker:shop 0.0.0.0 8111:8110/tcp")
        assert not [one for one in bare.published() if f"docker:{name} " in one]
        assert echo_server.request_over(client).peer == NEIGHBOUR
    bare.gangway("unpublish", "docker:shop", "-p", "8111:8110")
    assert not [one for one in bare.published() if " 8111:" in one]
    bare.remove("shop")
    bare.wait_until_gone("shop")


def test_networks_are_isolated_from_each_other(bare: DockerSite) -> None:
    bare.docker.run("network", "create", "a")
    bare.docker.run("network", "create", "b")
    one = bare.container("--network", "a", "-p", "8200:8200", serving=(8200, 8201))
    other = bare.container("--network", "b")
    bare.wait_for(f"docker:{one} 0.0.0.0 8200:8200/tcp")
    client = partial(bare.docker.command_in, other)
    address = bare.docker.run("inspect", "-f", "{{.NetworkSettings.Networks.a.IPAddress}}", one).stdout.strip()
    assert echo_server.request(client, "tcp", HOST, 8200).peer  # by the published port, and in no other way
    assert not any(bare.is_reached(client, address, port) for port in (8200, 8201))
    # Another machine that has a route to the network reaches nothing by it.
    bare.neighbour.ip("route", "add", f"{address}/32", "via", HOST)
    assert not bare.is_reached(bare.neighbour.command, address, 8200)
    bare.remove(one, other)
    bare.docker.run("network", "rm", "a", "b")


def test_containers_reach_other_machines_by_masquerade(bare: DockerSite) -> None:
    echo_server.serve(bare.neighbour.popen, 8300)
    name = bare.container()
    client = partial(bare.docker.command_in, name)
    wait_until(lambda: bool(bare.gangway.json("network", "ls")), "the network to be adopted")
    assert echo_server.request(client, "tcp", NEIGHBOUR, 8300).peer == HOST
    bare.remove(name)


def test_daemon_restarts_and_dockerd_restarts(bare: DockerSite) -> None:
    name = bare.container("-p", "8400:8400", serving=(8400,))
    bare.wait_for(f"docker:{name} 0.0.0.0 8400:8400/tcp")
    bare.gangway.kill()
    assert bare.road("neighbour", HOST, 8400) == ("nat", NEIGHBOUR)
    assert bare.road("host", "127.0.0.1", 8400).road == "redirect"
    bare.gangway.start()
    bare.wait_for(f"docker:{name} 0.0.0.0 8400:8400/tcp")
    assert bare.road("neighbour", HOST, 8400) == ("nat", NEIGHBOUR)
    bare.remove(name)
    bare.wait_until_gone(name)


def test_doctor_says_what_is_followed(bare: DockerSite) -> None:
    (found,) = (one for one in bare.gangway.json("doctor") if one["check"] == "Docker's networks and ports")
    assert found["holds"]
    assert found["note"].startswith("Docker/")
    assert f"at {bare.docker.socket}: 1 network" in found["note"]


def test_daemon_that_replaces_a_killed_one_follows_docker_too(bare: DockerSite) -> None:
    """A command starts it, with the options of the operator's daemon."""
    former = bare.container("-p", "8500:80")
    bare.wait_for(f"docker:{former} 0.0.0.0 8500:80/tcp")
    bare.gangway.kill()
    bare.remove(former)
    later = bare.container("-p", "8501:8501", serving=(8501,))
    bare.wait_for(f"docker:{later} 0.0.0.0 8501:8501/tcp")
    bare.wait_until_gone(former)
    assert bare.road("neighbour", HOST, 8501) == ("nat", NEIGHBOUR)
    bare.remove(later)
    bare.wait_until_gone(later)


def test_drop_ins_leases_are_the_ports(tmp_path: Path) -> None:
    with docker_site("", tmp_path, PROXY) as site:
        name = site.container("-p", "8000:8000", "-p", "8000:8000/udp", serving=(8000,))
        # From docker run's return on, everybody is served; rules come some milliseconds later.
        assert site.road("host", "127.0.0.1", 8000) == ("redirect", DOCKER0)
        assert site.road("neighbour", HOST, 8000).road in ("nat", "relay")
        for protocol in ("tcp", "udp"):
            wait_until(partial(_is_nat, site, 8000, protocol), "nat to a lease's port")
            assert site.road("neighbour", "fd30::1", 8000, protocol) == ("relay", DOCKER0)
        assert "docker-proxy" in site.gangway("doctor")
        site.docker.run("restart", "-t", "0", name)
        site.serve(name, 8000)
        wait_until(partial(_is_nat, site, 8000), "nat after a restart")
        site.gangway.kill()  # a launcher starts the next daemon, with the same settings
        wait_until(lambda: f"docker:{name} 0.0.0.0 8000:8000/tcp" in site.published(), "the next daemon")
        for origin, address, road in (
            ("neighbour", HOST, "nat"),
            ("neighbour", "fd30::1", "relay"),
            ("host", "::1", "redirect"),
        ):
            assert site.road(origin, address, 8000).road == road
        site.remove(name)
        site.wait_until_gone(name)
        assert site.is_free(8000)


def test_label_restricts_leased_ports_with_either_firewall(tmp_path: Path) -> None:
    """A relay that serves a launcher's lease admits everybody: rules have to drop the others."""
    with docker_site("", tmp_path, PROXY) as site:
        names = [
            site.container(
                *("-p", f"{port}:80", "-p", f"{port}:80/udp", "--label", f"gangway.from={clients}"), serving=(80,)
            )
            for port, clients in ((8700, "192.0.2.0/24,172.30.0.2"), (8701, "192.0.2.0/24,198.51.100.0/24"))
        ]
        site.wait_for(f"docker:{names[1]} :: 8701:80/udp")
        for firewall in ("iptables", "nftables"):
            _use_firewall(site, tmp_path / "gangway.toml", firewall)
            wait_until(partial(_is_nat, site, 8700), "nat for an admitted client")
            wait_until(lambda: not _answers(site.neighbour, "tcp", HOST, 8701), "the others to be dropped")
            for protocol in ("tcp", "udp"):
                assert _answers(site.neighbour, protocol, HOST, 8700)
                assert not _answers(site.neighbour, protocol, HOST, 8701)
                assert not _answers(site.neighbour, protocol, "fd30::1", 8700)
                assert _answers(site.host, protocol, HOST, 8701)
                assert _answers(site.host, protocol, "::1", 8701)
            assert not site.is_reached(partial(site.docker.command_in, names[1]), HOST, 8700)


def _use_firewall(site: DockerSite, settings: Path, firewall: str) -> None:
    settings.write_text(f'firewall = "{firewall}"\n[docker]\nsocket = "{site.docker.socket}"\n')
    assert site.gangway.daemon is not None
    site.gangway.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "in use" in _doctor(site, f"firewall: {firewall}"), f"rules of {firewall}")


def _doctor(site: DockerSite, check: str) -> str:
    return next(str(one["note"]) for one in site.gangway.json("doctor") if one["check"] == check)


def _answers(client: Namespace, protocol: str, address: str, port: int) -> bool:
    try:
        with client.entered():
            return bool(echo_server.request_here(protocol, address, port, patience_s=0.7))
    except echo_server.NoAnswer:
        return False


def _is_nat(site: DockerSite, port: int, protocol: str = "tcp") -> bool:
    return site.road("neighbour", HOST, port, protocol) == ("nat", NEIGHBOUR)


def test_label_admits_some_clients(bare: DockerSite) -> None:
    """A label that cannot be read publishes nothing."""
    name = bare.container("-p", "8600:8600", "--label", "gangway.from=172.30.0.2,fd30::/64", serving=(8600,))
    bare.wait_for(f"docker:{name} 0.0.0.0 8600:8600/tcp")
    wrong = bare.container("-p", "8601:8600", "--label", "gangway.from=office", serving=(8600,))
    other = bare.container("-p", "8602:8600")
    bare.wait_for(f"docker:{other} 0.0.0.0 8602:8600/tcp")
    assert not [one for one in bare.published() if wrong in one]
    assert bare.is_reached(bare.neighbour.command, HOST, 8600)
    assert bare.is_reached(bare.host.command, HOST, 8600)
    assert not bare.is_reached(partial(bare.docker.command_in, other), HOST, 8600)
    bare.remove(name, wrong, other)
