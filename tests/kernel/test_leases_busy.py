"""Leases of many launchers, and leases while the daemon is busy with something else."""

import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gangway import runtime
from lab.gangwayd import GANGWAY, Gangway, runtime_folder
from lab.netns import Container, Host, Namespace
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S, SLOW_MACHINE
from tests.kernel.launcher import launchers
from tests.kernel.launcher.launchers import (
    Echo,
    daemon_and_relay,
    is_free,
    open_control,
    publish,
    serves,
    stop,
)
from tests.kernel.published import descriptors

pytestmark = pytest.mark.any_kernel  # processes, not the kernel, decide

MANY = 3_000
FIRST = 20_000
_MOMENT_S = 10.0 if SLOW_MACHINE else 1.0


@pytest.fixture
def scene() -> Iterator[tuple[Host, Container]]:
    with launchers.site() as made:
        yield made


# Many launchers


def lease(path: Path, host: Host, port: int, to: str) -> socket.socket:
    """Take a lease as a launcher does; return its connection.  The port's socket is the daemon's alone."""
    with host.entered():
        sock = socket.create_server(("0.0.0.0", port))
    connection = open_control(path)
    with sock:
        socket.send_fds(connection, [f"lease 1 tcp {to} {Echo.port}".encode()], [sock.fileno()])
        assert connection.recv(512) == b"ok"
    return connection


@contextmanager
def descriptor_limit(soft: int) -> Iterator[None]:
    """Raise this process's limit of descriptors within the block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def source_of_client(host: Host, port: int) -> str:
    """Return the source address of a client of 127.0.0.1: the bridge's if it is redirected, else 127.0.0.1."""
    with host.entered(), socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        return str(client.getsockname()[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_thousands_of_leases_under_a_low_soft_limit(scene: tuple[Host, Container]) -> None:
    host, box = scene
    limit = ("prlimit", "--nofile=1024:20000")
    assert stop(publish(host, box, FIRST - 1, before=limit)) == 0
    daemon, relay = daemon_and_relay(host)
    before = [len(descriptors(pid)) for pid in (daemon, relay)]
    path = runtime_folder(host) / runtime.LEASE_SOCKET
    ports = range(FIRST, FIRST + MANY)
    with descriptor_limit(MANY + 1000), ExitStack() as leases:
        for port in ports:
            leases.enter_context(lease(path, host, port, box.address4))
        assert [len(descriptors(pid)) - before[at] for at, pid in enumerate((daemon, relay))] == [2 * MANY, 2 * MANY]
        assert {source_of_client(host, port) for port in ports} == {host.gateway4}
        assert serves(host, ports[-1])
        listed = host.run(str(GANGWAY), "ls").stdout.splitlines()
        assert len([line for line in listed if " lease " in line and "redirect" in line]) == MANY
        os.kill(relay, 9)
        wait_until(lambda: serves(host, ports[-1]), "a new relay", 4 * PATIENCE_S)
    wait_until(lambda: all(is_free(host, port) for port in ports), "all ports to be free", 4 * PATIENCE_S)
    wait_until(lambda: len(descriptors(daemon)) < before[0] + 10, "the daemon to close all descriptors", PATIENCE_S)


# A daemon that is busy


class Tool:
    """A firewall tool that hangs while a flag is set, if its arguments match a pattern of the shell's; it is found
    before the real one."""

    def __init__(self, folder: Path, name: str, pattern: str = "*") -> None:
        self._flag = folder / "flag"
        self._hangs = folder / "hangs"
        self.path = f"{folder}:{os.environ['PATH']}"
        real = subprocess.run(["sh", "-c", f"command -v {name}"], text=True, capture_output=True, check=True).stdout
        (folder / name).write_text(
            f'#!/bin/sh\ncase "$*" in {pattern}) '
            f"while [ -e {self._flag} ]; do : > {self._hangs}; sleep 0.05; done;; esac\n"
            f'exec {real.strip()} "$@"\n'
        )
        (folder / name).chmod(0o755)

    @contextmanager
    def hanging(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Wait until the tool hangs, which a process has to wait for; let it go on at the end."""
        try:
            wait_until(self._hangs.exists, "the tool to hang", PATIENCE_S)
            yield
            assert process.poll() is None, "it hangs still"
        finally:
            self._flag.unlink()

    def hang(self) -> None:
        """Hang from the next call on."""
        self._flag.touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    return tmp_path / "tools"


def take_and_end_lease(host: Host, box: Container, port: int) -> None:
    """Check that a lease is granted and ended within a moment."""
    began_s = time.monotonic()
    launcher = publish(host, box, port)
    assert serves(host, port)
    assert stop(launcher) == 0
    assert time.monotonic() - began_s < _MOMENT_S
    assert is_free(host, port)


def test_leases_are_granted_while_rules_are_written(scene: tuple[Host, Container], folder: Path) -> None:
    host, box = scene
    tool = Tool(folder, "iptables-restore")
    with Gangway(host, "--firewall", "iptables", environment={"PATH": tool.path}) as gangway, Namespace("web") as web:
        gangway("attach", web.name)
        tool.hang()
        command = host.popen(str(GANGWAY), "publish", web.name, "-p", "8000:80", text=True)
        with tool.hanging(command):
            for port in range(FIRST, FIRST + 5):
                take_and_end_lease(host, box, port)
        assert command.wait(PATIENCE_S) == 0


def test_first_lease_is_granted_while_a_policy_is_changed(scene: tuple[Host, Container], folder: Path) -> None:
    """Both are recorded in the same place: the policy, and the setting that the relay needs."""
    host, box = scene
    tool = Tool(folder, "iptables", "*-P*")
    with Gangway(host, "--firewall", "iptables", environment={"PATH": tool.path}) as gangway:
        assert gangway("ls").splitlines()[1:] == []
        words = ("network", "create", "web", "--subnet", "172.31.0.0/24")
        tool.hang()
        command = host.popen(str(GANGWAY), *words, text=True, stdout=subprocess.DEVNULL)
        with tool.hanging(command):
            take_and_end_lease(host, box, FIRST)
        assert command.wait(PATIENCE_S) == 0
