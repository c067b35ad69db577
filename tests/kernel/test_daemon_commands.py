"""The commands that are about the daemon itself: when it is ended, ports stay published, and connections go on."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gangway import __version__
from lab.gangwayd import GANGWAY, CommandFailed, Gangway
from lab.netns import Namespace
from lab.processes import pids_running
from lab.waiting import wait_until
from tests.kernel.crossings import client_of

pytestmark = pytest.mark.any_kernel


class Served:
    """A daemon with a port that the relay serves, and a client that is connected."""

    def __init__(self, gangway: Gangway, client: socket.socket, server: socket.socket) -> None:
        self.gangway, self._client, self._server = gangway, client, server

    def assert_connected(self) -> None:
        self._client.sendall(b"still here")
        assert self._server.recv(100) == b"still here"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Namespace("host") as host, Namespace("box") as box, Gangway(host, "--firewall", "none") as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "172.30.0.1:8080:80")
        with box.entered():
            listener = socket.create_server(("", 80))
        with (
            closing(listener),
            closing(client_of(host, "tcp", "172.30.0.1", 8080)) as client,
            closing(listener.accept()[0]) as server,
        ):
            server.recv(100)  # which `client_of` has sent
            yield Served(gangway, client, server)


def _facts(gangway: Gangway, command: str) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in gangway(*command.split()).splitlines())
    return {name: value.strip() for name, value in lines}


def test_status_and_versions(served: Served) -> None:
    gangway = served.gangway
    (daemon,), (relay,) = pids_running("gangway.daemon", gangway.host), gangway.relays()
    facts = _facts(gangway, "daemon status")
    assert facts["daemon"].startswith(f"{__version__}  pid {daemon}, for ")
    assert facts["relay"] == f"{__version__}  pid {relay}"
    assert [facts[name] for name in ("networks", "containers", "mappings", "leases")] == ["1", "1", "1", "0"]
    assert facts["socket"] == str(gangway.socket)
    assert facts["started by"] == "an operator"
    versions = {"client": __version__, "daemon": f"{__version__}  pid {daemon}", "relay": f"{__version__}  pid {relay}"}
    assert _facts(gangway, "version") == versions


def test_only_a_daemon_on_demand_is_restarted(served: Served) -> None:
    gangway = served.gangway
    with pytest.raises(CommandFailed, match=r"by kill \d+ \(ports stay .* again: gangway daemon --firewall none"):
        gangway("daemon", "restart")
    with Namespace("other") as other, pytest.raises(subprocess.CalledProcessError) as refused:
        other.run(str(GANGWAY), "daemon", "restart", "--socket", str(gangway.socket))
    assert "is another network namespace's" in refused.value.stderr
    served.assert_connected()


def test_stop_and_restart_keep_options_ports_and_connections(served: Served) -> None:
    gangway = served.gangway
    relays = gangway.relays()
    gangway("daemon", "stop")
    assert not pids_running("gangway.daemon", gangway.host)
    served.assert_connected()
    assert gangway.run("daemon", "stop").returncode == 0
    for command in ("status", "reload"):
        with pytest.raises(CommandFailed, match=f"no daemon runs at {gangway.socket}"):
            gangway("daemon", command)
    assert _facts(gangway, "version")["daemon"] == "not running"
    assert len(gangway.json("ls")) == 1  # this starts a daemon
    (before,) = pids_running("gangway.daemon", gangway.host)
    gangway("daemon", "restart")
    (after,) = pids_running("gangway.daemon", gangway.host)
    assert after != before
    assert _facts(gangway, "daemon status")["started by"] == "a command or launcher"
    assert gangway.relays() == relays
    assert "(--firewall none)" in gangway("explain", "172.30.0.1:8080")
    served.assert_connected()


def test_daemon_on_demand_gives_way(served: Served) -> None:
    gangway = served.gangway
    gangway.stop()
    gangway("ls")
    gangway.start()
    assert gangway.daemon is not None
    pid = gangway.daemon.pid
    wait_until(lambda: pids_running("gangway.daemon", gangway.host) == [pid], "the daemon on demand to end")
    served.assert_connected()
    second = gangway.host.run(str(GANGWAY), "daemon", check=False)
    assert second.returncode == 1
    assert f"a daemon (pid {pid}, " in second.stderr


def test_reload_says_what_is_wrong(tmp_path: Path) -> None:
    settings = tmp_path / "gangway.toml"
    settings.write_text('firewall = "none"\n')
    with Namespace("host") as host, Gangway(host, "--config", str(settings)) as gangway:
        assert gangway("daemon", "reload") == ""
        settings.write_text(f'[relay]\nlog = "{tmp_path}/log"\n')
        done = gangway.run("daemon", "reload")
        assert (done.returncode, "log in the table [relay] is deprecated" in done.stderr) == (0, True)
        settings.write_text('firewall = "nonsense"\n')
        with pytest.raises(CommandFailed, match=f"{settings}: unknown firewall 'nonsense'"):
            gangway("daemon", "reload")


def test_service_manager_is_notified(tmp_path: Path) -> None:
    """systemd's part is played by a socket: it reads what a service of Type=notify sends."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, Namespace("host") as host:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        with Gangway(host, "--firewall", "none", environment=environment) as gangway:
            wait_until(lambda: manager.recv(4096) == b"READY=1", "the note that it serves")
            assert [manager.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            assert _facts(gangway, "daemon status")["started by"] == "a service manager"
            with pytest.raises(CommandFailed, match="systemctl stop gangway"):
                gangway("daemon", "stop")
            with pytest.raises(CommandFailed, match="use systemctl restart gangway"):
                gangway("daemon", "restart")
            gangway("daemon", "reload")
            wait_until(lambda: manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC="), "the note of the reload")
            wait_until(lambda: manager.recv(4096) == b"READY=1", "the note of its end")
            gangway.stop()
            wait_until(lambda: manager.recv(4096) == b"STOPPING=1", "the daemon to say that it ends")


def test_only_root_may_end_it(served: Served) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c")
    gangway = served.gangway
    gangway("ls")
    before = pids_running("gangway.daemon", gangway.host)
    os.chmod(gangway.folder, 0o755)
    os.chmod(gangway.socket, 0o666)
    body = "POST /stop HTTP/1.1\\r\\nHost: gangway\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n"
    script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{gangway.socket}'); s.sendall(b'{body}'); "
    done = gangway.host.run(*nobody, f'python3 -c "{script}print(s.recv(9999).decode())"')
    assert "only root may do this" in done.stdout
    assert pids_running("gangway.daemon", gangway.host) == before
