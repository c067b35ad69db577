"""The runtime folder: its modes, which process creates it, and who may use its sockets; daemons without root."""

import grp
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gangway import runtime
from lab.gangwayd import GANGWAY, runtime_folder
from lab.netns import Container, Host, end
from lab.processes import suspend
from lab.redirect import actual_peer
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S
from tests.kernel.launcher import launchers
from tests.kernel.launcher.conftest import with_settings
from tests.kernel.launcher.launchers import LINGER_S, connect, exchange, flags_for, is_free, publish, refused, stop
from tests.kernel.published import processes, status_of

pytestmark = pytest.mark.any_kernel

__all__ = ["with_settings"]  # a fixture

PORT = 8000
GROUP = "games"  # any group that every Debian has
STRANGER = 12345
MODES = {"gangway.sock": 0o660, "relay.sock": 0o600, "lease.sock": 0o600, "daemon.lock": 0o600}
MODES |= {"state.db": 0o600, "gangway-ro.sock": 0o660}


@pytest.fixture
def scene() -> Iterator[tuple[Host, Container]]:
    with launchers.site() as made:
        yield made


def as_user(user: int, group: int) -> tuple[str, ...]:
    """Return the words that run a command as another user."""
    return ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--")


# Modes


def with_own_run(prepare: str) -> tuple[str, ...]:
    """Return the words that run a command with another /run, after some preparations."""
    return ("unshare", "--mount", "--propagation", "slave", "sh", "-c", f'{prepare} && exec "$@"', "sh")


EMPTY = "mount -t tmpfs none /run"
PRIVATE = f"{EMPTY} && mkdir -m 0700 /run/gangway"
UMASKS = [f"{EMPTY} && umask 077", f"{EMPTY} && umask 0"]


@contextmanager
def operators_daemon(host: Host, *before: str) -> Iterator[subprocess.Popen[Any]]:
    """Start a daemon as an operator does."""
    process = host.popen(*before, str(GANGWAY), "daemon", stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _modes(host, process.pid).get("gangway.sock") == MODES["gangway.sock"], "it to serve")
        yield process
    finally:
        end(process)


def _modes(host: Host, pid: int) -> dict[str, int]:
    """Return the modes of what is in the runtime folder that a process sees, and of the folders."""
    folder = Path(f"/proc/{pid}/root{runtime_folder(host)}")
    try:
        paths = {"": folder.parent, ".": folder} | {path.name: path for path in folder.iterdir()}
        return {name: stat.S_IMODE(path.stat().st_mode) for name, path in paths.items()}
    except FileNotFoundError:
        return {}


def assert_modes(host: Host, pid: int) -> None:
    """Check the folders' modes, and those of all that is in them."""
    found = _modes(host, pid)
    assert (found.pop(""), found.pop(".")) == (runtime.BASE_MODE, runtime.FOLDER_MODE)
    assert {name: mode for name, mode in found.items() if not name.startswith("st")} == {
        name: mode for name, mode in MODES.items() if not name.startswith("st")
    }
    assert {mode for name, mode in found.items() if name.startswith("st")} == {0o600}


@pytest.mark.parametrize("prepare", [EMPTY, PRIVATE, *UMASKS], ids=["none", "0700", "umask 077", "umask 0"])
def test_modes_if_a_launcher_is_first(scene: tuple[Host, Container], prepare: str) -> None:
    host, box = scene
    launcher = publish(host, box, PORT, before=with_own_run(prepare))
    assert_modes(host, launcher.pid)
    within = ("nsenter", f"--mount=/proc/{launcher.pid}/ns/mnt", "--")
    daemon = next(processes(host))
    suspend(launcher.pid)  # it must not start another one
    os.kill(daemon, 9)
    wait_until(lambda: daemon not in processes(host), "the end of the daemon", PATIENCE_S)
    with operators_daemon(host, *within):
        assert_modes(host, launcher.pid)
        launcher.send_signal(18)
        assert stop(launcher) == 0


@pytest.mark.parametrize("prepare", [EMPTY, PRIVATE, *UMASKS], ids=["none", "0700", "umask 077", "umask 0"])
def test_modes_if_an_operators_daemon_is_first(scene: tuple[Host, Container], prepare: str) -> None:
    host, box = scene
    with operators_daemon(host, *with_own_run(prepare)) as daemon:
        launcher = publish(host, box, PORT, before=("nsenter", f"--mount=/proc/{daemon.pid}/ns/mnt", "--"))
        assert_modes(host, daemon.pid)
        assert stop(launcher) == 0


def test_folder_of_another_user_is_refused(scene: tuple[Host, Container]) -> None:
    host, box = scene
    prepare = f"{EMPTY} && mkdir /run/gangway && chown {STRANGER} /run/gangway"
    reason = refused(host, *flags_for(box, PORT), before=with_own_run(prepare))
    assert reason == "/run/gangway must belong to uid 0 and be writable by it alone"
    said = host.run(*with_own_run(prepare), str(GANGWAY), "daemon", check=False).stderr
    assert said == f"gangway: /run/gangway belongs to another user (uid {STRANGER}): remove it\n"


def test_no_socket_has_an_abstract_name(scene: tuple[Host, Container]) -> None:
    """Any user could bind such a name before gangway does."""
    host, box = scene
    publish(host, box, PORT)
    assert "@" not in host.run("cat", "/proc/net/unix").stdout


# Who may use the sockets


def test_group_may_use_the_api_and_nothing_else(
    scene: tuple[Host, Container], with_settings: Callable[..., tuple[str, ...]]
) -> None:
    host, box = scene
    publish(host, box, PORT, before=with_settings(f'group = "{GROUP}"'))
    group = grp.getgrnam(GROUP).gr_gid
    folder = runtime_folder(host)
    assert host.run(*as_user(STRANGER, group), str(GANGWAY), "ls").stdout.count(" lease ") == 1
    for command in ("check", "enable", "disable", "cleanup"):
        done = host.run(*as_user(STRANGER, group), str(GANGWAY), "docker", command, check=False)
        assert (done.returncode, done.stderr.count("only root may do this")) == (1, 1)
    for name in {*os.listdir(folder)} - {"gangway.sock"}:
        done = host.run(*as_user(STRANGER, group), "cat", str(folder / name), check=False)
        assert "Permission denied" in done.stderr, name
    done = host.run(*as_user(STRANGER, group), "touch", str(folder / "new"), check=False)
    assert "Permission denied" in done.stderr
    done = host.run(*as_user(STRANGER, STRANGER), "ls", str(folder), check=False)
    assert "Permission denied" in done.stderr


# Without root


class Rootless:
    """A user without privileges, with a runtime folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = ("env", f"XDG_RUNTIME_DIR={folder}", *as_user(STRANGER, STRANGER))

    def run(self, host: Host, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a gangway command."""
        return host.run(*self.before, str(GANGWAY), *words, check=False)


@pytest.fixture
def rootless() -> Iterator[Rootless]:
    folder = tempfile.mkdtemp()  # pytest's own folders are for root only
    os.chown(folder, STRANGER, STRANGER)
    yield Rootless(Path(folder))
    shutil.rmtree(folder)


def is_redirected(host: Host, port: int) -> bool:
    """True if a client is connected to another address than it requested."""
    with host.entered(), socket.create_connection(("127.0.0.1", port)) as client:
        return actual_peer(client) != ("127.0.0.1", port)


def test_without_root_everything_is_relayed(scene: tuple[Host, Container], rootless: Rootless) -> None:
    host, box = scene
    before = host.sysctl("net.ipv4.tcp_tw_reuse")
    launcher = publish(host, box, PORT, before=rootless.before)
    daemon, relay = processes(host)
    assert {status_of(pid)["Uid"] for pid in (daemon, relay)} == {"\t".join([str(STRANGER)] * 4)}
    with connect(host, PORT) as client:
        exchange(client)
        assert not is_redirected(host, PORT)
        assert host.sysctl("net.ipv4.tcp_tw_reuse") == before
        (row,) = rootless.run(host, "ls").stdout.splitlines()[1:]
        assert row.split()[3:] == ["lease", "relay"]
        said = rootless.run(host, "explain", f"127.0.0.1:{PORT}").stdout
        assert "sockets cannot be redirected: this process lacks CAP_NET_ADMIN and CAP_SYS_ADMIN" in said
        os.kill(daemon, 9)
        wait_until(lambda: len({*processes(host)} - {daemon}) == 2, "a new daemon", PATIENCE_S)
        wait_until(lambda: "lease" in rootless.run(host, "ls").stdout, "the lease from the new daemon", PATIENCE_S)
        exchange(client)
    assert stop(launcher) == 0
    assert is_free(host, PORT)
    wait_until(lambda: not any(processes(host)), "the end of the daemon and its relay", LINGER_S)
    assert list((rootless.folder / "gangway").iterdir()) == []


def test_doctor_says_what_is_missing_without_root(scene: tuple[Host, Container], rootless: Rootless) -> None:
    host, box = scene
    publish(host, box, PORT, before=rootless.before)
    done = rootless.run(host, "doctor")
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in done.stdout.splitlines()}
    assert lines["root"] == "root no not root: only docker-proxy's ports, all by relay"
    assert " no this process lacks CAP_NET_ADMIN" in lines["redirect: attached"]
    assert " no " in lines["firewall: nftables"]
    assert lines["docker-proxy launchers"].endswith("yes 1 port published by a lease")


@pytest.mark.parametrize(
    "words",
    [
        ("network", "create", "web", "--subnet", "172.31.0.0/24"),
        ("attach", "box"),
        ("publish", "box", "-p", "80:80"),
    ],
)
def test_networks_need_root(scene: tuple[Host, Container], rootless: Rootless, words: tuple[str, ...]) -> None:
    host, box = scene
    publish(host, box, PORT, before=rootless.before)
    done = rootless.run(host, *words)
    assert (done.returncode, done.stderr) == (
        1,
        "gangway: networks, containers and rules need root: without it, only docker-proxy's ports are served\n",
    )


def test_rootless_launcher_beside_roots_daemon(scene: tuple[Host, Container], rootless: Rootless) -> None:
    host, box = scene
    publish(host, box, PORT)
    launcher = publish(host, box, PORT + 1, before=rootless.before)
    assert not is_redirected(host, PORT + 1)
    assert str(PORT + 1) in rootless.run(host, "ls").stdout
    assert str(PORT) in host.run(str(GANGWAY), "ls").stdout
    assert stop(launcher) == 0


def test_launcher_needs_a_runtime_folder(scene: tuple[Host, Container]) -> None:
    host, box = scene
    before = ("env", "-u", "XDG_RUNTIME_DIR", *as_user(STRANGER, STRANGER))
    reason = refused(host, *flags_for(box, PORT), before=before)
    assert reason == "XDG_RUNTIME_DIR is not set: no place for the daemon's socket"
