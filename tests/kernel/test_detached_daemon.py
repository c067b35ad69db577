"""What a daemon does not share with the process that starts it, and what SIGHUP does to it."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangway.daemon import detach
from lab.gangwayd import GANGWAY, Gangway, runtime_folder
from lab.netns import Namespace
from lab.processes import pids_running
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel

_LINGER_S = 20


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("host") as made:
        yield made
        for pid in pids_running("gangway.daemon", made):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not pids_running("gangway.daemon", made), "the daemon's end", _LINGER_S)


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of the process that starts the daemon."""
    root = next(one.root for one in detach._hierarchies() if one.is_v2)
    path = root / f"gw-test-{os.getpid()}"
    path.mkdir()
    yield path
    path.rmdir()  # which fails if a process is left in it


def _status(pid: int, key: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith(f"{key}:"))


def test_a_daemon_on_demand_inherits_nothing(host: Namespace, group: Path) -> None:
    script = (
        f"echo $$ > {group}/cgroup.procs; trap '' INT HUP; umask 077; ulimit -S -n 64; ulimit -S -f 1000; "
        f'export SECRET=1; cd /tmp; exec nice -n 7 "$@"'
    )
    folder = runtime_folder(host)
    stale = group.parent / "gangway-netns-0"  # of a daemon that was killed
    stale.mkdir()
    words = (str(GANGWAY), "network", "create", "web", "--subnet", "172.30.0.0/24")
    host.run("sh", "-c", script, "sh", *words)
    (daemon,) = pids_running("gangway.daemon", host)
    name = f"gangway-{folder.name}"
    assert not stale.exists()
    assert f"0::/{name}\n" in Path(f"/proc/{daemon}/cgroup").read_text()
    assert os.getpriority(os.PRIO_PROCESS, daemon) == 0
    assert _status(daemon, "Umask") == "0022"
    assert not int(_status(daemon, "SigIgn"), 16) >> (signal.SIGINT - 1) & 1
    assert b"SECRET" not in Path(f"/proc/{daemon}/environ").read_bytes()
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    limits = Path(f"/proc/{daemon}/limits").read_text()
    init = Path("/proc/1/limits").read_text()
    for limit in ("Max file size",):
        assert _limit(limits, limit) == _limit(init, limit)
    host.run(str(GANGWAY), "network", "rm", "web")
    wait_until(lambda: not pids_running("gangway.daemon", host), "the daemon's end", _LINGER_S)
    assert not any((one.root / name).exists() for one in detach._hierarchies())


def _limit(listing: str, name: str) -> str:
    return next(line[len(name) :].split()[0] for line in listing.splitlines() if line.startswith(name))


def test_sighup_reloads_settings_and_reopens_logs(host: Namespace, tmp_path: Path) -> None:
    config, log = tmp_path / "gangway.toml", tmp_path / "gangway.log"
    config.write_text(f'log = "{log}"\n')
    with Gangway(host, "--config", str(config)) as gangway, Namespace("box") as box:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "127.0.0.1:8080:80/udp")
        (relay,) = gangway.relays()
        log.rename(tmp_path / "gangway.log.1")
        config.write_text(f'ip-forward = false\nlog = "{log}"\n[relay]\nudp_timeout_s = 5\n')
        _hang_up(gangway, log, "settings reloaded; [relay]: from the relay's next start")
        opened = {os.readlink(f"/proc/{relay}/fd/{fd}") for fd in os.listdir(f"/proc/{relay}/fd")}
        assert str(log) in opened
        assert f"{log}.1" not in opened
        config.write_text("firewall = 'nonsense'\n")
        _hang_up(gangway, log, "settings not reloaded: ")
        os.kill(relay, signal.SIGHUP)
        assert gangway.relays() == [relay]
        assert len(gangway.json("ls")) == 1
        assert gangway.daemon is not None
        gangway.daemon.send_signal(signal.SIGTERM)
        assert gangway.daemon.wait(10) == 0
        assert not gangway.socket.exists()
        gangway.start("--firewall", "nftables")


def _hang_up(gangway: Gangway, log: Path, message: str) -> None:
    assert gangway.daemon is not None
    gangway.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: log.exists() and message in log.read_text(), f"the log to say {message!r}")


def test_a_scope_is_requested_from_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "said"
    program = tmp_path / "busctl"
    program.write_text(f'#!/bin/sh\necho "$@" > {said}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert detach._start_scope("gangway-x.scope")
    assert f"StartTransientUnit ssa(sv)a(sa(sv)) gangway-x.scope fail 2 PIDs au 1 {os.getpid()} " in said.read_text()
    program.write_text("#!/bin/sh\nexit 1\n")
    assert not detach._start_scope("gangway-x.scope")
