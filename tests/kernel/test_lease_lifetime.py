"""Leases of docker-proxy launchers: what gangway's commands show, and what happens when a process is killed."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.gangwayd import GANGWAY, CommandFailed, Gangway
from lab.netns import Container, Host, Namespace
from lab.processes import pids_running, suspend
from lab.redirect import actual_peer
from lab.versions import installed
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S
from tests.kernel.launcher import launchers
from tests.kernel.launcher.launchers import (
    Echo,
    connect,
    daemon_and_relay,
    exchange,
    flags_for,
    is_free,
    kill,
    publish,
    refused,
    serves,
    stop,
)
from tests.kernel.published import processes

pytestmark = pytest.mark.any_kernel  # processes, not the kernel, decide

PORT, OTHER = 8000, 8001


class Scene(NamedTuple):
    """A host, and a container that echoes."""

    host: Host
    box: Container

    def gangway(self, *words: str) -> str:
        """Return what a command prints that is typed in the host's namespace, without options."""
        return self.host.run(str(GANGWAY), *words).stdout

    def leased_ports(self) -> list[str]:
        """Return the host ports of all leases."""
        mappings: list[dict[str, Any]] = json.loads(self.gangway("ls", "--json"))
        return [mapping["host_ports"] for mapping in mappings if mapping["source"] == "lease"]

    def is_redirected(self, port: int, address: str = "127.0.0.1") -> bool:
        """True if clients are redirected to the container."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.host.entered(), socket.socket(family) as client:
            client.connect((address, port))
            return actual_peer(client) == (self.box.address4, Echo.port)


@pytest.fixture
def scene() -> Iterator[Scene]:
    with launchers.site() as made:
        yield Scene(*made)


# Commands


def test_ls_shows_source_addresses_and_roads(scene: Scene) -> None:
    publish(scene.host, scene.box, PORT)
    publish(scene.host, scene.box, PORT, proto="udp")
    head, *rows = [line.split() for line in scene.gangway("ls").splitlines()]
    assert head == ["PUBLISHED", "CONTAINER", "PORT", "SOURCE", "ROADS"]
    assert rows == [
        [f"0.0.0.0:{PORT}/{protocol}", "-", str(Echo.port), "lease", "relay;", "lo", "redirect"]
        for protocol in ("tcp", "udp")
    ]
    target = f"{scene.box.address4}:{Echo.port}"
    assert scene.gangway("ls", "--format", "{target}").splitlines() == [target] * 2


def test_ls_shows_both_families_of_a_dual_stack_socket(scene: Scene) -> None:
    with scene.host.entered():
        listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener:
        publish(scene.host, scene.box, PORT, "-host-ip", "::", "-use-listen-fd", passed=listener.fileno())
    mappings = json.loads(scene.gangway("ls", "--json"))
    assert [mapping["host_address"] for mapping in mappings] == ["0.0.0.0", "::"]
    assert all(scene.is_redirected(PORT, address) for address in ("::1", "127.0.0.1"))


def test_ls_counts_redirected_connections(scene: Scene) -> None:
    publish(scene.host, scene.box, PORT)
    assert all(scene.is_redirected(PORT) for _ in range(3))
    assert [mapping["redirected"] for mapping in json.loads(scene.gangway("ls", "--json"))] == [3]


def test_explain_says_why(scene: Scene) -> None:
    publish(scene.host, scene.box, PORT)
    said = scene.gangway("explain", f"127.0.0.1:{PORT}")
    assert f"127.0.0.1:{PORT}/tcp is 0.0.0.0:{PORT} -> {scene.box.address4}:{Echo.port}/tcp" in said
    assert "container -, source lease" in said
    assert "loopback: redirect" in said
    assert f"redirect map: tcp 0.0.0.0:{PORT} -> {scene.box.address4}:{Echo.port}" in said
    said = scene.gangway("explain", f"{scene.host.gateway4}:{PORT}")
    assert "remote: relay\n  Docker's own rules may carry the connection first; whatever they leave is relayed." in said


def test_doctor_counts_leases(scene: Scene) -> None:
    def line() -> str:
        lines = scene.gangway("doctor").splitlines()
        return next(line for line in lines if line.startswith("docker-proxy launchers")).strip()

    assert line().endswith(" yes    none")
    publish(scene.host, scene.box, PORT)
    assert line().endswith(" yes    1 port published by a lease")
    publish(scene.host, scene.box, OTHER)
    assert line().endswith(" yes    2 ports published by leases")


def test_ended_lease_is_not_shown(scene: Scene) -> None:
    first, second = publish(scene.host, scene.box, PORT), publish(scene.host, scene.box, OTHER)
    assert scene.leased_ports() == [str(PORT), str(OTHER)]
    assert stop(first) == 0
    assert scene.leased_ports() == [str(OTHER)]
    assert stop(second, signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: scene.leased_ports() == [], "the end of the killed launcher's lease", PATIENCE_S)


def test_publish_names_docker_for_a_leased_port(scene: Scene) -> None:
    host, box = scene
    with Gangway(host) as gangway, Namespace("web") as web:
        gangway("network", "create", "net", "--subnet", "172.31.0.0/24")
        gangway("attach", web.name, "--network", "net")
        launcher = publish(host, box, PORT)
        with pytest.raises(CommandFailed) as failed:
            gangway("publish", web.name, "-p", f"{PORT}:80")
        at = f"0.0.0.0:{PORT}/tcp"
        assert str(failed.value) == f"gangway: {at} is published by Docker for {box.address4}: choose another port"
        assert serves(host, PORT)
        assert stop(launcher) == 0
        gangway("publish", web.name, "-p", f"{PORT}:80")
        # Commands of the drop-in's daemon and of the operator's are the same.
        assert [one["source"] for one in gangway.json("ls")] == ["api", "api"]


def test_launcher_finds_a_port_that_gangway_published_in_use(scene: Scene) -> None:
    host, box = scene
    with Gangway(host) as gangway, Namespace("web") as web:
        gangway("attach", web.name)
        gangway("publish", web.name, "-p", f"{PORT}:80", "-p", f"{OTHER}:80/udp")
        for proto, port in ("tcp", PORT), ("udp", OTHER):
            reason = refused(host, *flags_for(box, port, proto))
            assert reason == f"listen {proto}4 0.0.0.0:{port}: bind: address already in use"
            gangway("unpublish", web.name, "-p", f"{port}:80/{proto}")
            assert stop(publish(host, box, port, proto=proto)) == 0


# Deaths


def test_connection_survives_a_killed_daemon(scene: Scene) -> None:
    host, box = scene
    launcher = publish(host, box, PORT)
    daemon, relay = daemon_and_relay(host)
    with connect(host, PORT) as client:
        exchange(client)
        kill(daemon)
        exchange(client)
        assert scene.is_redirected(PORT), "also while there is no daemon"
        wait_until(lambda: scene.leased_ports() == [str(PORT)], "the lease to be taken again", PATIENCE_S)
        assert set(processes(host)) & {daemon, relay} == {relay}
        exchange(client)
        assert scene.is_redirected(PORT)
        assert stop(launcher) == 0
    assert is_free(host, PORT)


def test_relay_frees_the_port_of_a_launcher_that_is_killed_after_the_daemon(scene: Scene) -> None:
    host, box = scene
    launcher = publish(host, box, PORT)
    daemon, _ = daemon_and_relay(host)
    suspend(launcher.pid)  # it must not start another daemon
    kill(daemon)
    assert scene.is_redirected(PORT)
    assert stop(launcher, signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: is_free(host, PORT), "the port to be free", PATIENCE_S)
    with host.entered(), socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", PORT))  # it is not redirected either


def test_next_daemon_frees_the_port_of_a_launcher_that_is_killed_meanwhile(scene: Scene) -> None:
    """The former daemon granted the lease, and the launcher has not taken a new one."""
    host, box = scene
    publish(host, box, OTHER)
    launcher = publish(host, box, PORT)
    suspend(launcher.pid)
    kill(daemon_and_relay(host)[0])
    wait_until(lambda: scene.leased_ports() == [str(OTHER)], "the next daemon, with the other lease", PATIENCE_S)
    assert scene.is_redirected(PORT), "until the launcher exits"
    assert stop(launcher, signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: is_free(host, PORT), "the port to be free", PATIENCE_S)
    with host.entered(), socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", PORT))
    assert scene.is_redirected(OTHER)
    assert stop(publish(host, box, PORT)) == 0


def test_slow_launcher_takes_its_lease_again(scene: Scene) -> None:
    """Its connections survive, although the next daemon has run for some time."""
    host, box = scene
    publish(host, box, OTHER)
    launcher = publish(host, box, PORT)
    with connect(host, PORT) as client:
        exchange(client)
        suspend(launcher.pid)
        kill(daemon_and_relay(host)[0])
        wait_until(lambda: scene.leased_ports() == [str(OTHER)], "the next daemon, with the other lease", PATIENCE_S)
        launcher.send_signal(signal.SIGCONT)
        wait_until(lambda: len(scene.leased_ports()) == 2, "the lease to be taken again", PATIENCE_S)
        exchange(client)


def test_leases_survive_the_takeover_by_an_operators_daemon(scene: Scene) -> None:
    host, box = scene
    launcher = publish(host, box, PORT)
    _, relay = daemon_and_relay(host)
    with connect(host, PORT) as client:
        exchange(client)
        with Gangway(host) as gangway:  # the launcher starts daemons, too, as long as it finds none
            assert gangway.daemon is not None
            pid = gangway.daemon.pid
            wait_until(lambda: pids_running("gangway.daemon", host) == [pid], "the daemon on demand to end", PATIENCE_S)
            wait_until(lambda: scene.leased_ports() == [str(PORT)], "the lease to be taken again", PATIENCE_S)
            assert gangway.relays() == [relay]
            exchange(client)
            assert stop(launcher) == 0


def test_leases_survive_the_takeover_by_a_daemon_of_another_version(scene: Scene, tmp_path: Path) -> None:
    host, box = scene
    launcher = publish(host, box, PORT)
    _, relay = daemon_and_relay(host)
    newer = Gangway(host)
    newer.program = installed(tmp_path, "99.0.0")
    with connect(host, PORT) as client:
        exchange(client)
        with newer:
            assert newer.daemon is not None
            pid = newer.daemon.pid
            wait_until(lambda: pids_running("gangway.daemon", host) == [pid], "the daemon on demand to end", PATIENCE_S)
            wait_until(lambda: scene.leased_ports() == [str(PORT)], "the lease to be taken again", PATIENCE_S)
            with connect(host, PORT) as another:
                exchange(another)
            exchange(client)
            assert relay in newer.relays()
            assert len(newer.relays()) == 2
            assert stop(launcher) == 0
            assert is_free(host, PORT)
            wait_until(lambda: relay not in newer.relays(), "the end of the relay that was replaced", PATIENCE_S)
