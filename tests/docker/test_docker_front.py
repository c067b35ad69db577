"""Ports of a dockerd without rules and proxies of its own, which gangway's daemon serves."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import echo_server
from lab.dockerd import Dockerd
from lab.engines import engine_root
from lab.gangwayd import Gangway
from lab.netns import Host
from lab.waiting import wait_until
from tests.docker.dockerhost import ENGINE_PARAMETERS, WITHOUT_RULES, Site

Served = tuple[Site, Gangway]


@pytest.fixture(scope="module", params=ENGINE_PARAMETERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings: Path = tmp_path_factory.mktemp("settings") / "gangway.toml"
    root = engine_root(request.param) if request.param else None
    with Host() as host, Dockerd(host, None, *WITHOUT_RULES, engine=root) as docker:
        settings.write_text(f'[docker]\nsocket = "{docker.socket}"\n')
        with Gangway(host, "--docker", "--config", str(settings)) as gangway:
            yield Site(host, docker), gangway
            docker.remove_containers()


def roads(gangway: Gangway, port: int) -> dict[str, tuple[str, str]]:
    """Return the container and source of each mapping of a host port, by its host address."""
    listed = gangway.json("ls")
    return {one["host_address"]: (one["container"], one["source"]) for one in listed if one["host_ports"] == str(port)}


def test_clients_of_every_origin_reach_a_container(served: Served) -> None:
    site, gangway = served
    name = site.container("-p", "8000:80", "-p", "8000:80/udp", serving=(80,))
    wanted = ("docker:" + name, "docker")
    wait_until(lambda: roads(gangway, 8000) == {"0.0.0.0": wanted, "::": wanted}, "the port to be published")
    for protocol in ("tcp", "udp"):
        for address in ("127.0.0.1", "::1"):
            assert site.request(8000, address, protocol) == "172.17.0.1"
        with site.neighbour.entered():
            seen = echo_server.request_here(protocol, site.host.gateway4, 8000).peer
        assert seen == site.neighbour.address4
    site.remove(name)
    wait_until(lambda: not roads(gangway, 8000), "the port to be unpublished")
    assert site.is_free(8000)


def test_doctor_says_what_is_followed(served: Served) -> None:
    site, gangway = served
    (found,) = (one for one in gangway.json("doctor") if one["check"] == "Docker's networks and ports")
    assert found["holds"]
    assert f"at {site.docker.socket}: 1 network, 0 running containers" in found["note"]
    assert found["note"].startswith("Docker/")


def test_daemon_that_replaces_a_killed_one_follows_docker_too(served: Served) -> None:
    """It is started by a command, with the options of the operator's daemon."""
    site, gangway = served
    former = site.container("-p", "8001:80", serving=(80,))
    wait_until(lambda: roads(gangway, 8001), "the port to be published")
    gangway.kill()
    site.remove(former)
    later = site.container("-p", "8002:80", serving=(80,))
    wait_until(lambda: not roads(gangway, 8001) and roads(gangway, 8002), "the ports of the other container")
    assert site.request(8002)
    site.remove(later)
    wait_until(lambda: not roads(gangway, 8002), "the port to be unpublished")
