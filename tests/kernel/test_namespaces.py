"""Each network namespace has a daemon of its own, which commands find there without options."""

import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gangway import runtime
from lab.gangwayd import GANGWAY, Gangway, runtime_folder
from lab.netns import Namespace
from lab.processes import pids_running
from lab.waiting import wait_until
from tests.kernel.street import HOST4, Street

pytestmark = pytest.mark.any_kernel

_LINGER_S = 20
"""A daemon that was started by a command lingers for five seconds; a busy machine may take longer."""


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A host without a daemon; a test leaves nothing behind."""
    with Namespace("host") as made:
        folder = runtime_folder(made)
        yield made
        for pid in pids_running("gangway.daemon", made):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not pids_running("gangway.daemon", made), "the daemon's end")
        shutil.rmtree(folder, ignore_errors=True)


def _gangway(host: Namespace, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a namespace, without options that say where the daemon is."""
    clean = {name: value for name, value in os.environ.items() if name != "GANGWAY_SOCKET"}
    return host.run(str(GANGWAY), *words, check=False, env=clean | environment, timeout=30)


def test_daemons_of_two_namespaces_do_not_interfere() -> None:
    with Street() as one, Street() as other:
        assert one.gangway.socket != other.gangway.socket
        ports = [street.publish(street.server, "8080:80") for street in (one, other)]
        assert ports[0] == ports[1]
        for street in (one, other):
            listed = _gangway(street.host, "ls").stdout
            assert street.server.name in listed
            assert street.reaches(street.host, "tcp", "127.0.0.1", 8080)
            assert street.reaches(street.neighbour, "tcp", HOST4, 8080)
        one.gangway("unpublish", one.server.name)
        assert not one.reaches(one.neighbour, "tcp", HOST4, 8080)
        assert other.reaches(other.neighbour, "tcp", HOST4, 8080)


def test_a_command_finds_the_daemon_of_a_container_that_is_a_host_itself() -> None:
    with Street() as street, Gangway(street.server.space) as inner:
        inner("network", "create", "inner", "--subnet", "172.20.0.0/24")
        assert "inner" in _gangway(street.server.space, "network", "ls").stdout
        assert "inner" not in _gangway(street.host, "network", "ls").stdout


def test_a_second_daemon_in_a_namespace_is_refused(host: Namespace, tmp_path: Path) -> None:
    with Gangway(host) as gangway:
        assert gangway.daemon is not None
        for words in ((), ("--socket", str(tmp_path / "sock"))):
            done = _gangway(host, "daemon", *words)
            assert (done.returncode, done.stderr) == (
                1,
                f"gangway: a daemon (pid {gangway.daemon.pid}, socket {gangway.socket}) already manages this network "
                "namespace\n",
            )
        assert list(tmp_path.iterdir()) == []
        assert gangway.json("network", "ls") == []


def test_a_second_daemon_at_a_socket_is_refused(host: Namespace) -> None:
    with Namespace("other") as other, Gangway(host) as gangway:
        done = _gangway(other, "daemon", "--socket", str(gangway.socket))
        assert (done.returncode, done.stderr) == (
            1,
            f"gangway: another daemon listens on {gangway.socket}: choose another --socket\n",
        )
        assert gangway.json("network", "ls") == []
        shutil.rmtree(runtime_folder(other))


def test_commands_find_a_daemon_with_a_socket_elsewhere(host: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "gangway.sock"
    with Gangway(host, "--socket", str(path)) as gangway:
        assert stat.S_ISSOCK(path.lstat().st_mode)
        assert Path(os.readlink(gangway.socket)) == path
        done = _gangway(host, "network", "create", "web", "--subnet", "172.30.0.0/24")
        assert (done.returncode, done.stderr) == (0, "")
        gangway.kill()
        done = _gangway(host, "network", "rm", "web")  # starts a daemon as the last one was started
        assert "started a daemon" in done.stderr
        assert Path(os.readlink(gangway.socket)) == path
        for pid in pids_running("gangway.daemon", host):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not pids_running("gangway.daemon", host), "the daemon's end")
        assert not path.exists()
        assert not gangway.socket.is_symlink()


def test_the_next_daemon_takes_over_whatever_its_socket_is(host: Namespace, tmp_path: Path) -> None:
    """A daemon that was killed leaves its socket, and the link to it."""
    path = tmp_path / "gangway.sock"
    with Gangway(host) as gangway, Namespace("box") as box:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "127.0.0.1:8080:80")
        relays, listed = gangway.relays(), gangway.json("ls")
        for flags in (("--socket", str(path)), ("--firewall", "auto"), ("--socket", str(path))):
            gangway.kill()
            gangway.start(*flags)
            assert gangway.socket.is_symlink() == ("--socket" in flags)
            assert (gangway.relays(), gangway.json("ls")) == (relays, listed)


def test_a_stale_link_to_another_daemons_socket_is_replaced(host: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "gangway.sock"
    with ExitStack() as stack:
        gangway = stack.enter_context(Gangway(host, "--socket", str(path)))
        gangway.kill()
        other = stack.enter_context(Namespace("other"))
        stack.enter_context(Gangway(other, "--socket", str(path)))
        gangway.start("--firewall", "auto")
        wait_until(lambda: not gangway.socket.is_symlink(), "a socket of its own")
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        assert _gangway(other, "network", "ls", "--json").stdout == "[]\n"


def test_another_programs_socket_is_never_deleted(host: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "program.sock"
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as program:
            program.bind(str(path))
            before = path.lstat().st_ino
            for _ in range(2):
                for words in (("ls",), ("daemon",)):
                    done = _gangway(host, *words, GANGWAY_SOCKET=str(path))
                    assert done.returncode == 1
                    assert done.stderr.startswith(f"gangway: the socket {path} ") or "cannot be reached" in done.stderr
                    assert path.lstat().st_ino == before
        path.unlink()


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_in_the_sockets_place_is_never_deleted(host: Namespace, tmp_path: Path, is_link: bool) -> None:
    file = tmp_path / "notes"
    file.write_text("important")
    Path(f"{file}.relay").write_text("important, too")
    path = tmp_path / "link" if is_link else file
    if is_link:
        path.symlink_to(file)
    for words in (("ls",), ("network", "create", "web", "--subnet", "172.30.0.0/24"), ("daemon",)):
        done = _gangway(host, *words, GANGWAY_SOCKET=str(path))
        assert done.returncode == 2
        advice = "name another one with --socket or GANGWAY_SOCKET"
        assert done.stderr == f"gangway: {path} is a file, not a socket: {advice}\n"
    assert file.read_text() == "important"
    assert Path(f"{file}.relay").read_text() == "important, too"
    assert path.is_symlink() == is_link


def test_an_idle_daemon_that_a_command_started_ends_and_its_folder_is_removed(host: Namespace) -> None:
    folder = runtime_folder(host)
    done = _gangway(host, "network", "create", "web", "--subnet", "172.30.0.0/24")
    (pid,) = pids_running("gangway.daemon", host)
    assert done.stderr == f"gangway: started a daemon (pid {pid}), which listens on {folder}/gangway.sock\n"
    assert {path.name for path in folder.iterdir()} >= {runtime.API_SOCKET, runtime.LEASE_SOCKET, runtime.STATE}
    assert _gangway(host, "network", "rm", "web").stderr == ""
    wait_until(lambda: not pids_running("gangway.daemon", host), "the daemon's end", _LINGER_S)
    assert not folder.exists()


def test_the_runtime_folder_has_the_documented_modes(host: Namespace) -> None:
    with Gangway(host) as gangway, Namespace("box") as box:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "127.0.0.1:8080:80")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in gangway.folder.iterdir()}
        assert stat.S_IMODE(gangway.folder.stat().st_mode) == runtime.FOLDER_MODE
        assert modes == {
            runtime.API_SOCKET: 0o660,
            runtime.READ_SOCKET: 0o660,
            runtime.LEASE_SOCKET: 0o600,
            runtime.RELAY_SOCKET: 0o600,
            runtime.LOCK: 0o600,
            runtime.START: 0o600,
            runtime.STATE: 0o600,
            **{name: 0o600 for name in modes if name.startswith(f"{runtime.STATE}-")},
        }
