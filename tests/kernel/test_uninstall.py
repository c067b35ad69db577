"""`gangway down` leaves nothing, and `gangway uninstall-check` finds what is left, and says how to remove it."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace
from lab.processes import pids_running
from lab.waiting import wait_until
from tests.kernel.snapshot import Snapshot, make_tables, snapshot, wait_until_restored

pytestmark = pytest.mark.any_kernel

_FIREWALLS = ("nftables", "iptables")


@contextmanager
def _used(firewall: str) -> Iterator[tuple[Gangway, Snapshot]]:
    """A host whose daemon has published ports on every road, and its state before there was a daemon."""
    with Namespace("host") as host, Namespace("one") as one, Namespace("two") as two:
        make_tables(host)
        before = snapshot(host, iptables=True)
        with Gangway(host, "--firewall", firewall) as gangway:
            gangway("network", "create", "web", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
            gangway("attach", one.name, "--network", "web")
            gangway("attach", two.name)
            gangway("publish", one.name, "-p", "8080:80", "-p", "40000-40100:40000-40100/udp", "-p", "127.0.0.1:81:81")
            gangway("publish", two.name, "-p", "[::]:8081:80")
            yield gangway, before


def _left(host: Namespace) -> dict[str, str]:
    """Return what uninstall-check finds, with how to remove it; its exit code is checked, too."""
    done = host.run(str(GANGWAY), "uninstall-check", "--json", check=False)
    found = {one["what"]: one["removal"] for one in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (1 if found else 0, "")
    return found


def _assert_nothing_is_left(host: Namespace, before: Snapshot) -> None:
    assert _left(host) == {}
    assert host.run(str(GANGWAY), "uninstall-check").stdout == "nothing is left\n"
    wait_until_restored(host, before, iptables=True)


@pytest.mark.parametrize("firewall", _FIREWALLS)
def test_down_leaves_nothing(firewall: str) -> None:
    with _used(firewall) as (gangway, before):
        host, (relay,) = gangway.host, gangway.relays()
        found = _left(host)
        assert set(found.values()) == {"gangway down --yes"}
        for what in ("daemon (pid ", "relay (pid ", "interface gw-web", "setting net", "eBPF programs: ", "folder "):
            assert any(one.startswith(what) for one in found), (what, found)
        done = host.run(str(GANGWAY), "down", "--yes")
        for line in ("network web", "network gangway0", "container ", "103 published ports", f"relay (pid {relay})"):
            assert line in done.stdout
        assert gangway.daemon is not None
        assert gangway.daemon.wait(1) == 0
        assert gangway.relays() == []
        _assert_nothing_is_left(host, before)


@pytest.mark.parametrize("firewall", _FIREWALLS)
def test_what_a_killed_daemon_leaves_is_removed_by_the_commands_that_are_named(firewall: str) -> None:
    with _used(firewall) as (gangway, before):
        host = gangway.host
        gangway.kill()
        for pid in gangway.relays():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not gangway.relays(), "the relay's end")
        if firewall == "iptables":
            host.run("iptables", "-t", "raw", "-N", "GANGWAY-PROBE")
        found = _left(host)
        if firewall == "iptables":
            assert "conntrack: timeout policies gw-4, gw-6" in found
            assert "iptables -t raw: chain GANGWAY-PROBE, 0 rules" in found
        for command in found.values():
            host.run("sh", "-ec", command, env=os.environ | {"PATH": f"{GANGWAY.parent}:{os.environ['PATH']}"})
        _assert_nothing_is_left(host, before)


def test_down_without_a_daemon_starts_one_and_ends_it() -> None:
    with _used("nftables") as (gangway, before):
        gangway.kill()
        gangway.host.run(str(GANGWAY), "down", "--yes")
        assert not pids_running("gangway.daemon", gangway.host)
        _assert_nothing_is_left(gangway.host, before)


def test_down_removes_nothing_unasked() -> None:
    with Namespace("host") as host, Gangway(host, "--firewall", "none") as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        done = host.run(str(GANGWAY), "down", check=False, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stdout) == (2, "")
        assert "add --yes" in done.stderr
        for answer, said in (("n", "nothing was removed"), ("y", "Removed:")):
            done = host.run("script", "-qec", f"{GANGWAY} down", "/dev/null", input=f"{answer}\n")
            assert "network web\n" in done.stdout
            assert said in done.stdout
        assert _left(host) == {}


def test_declared_file_is_left_by_down_and_named() -> None:
    with Namespace("host") as host, Gangway(host, "--firewall", "none") as gangway:
        file = gangway.folder / "conf.d/web.toml"
        file.parent.mkdir()
        file.write_text('[[network]]\nname = "web"\nsubnets = ["172.30.0.0/24"]\n')
        gangway("daemon", "reload")
        named = {f"file {file}, which the next daemon reads": f"rm {file}"}
        assert _left(host).items() >= named.items()
        assert f"kept: {file}" in host.run(str(GANGWAY), "down", "--yes").stdout
        found = _left(host)
        assert found.items() >= named.items()
        for command in found.values():
            host.run("sh", "-ec", command)
        assert _left(host) == {}
