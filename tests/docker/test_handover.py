"""Docker's ports are handed over to gangway and back, with a real dockerd whose rules are real."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import echo_server
from lab.dockerd import Dockerd
from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Host
from lab.waiting import wait_until
from tests.docker.dockerhost import Site

OFF = {"iptables": False, "ip6tables": False, "userland-proxy": False}
BEFORE = '{\n    "debug": false\n}\n'
OPERATORS = "-A DOCKER-USER -s 203.0.113.0/24 -j DROP"


@contextmanager
def beside(host: Host, folder: Path, *flags: str) -> Iterator[tuple[Dockerd, Gangway, Path]]:
    """A dockerd and a gangway that knows its API; and dockerd's settings file."""
    with Dockerd(host, None, *flags) as docker:
        settings = folder / "gangway.toml"
        settings.write_text(f'[docker]\nenabled = true\nsocket = "{docker.socket}"\n')
        with Gangway(host, "--config", str(settings)) as gangway:
            yield docker, gangway, docker.socket.with_name("daemon.json")


def rules(host: Host) -> list[str]:
    """Return the rules of iptables, dockerd's chains, and a policy of FORWARD that is not ACCEPT."""
    listed = "".join(host.run(f"{tool}-save").stdout for tool in ("iptables", "ip6tables"))
    found = [line.partition(" [")[0] for line in listed.splitlines()]
    return [line for line in found if line.startswith(("-A", ":DOCKER")) or line == ":FORWARD DROP"]


def dockers(host: Host) -> set[str]:
    """Return those of the rules that are not gangway's: it has some of the same, for bridges of dockerd's."""
    return {rule for rule in rules(host) if "DOCKER" in rule or rule.startswith(":FORWARD")}


def failing(gangway: Gangway) -> tuple[list[str], str]:
    """Return what `docker check` finds that does not hold, and what it advises."""
    done = gangway.run("docker", "check", "--json")
    report: dict[str, Any] = json.loads(done.stdout)[0]
    found = [check["check"] for check in report["checks"] if not check["holds"]]
    assert done.returncode == (1 if found else 0)
    return found, "\n".join(report["advice"])


def restart(docker: Dockerd) -> None:
    """Restart dockerd after it was killed, which leaves the most behind."""
    docker.kill()
    docker.start()


def test_ports_are_handed_over_and_back(tmp_path: Path) -> None:
    with Host() as host, beside(host, tmp_path) as (docker, gangway, file):
        file.write_text(BEFORE)
        docker.run("network", "create", "--internal", "inner")
        docker.run("network", "create", "-o", "com.docker.network.bridge.enable_icc=false", "strict")
        for network, port in (("bridge", "8000:80"), ("strict", "127.0.0.1:8001:80/udp")):
            docker.run("run", "-d", "--init", "--network", network, "-p", port, docker.image, "sleep", "1h")
        enable(host, docker, gangway, file)
        restart(docker)
        host.run("iptables", "-I", *OPERATORS.split()[1:])
        clean_up(host, gangway)
        host.run("iptables", "-D", *OPERATORS.split()[1:])
        gangway("docker", "cleanup", "--forward-accept")
        assert dockers(host) == set()
        gangway_serves(Site(host, docker), gangway)

        said = gangway("docker", "disable")
        assert "restored" in said
        assert file.read_text() == BEFORE
        restart(docker)
        assert "dockerd's bridges: route_localnet" in failing(gangway)[0]
        command = next(line for line in said.splitlines() if "sysctl -w" in line)
        host.run(*command.strip().removeprefix("then ").partition(" (")[0].split())
        assert "dockerd's bridges: route_localnet" not in failing(gangway)[0]
        assert "-A DOCKER -i docker0 -j RETURN" in dockers(host)
        refuse_swarm(docker, gangway)
        assert file.read_text() == BEFORE


def enable(host: Host, docker: Dockerd, gangway: Gangway, file: Path) -> None:
    """Edit the settings; dockerd's rules stay while it needs them."""
    with_dockers = dockers(host)
    found, advice = failing(gangway)
    assert {"daemon.json: iptables", "dockerd: started with these settings"} < set(found)
    assert {"dockerd's rules: iptables filter", "dockerd's rules: iptables nat"} < set(found)
    assert f"set in {file}" in advice
    assert f"restart dockerd (pid {docker.pid}); all containers end" in advice
    assert f"{file}: iptables, ip6tables, userland-proxy set to false" in gangway("docker", "enable")
    assert json.loads(file.read_text()) == {"debug": False, **OFF}
    with pytest.raises(CommandFailed, match=rf"dockerd \(pid {docker.pid}\) may need its rules: it was started"):
        gangway("docker", "cleanup")
    assert dockers(host) == with_dockers
    assert failing(gangway)[0][0] == "dockerd: started with these settings"


def clean_up(host: Host, gangway: Gangway) -> None:
    """Remove dockerd's rules; the operator's stays."""
    found, advice = failing(gangway)
    assert found == ["dockerd's rules: iptables nat", "dockerd's rules: iptables filter"]
    assert advice == "remove dockerd's rules: gangway docker cleanup"
    said = gangway("docker", "cleanup", "--forward-accept")
    assert f"kept DOCKER-USER, which rules of others use: {OPERATORS}" in said
    left = {":DOCKER-USER -", ":FORWARD DROP", "-A FORWARD -j DOCKER-USER", OPERATORS, "-A DOCKER-USER -j RETURN"}
    assert dockers(host) == left
    assert failing(gangway) == ([], "")


def gangway_serves(site: Site, gangway: Gangway) -> None:
    name = site.container("-p", "8002:80", serving=(80,))
    wait_until(lambda: f"docker:{name}" in gangway("ls"), "the port to be published")
    assert site.request(8002, "127.0.0.1")
    with site.neighbour.entered():
        assert echo_server.request_here("tcp", site.host.gateway4, 8002).peer == site.neighbour.address4
    assert failing(gangway) == ([], "")
    site.remove(name)


def refuse_swarm(docker: Dockerd, gangway: Gangway) -> None:
    docker.run("swarm", "init", "--advertise-addr", "127.0.0.1")
    for command in ("enable", "cleanup"):
        with pytest.raises(CommandFailed, match=r"Swarm is active, .*: nothing was "):
            gangway("docker", command)
    assert "dockerd: no Swarm" in failing(gangway)[0]
    docker.run("swarm", "leave", "--force")


def test_flags_of_dockerd_are_respected(tmp_path: Path) -> None:
    """A key that is a flag, too, keeps dockerd from starting."""
    flags = ("--iptables=false", "--userland-proxy", "--live-restore")
    with Host() as host, beside(host, tmp_path, *flags) as (docker, gangway, file):
        said = gangway("docker", "enable")
        assert json.loads(file.read_text()) == {"ip6tables": False, "userland-proxy": False}
        assert "remove --userland-proxy from dockerd's command line" in said
        assert "containers go on running (live-restore)" in said
        assert "dockerd: flags" in failing(gangway)[0]
        assert dockers(host) == set()
        docker.kill()
        with pytest.raises(Exception, match="specified both as a flag and in the configuration file"):
            docker.start()
        gangway("docker", "disable", "--config-file", str(file))
        docker.start()
        assert "nothing was removed" in gangway("docker", "cleanup")
