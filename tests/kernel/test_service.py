"""The unit for systemd, under a real systemd: what it is told, and what goes on while the service is restarted."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gangway import runtime
from lab.gangwayd import GANGWAY
from lab.netns import Namespace
from lab.processes import pids_running
from lab.systemd import Systemd
from lab.waiting import wait_until
from tests.kernel.crossings import client_of

pytestmark = pytest.mark.any_kernel

_UNIT = Path(__file__).parents[2] / "systemd/gangway.service"
_DECLARED = "/etc/gangway/conf.d/web.toml"
# While the file `gate` exists, no daemon is started.
_DROP_IN = """
[Unit]
DefaultDependencies=no
After=
Before=
Wants=
[Service]
StandardError=append:{folder}/service.log
WatchdogSec=2
ExecStartPre=/bin/sh -c 'while [ -e {folder}/gate ]; do sleep 0.02; done'
"""


class Service:
    def __init__(self, host: Namespace, systemd: Systemd, folder: Path) -> None:
        self.host, self.systemd = host, systemd
        self.settings, self.gate = folder / "gangway.toml", folder / "gate"

    def gangway(self, *words: str) -> str:
        return self.systemd(str(GANGWAY), *words)

    def pid(self) -> int:
        """Return the process ID of the one daemon here; one that gives way ends just after the other is ready."""

        def running() -> list[int]:
            return pids_running("gangway.daemon", self.host)

        wait_until(lambda: len(running()) == 1, "one daemon")
        return running()[0]

    def client(self, kind: int, name: str) -> socket.socket:
        """Return a socket that is connected to one of the daemon's sockets."""
        with self.host.entered():
            path = self.systemd.path(f"{runtime.folder()}/{name}")
        client = socket.socket(socket.AF_UNIX, kind)
        client.settimeout(20)
        client.connect(str(path))
        return client


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    scratch = tmp_path_factory.mktemp("systemd")
    unit = _UNIT.read_text().replace("/usr/bin/gangway", str(GANGWAY)) + _DROP_IN.format(folder=scratch)
    unit = unit.replace("gangway daemon\n", f"gangway daemon --config {scratch}/gangway.toml\n")
    with Namespace("host") as host, Systemd(host, {"gangway.service": unit}, scratch) as systemd:
        made = Service(host, systemd, scratch)
        made.settings.write_text("")
        systemd("systemctl", "start", "gangway")
        yield made


def test_it_is_active_when_the_daemon_serves(service: Service) -> None:
    assert service.systemd("systemctl", "is-active", "gangway") == "active\n"
    assert "a service manager" in service.gangway("daemon", "status")
    checks = {one["check"]: one["holds"] for one in json.loads(service.gangway("doctor", "--json"))}
    assert all(checks[name] for name in ("root", "firewall: nftables", "eBPF: capabilities", "relay: raw sockets"))


def test_ports_and_connections_outlive_a_restart(service: Service) -> None:
    with Namespace("box") as box:
        service.gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        service.gangway("attach", box.name, "--network", "web")
        service.gangway("publish", box.name, "-p", "127.0.0.1:8080:80")
        with box.entered():
            listener = socket.create_server(("", 80))
        with (
            closing(listener),
            closing(client_of(service.host, "tcp", "127.0.0.1", 8080)) as client,
            closing(listener.accept()[0]) as server,
        ):
            server.recv(100)
            relays, before = pids_running("gangway.relay", service.host), service.pid()
            for command in ("restart", "stop"):
                service.systemd("systemctl", command, "gangway")
                client.sendall(command.encode())
                assert server.recv(100) == command.encode()
            service.systemd("systemctl", "start", "gangway")
            assert pids_running("gangway.relay", service.host) == relays
            assert service.pid() != before
            assert "8080" in service.gangway("ls")
        service.gangway("detach", box.name)
        service.gangway("network", "rm", "web")


def test_commands_and_launchers_wait_while_it_is_restarted(service: Service) -> None:
    before = service.pid()
    service.gate.touch()
    try:
        service.systemd("systemctl", "restart", "--no-block", "gangway")
        wait_until(lambda: not pids_running("gangway.daemon", service.host), "the daemon to end")
        with (
            service.client(socket.SOCK_STREAM, runtime.API_SOCKET) as command,
            service.client(socket.SOCK_SEQPACKET, runtime.LEASE_SOCKET) as launcher,
        ):
            command.sendall(b"GET /status HTTP/1.1\r\nHost: gangway\r\nConnection: close\r\n\r\n")
            launcher.send(b"nonsense")
            service.gate.unlink()
            assert command.recv(100).startswith(b"HTTP/1.1 200")
            assert launcher.recv(100).startswith(b"error")
    finally:
        service.gate.unlink(missing_ok=True)
    assert service.pid() != before


def test_a_service_with_wrong_settings_fails_and_a_command_says_why(service: Service) -> None:
    service.settings.write_text("firewall = 'nonsense'")
    try:
        assert service.systemd.run("systemctl", "restart", "gangway").returncode
        assert service.systemd.run("systemctl", "is-failed", "gangway").stdout == "failed\n"
        refused = service.systemd.run(str(GANGWAY), "network", "ls")
        assert refused.returncode
        assert "nonsense" in refused.stderr
    finally:
        service.settings.write_text("")
        service.systemd("systemctl", "start", "gangway")


def test_reload_reports_a_mistake(service: Service) -> None:
    before = service.pid()
    for settings, code in (("ip-forward = false", 0), ("firewall = 'nonsense'", 1), ("", 0)):
        service.settings.write_text(settings)
        assert service.systemd.run("systemctl", "reload", "gangway").returncode == code
        assert service.systemd("systemctl", "is-active", "gangway") == "active\n"
    declared = service.settings.with_name("conf.d")
    declared.mkdir()
    try:
        (declared / "10.toml").write_text("[[")
        (declared / "20.toml").write_text('[[network]]\nname = "web"\n')
        assert service.systemd.run("systemctl", "reload", "gangway").returncode == 1
        assert service.systemd("systemctl", "is-active", "gangway") == "active\n"
        assert service.gangway("network", "ls", "-q") == "web\n"
    finally:
        shutil.rmtree(declared)
    service.systemd("systemctl", "reload", "gangway")
    assert service.gangway("network", "ls", "-q") == ""
    assert service.pid() == before


def test_service_replaces_a_daemon_on_demand(service: Service) -> None:
    service.systemd("systemctl", "stop", "gangway")
    service.gangway("network", "ls")
    before = service.pid()
    service.systemd("systemctl", "start", "gangway")
    assert service.pid() != before
    assert "a service manager" in service.gangway("daemon", "status")


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_daemon_that_hangs_or_is_killed_is_started_again(service: Service, how: signal.Signals) -> None:
    before = service.pid()

    def is_another_active() -> bool:
        state = service.systemd.run("systemctl", "is-active", "gangway").stdout
        return state == "active\n" and pids_running("gangway.daemon", service.host) not in ([], [before])

    os.kill(before, how)
    wait_until(is_another_active, "another daemon", 30)


def test_down_ends_the_service_and_leaves_nothing(service: Service) -> None:
    service.gangway("network", "create", "last", "--subnet", "172.39.0.0/24")
    said = service.gangway("down", "--yes")
    assert "network last\n" in said
    assert "systemctl disable --now gangway" in said
    is_active = ("systemctl", "is-active", "gangway")
    wait_until(lambda: service.systemd.run(*is_active).stdout == "inactive\n", "systemd to know that it has ended")
    assert service.gangway("uninstall-check") == "nothing is left\n"
    service.systemd("sh", "-ec", f"mkdir -p /etc/gangway/conf.d; : >{_DECLARED}")  # in memory, as all its files are
    found = json.loads(service.systemd.run(str(GANGWAY), "uninstall-check", "--json").stdout)
    assert found == [{"what": f"file {_DECLARED}, which the next daemon reads", "removal": f"rm {_DECLARED}"}]
    service.systemd("rm", _DECLARED)
    service.systemd("systemctl", "start", "gangway")
    assert json.loads(service.gangway("network", "ls", "--json")) == []
