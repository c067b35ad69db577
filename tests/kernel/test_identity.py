"""A container is its network namespace: not a name, an inode number or a pid that is used again."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gangway.host import netns
from gangway.reconcile.state import link_name
from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace, end, ip
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel

# A process in a network namespace of its own that starts another one there, and prints its pid.
_PAIR = ("unshare", "--net", "sh", "-c", "sleep 60 & echo $!; wait")


@pytest.fixture(scope="module")
def gangway() -> Iterator[Gangway]:
    """A daemon with a network."""
    with Namespace("host") as host, Gangway(host) as made:
        made("network", "create", "web", "--subnet", "172.30.0.0/24")
        yield made


def _published(gangway: Gangway) -> list[str]:
    return sorted({mapping["container"] for mapping in gangway.json("ls")})


def _start_with_pid(host: Namespace, pid: int, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Start a command whose pid is `pid`: the kernel gives the next free one after ns_last_pid."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = host.popen(*words)
        if process.pid == pid:
            return process
        end(process)
    raise AssertionError(f"no process got the pid {pid}")


def test_a_namespace_lives_when_its_processs_number_is_used_again(gangway: Gangway) -> None:
    host = gangway.host
    process = host.popen(*_PAIR, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    keeper, name = int(process.stdout.readline()), f"pid:{process.pid}"
    try:
        gangway("attach", name, "--network", "web")
        gangway("publish", name, "-p", "8080:80")
        end(process)
        stranger = _start_with_pid(host, process.pid, ("unshare", "--net", "sleep", "60"))
        own = os.stat(host.path).st_ino
        wait_until(lambda: os.stat(f"/proc/{stranger.pid}/ns/net").st_ino != own, "another namespace with that pid")
        host.ip("link", "add", "noise", "type", "bridge")  # the daemon is notified, and looks
        host.ip("link", "delete", "noise")
        assert link_name(name) in host.ip("link")
        assert _published(gangway) == [name]
        done = gangway.run("publish", name, "-p", "8081:80")  # this name is the stranger's now
        assert done.returncode == 1
        assert f"container {name} lives, but its process has ended" in done.stderr
        assert _published(gangway) == [name]
        end(stranger)
    finally:
        os.kill(keeper, 9)
    wait_until(lambda: not _published(gangway), "the namespace's end")


def test_a_new_namespace_with_the_old_name_inherits_nothing(gangway: Gangway) -> None:
    """It has the old inode number, too, if the kernel uses that again; a stopped daemon is not notified."""
    with Namespace("box") as box:
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "8080:80")
        gangway.stop()
        before = os.stat(box.path).st_ino
        for _ in range(20):
            link = link_name(box.name)
            ip("netns", "delete", box.name)
            wait_until(lambda link=link: link not in gangway.host.ip("link"), "the link's end")  # type: ignore[misc]
            ip("netns", "add", box.name)
            if os.stat(box.path).st_ino == before:
                break
        gangway.start()
        assert _published(gangway) == []
        assert "eth0" not in box.ip("link")


def test_a_deleted_link_of_a_namespace_that_lives_is_created_again(gangway: Gangway) -> None:
    with Namespace("box") as box:
        gangway("attach", box.name, "--network", "web")
        gangway("publish", box.name, "-p", "8080:80")
        gangway.host.ip("link", "delete", link_name(box.name))
        wait_until(lambda: "eth0" in box.ip("link"), "the link")
        assert _published(gangway) == [box.name]
        gangway("detach", box.name)


@contextmanager
def _run_in_background(gangway: Gangway) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Run a command by `gangway run` as the container `left`; yield the process and the pid of one that it leaves."""
    words = (str(GANGWAY), "run", "--network", "web", "--name", "left", "-p", "8080:80", "--", "sh", "-c")
    process = gangway.host.popen(*words, "sleep 60 & echo $!; wait", stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    sleeper = int(process.stdout.readline())
    try:
        yield process, sleeper
    finally:
        os.kill(sleeper, 9)
        process.wait()


def test_what_a_killed_gangway_run_leaves_running_is_unpublished(gangway: Gangway) -> None:
    with _run_in_background(gangway) as (process, sleeper):
        assert _published(gangway) == ["left"]
        process.kill()
        wait_until(lambda: not _published(gangway), "the end of the publication", 5)
        assert Path(f"/proc/{sleeper}").exists()


def test_an_owner_that_ended_while_no_daemon_ran_is_noticed(gangway: Gangway) -> None:
    with _run_in_background(gangway) as (process, _):
        gangway.kill()
        process.kill()
        process.wait()
        gangway.start()
        assert _published(gangway) == []


def test_cookies_tell_namespaces_apart() -> None:
    with Namespace("one") as one, Namespace("two") as two:
        cookies = [netns.cookie_at(space.path) for space in (one, two, one)]
    assert cookies[0] == cookies[2] != cookies[1]


def test_a_process_is_known_by_its_start() -> None:
    process = subprocess.Popen(["sleep", "60"])
    identity = netns.process_identity(process.pid)
    assert not netns.has_process_ended(identity)
    boot, pid, start = identity.split()
    assert netns.has_process_ended(f"{boot} {pid} {int(start) + 1}")
    end(process)
    assert netns.has_process_ended(identity)
