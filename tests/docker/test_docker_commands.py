"""What gangway's commands show of Docker's ports, typed in the host's namespace without options."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.gangwayd import GANGWAY, CommandFailed, Gangway
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.docker.dockerhost import PROXY, Site
from tests.docker.dockerhost import site as new_site

pytestmark = pytest.mark.skipif("gangway" not in PROXY.name, reason="another proxy is tested")


def leases(site: Site, port: int) -> list[dict[str, Any]]:
    """Return the leases of a host port."""
    found: list[dict[str, Any]] = json.loads(site.host.run(str(GANGWAY), "ls", "--json").stdout)
    return [one for one in found if (one["source"], one["host_ports"]) == ("lease", str(port))]


def test_ls_shows_published_port_with_its_roads(shared_site: Site) -> None:
    name = shared_site.container("-p", "8006:80", serving=(80,))
    address = shared_site.docker.address_of(name)
    shown = "{source} {published} {target} {roads}"
    listed = shared_site.host.run(str(GANGWAY), "ls", "--filter", "port=8006", "--format", shown).stdout.splitlines()
    assert listed == [f"lease {host}:8006/tcp {address}:80 relay; lo redirect" for host in ("0.0.0.0", "[::]")]
    assert shared_site.request(8006)
    assert [one["redirected"] for one in leases(shared_site, 8006)] == [1, 0]
    shared_site.remove(name)
    assert leases(shared_site, 8006) == []


def test_explain_and_doctor_show_published_ports(shared_site: Site) -> None:
    name = shared_site.container("-p", "8007:80")
    said = shared_site.host.run(str(GANGWAY), "explain", "127.0.0.1:8007").stdout
    assert "loopback: redirect" in said
    assert f"redirect map: tcp 0.0.0.0:8007 -> {shared_site.docker.address_of(name)}:80" in said
    assert " published by leases" in shared_site.host.run(str(GANGWAY), "doctor").stdout
    shared_site.remove(name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Gangway]]:
    """A site whose operator has started gangway's daemon, which knows where dockerd's API is."""
    settings: Path = tmp_path_factory.mktemp("settings") / "gangway.toml"
    with new_site() as made:
        settings.write_text(f'[docker]\nsocket = "{made.docker.socket}"\n')
        with Gangway(made.host, "--config", str(settings)) as gangway:
            yield made, gangway
            made.docker.remove_containers()  # their launchers would start another daemon


def test_containers_have_dockers_names(site: tuple[Site, Gangway]) -> None:
    made, gangway = site
    name = made.container("-p", "8000:80", serving=(80,))
    assert [one["container"] for one in leases(made, 8000)] == [f"docker:{name}"] * 2
    assert (
        gangway("explain", "127.0.0.1:8000").splitlines()[1] == f"container docker:{name}, source lease, firewall none"
    )
    made.docker.run("rename", name, "renamed")
    assert [one["container"] for one in leases(made, 8000)] == ["docker:renamed"] * 2
    made.remove("renamed")
    assert leases(made, 8000) == []


def test_docker_and_gangway_respect_each_others_ports(site: tuple[Site, Gangway]) -> None:
    made, gangway = site
    name = made.container("-p", "8001:80", serving=(80,))
    with Namespace("web") as web:
        gangway("attach", web.name)
        with pytest.raises(
            CommandFailed, match=r"0\.0\.0\.0:8001/tcp is published by Docker for 172\.17\.0\.2: choose"
        ):
            gangway("publish", web.name, "-p", "8001:80")
        gangway("publish", web.name, "-p", "8002:80")
        done = made.docker.run("run", "-d", "-p", "8002:80", made.docker.image, "sleep", "1h", check=False)
        assert re.search(r"0\.0\.0\.0:8002\b.*: address already in use", done.stderr)
        assert made.request(8001)
        gangway("detach", web.name)
    made.docker.run("restart", "-t", "0", name)
    made.serve(name, 80)
    assert made.request(8001)
    made.remove(name)


def test_daemon_of_launchers_uses_the_operators_settings(site: tuple[Site, Gangway]) -> None:
    """The operator's daemon is killed: the one that a launcher starts uses the same settings file."""
    made, gangway = site
    name = made.container("-p", "8003:80", serving=(80,))
    gangway.kill()
    wait_until(lambda: [one["container"] for one in leases(made, 8003)] == [f"docker:{name}"] * 2, "the leases again")
    assert made.request(8003)
    made.remove(name)
