"""The daemon and the relay that launchers share: how they start and end, who may use them, what the relay may do."""

import os
import re
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gangway import runtime
from lab.gangwayd import runtime_folder
from lab.netns import Container, Host
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S
from tests.kernel.launcher.launchers import (
    BRIEF_S,
    acting_as,
    are_replaced,
    connect,
    daemon_and_relay,
    ends,
    exchange,
    flags_for,
    kill,
    open_control,
    publish,
    serves,
    start,
    stop,
    wait_until_clean,
)
from tests.kernel.published import processes, status_of

pytestmark = pytest.mark.any_kernel  # processes, not the kernel, decide

NOBODY = 65534


def test_launchers_that_start_together_start_one_daemon(fresh: tuple[Host, Container], ports: list[int]) -> None:
    host, box = fresh
    with ThreadPoolExecutor(8) as pool:
        launchers = list(pool.map(lambda port: publish(host, box, port), ports))
    daemon_and_relay(host)
    assert all(serves(host, port) for port in ports)
    assert [stop(launcher) for launcher in launchers] == [0] * 8


def test_daemon_ends_some_seconds_after_its_last_lease(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    assert stop(publish(host, box, port)) == 0
    began_s = time.monotonic()
    daemon_and_relay(host)
    wait_until_clean(host)
    assert time.monotonic() - began_s > 1


def test_new_lease_keeps_the_daemon_and_the_relay(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    assert stop(publish(host, box, port)) == 0
    before = daemon_and_relay(host)
    launcher = publish(host, box, port)
    assert daemon_and_relay(host) == before
    time.sleep(6)  # longer than an idle daemon stays
    assert daemon_and_relay(host) == before
    assert stop(launcher) == 0


@pytest.mark.parametrize("victims", ["relay", "daemon", "both"])
def test_killed_processes_are_replaced(fresh: tuple[Host, Container], ports: list[int], victims: str) -> None:
    host, box = fresh
    launchers = [publish(host, box, port) for port in ports[:3]]
    daemon, relay = daemon_and_relay(host)
    killed = {"relay": [relay], "daemon": [daemon], "both": [daemon, relay]}[victims]
    with connect(host, ports[0]) as client:
        exchange(client)
        kill(*killed)
        began_s = time.monotonic()
        if victims == "daemon":
            exchange(client)
        else:
            assert ends(client)
    wait_until(lambda: not {*killed} & {*processes(host)}, "the end of the killed processes", BRIEF_S)
    assert all(serves(host, port) for port in ports[:3]), "no client is refused, or waits long"
    assert time.monotonic() - began_s < BRIEF_S
    wait_until(lambda: are_replaced(host, *killed), "new processes", BRIEF_S)
    assert relay in processes(host) or victims != "daemon", "the relay outlives the daemon"
    assert [launcher.poll() for launcher in launchers] == [None] * 3
    assert [stop(launcher) for launcher in launchers] == [0] * 3


@pytest.mark.parametrize("victim", [0, 1], ids=["daemon", "relay"])
def test_port_never_refuses_while_processes_are_replaced(fresh: tuple[Host, Container], port: int, victim: int) -> None:
    host, box = fresh
    launcher = publish(host, box, port)
    for _ in range(3):
        daemon, relay, *_ = processes(host)
        killed = (daemon, relay)[victim]
        kill(killed)

        def is_replaced(killed: int = killed) -> bool:
            connect(host, port).close()  # ConnectionRefusedError if no process listens
            return are_replaced(host, killed)

        wait_until(is_replaced, "a new process", PATIENCE_S)
        assert serves(host, port)
    assert stop(launcher) == 0


def test_launcher_that_starts_while_the_daemon_ends(fresh: tuple[Host, Container], ports: list[int]) -> None:
    """It waits for the lock of the daemon that is ending, and starts the next one."""
    host, box = fresh
    for port in ports[:4]:
        launcher, status = start(host, *flags_for(box, port))
        assert status == b"0\n"
        daemon = next(processes(host))
        assert stop(launcher) == 0
        os.kill(daemon, signal.SIGTERM)
        launcher, status = start(host, *flags_for(box, port))
        assert status == b"0\n"
        assert serves(host, port)
        assert stop(launcher) == 0
    wait_until_clean(host)


def test_daemon_that_is_ended_is_started_again_for_its_leases(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    launcher = publish(host, box, port)
    daemon, relay = daemon_and_relay(host)
    with connect(host, port) as client:
        os.kill(daemon, signal.SIGTERM)
        wait_until(lambda: are_replaced(host, daemon), "a new daemon", PATIENCE_S)
        exchange(client)
    assert relay in processes(host)
    assert stop(launcher) == 0
    wait_until_clean(host)


def test_other_users_cannot_reach_the_sockets(host: Host, box: Container, port: int) -> None:
    launcher = publish(host, box, port)
    folder = runtime_folder(host)
    for path, mode in ((folder.parent, 0o755), (folder, runtime.FOLDER_MODE)):
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (mode, 0)
    for name in (runtime.LEASE_SOCKET, runtime.RELAY_SOCKET):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        with acting_as(NOBODY), pytest.raises(PermissionError):
            open_control(folder / name)
    assert stop(launcher) == 0


@pytest.mark.parametrize("name", [runtime.LEASE_SOCKET, runtime.RELAY_SOCKET])
def test_other_users_are_refused_whatever_the_modes(host: Host, box: Container, port: int, name: str) -> None:
    """Even if the folder and the socket's mode let them in: here they come by a descriptor."""
    launcher = publish(host, box, port)
    path = runtime_folder(host) / name
    path.chmod(0o777)
    door = os.open(path, os.O_PATH)
    with acting_as(NOBODY), open_control(f"/proc/self/fd/{door}") as stranger:
        assert stranger.recv(64) == b""
    os.close(door)
    with open_control(path) as owner:
        owner.send(b"nonsense")
        assert owner.recv(256) == b"error malformed message b'nonsense'"
        assert owner.recv(256) == b""
    path.chmod(0o600)
    assert serves(host, port)
    assert stop(launcher) == 0


def test_relay_has_no_privileges(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    launcher = publish(host, box, port, before=("prlimit", "--nofile=256:"))
    daemon, relay = daemon_and_relay(host)
    assert status_of(daemon)["Uid"].split() == ["0"] * 4
    status = status_of(relay)
    for ids in ("Uid", "Gid"):
        assert status[ids].split() == [str(NOBODY)] * 4
    assert status["Groups"] == ""
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[capabilities], 16) == 0, capabilities
    assert status["NoNewPrivs"] == "1"
    for pid in (daemon, relay):
        limit = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{pid}/limits").read_text())
        assert limit is not None
        assert int(limit[1]) == int(limit[2]) > 256
    assert stop(launcher) == 0
