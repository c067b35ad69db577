"""Sysctls, policies and lists that gangway changes are restored when their last user ends, whatever ends first."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from itertools import permutations
from subprocess import Popen
from typing import Any

import pytest

from gangway.host.reserved_ports import RESERVED
from gangway.reconcile.dataplane import TW_REUSE
from lab.gangwayd import Gangway
from lab.netns import Namespace
from lab.processes import pids_running, processes_in, suspend
from lab.waiting import wait_until
from tests.kernel import published
from tests.kernel.snapshot import Snapshot, make_tables, snapshot, wait_until_restored

pytestmark = pytest.mark.any_kernel

SWITCHES = "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.default.forwarding"
# Other programs' values, which a restored setting must have.
FOREIGN = {RESERVED: "1000,2000-2010", "net.ipv4.conf.all.accept_redirects": "0", TW_REUSE: "2"}


class Site:
    """A host with everything that changes settings: a network, a published range and a lease."""

    def __init__(self, host: Namespace, box: Namespace, gangway: Gangway) -> None:
        self._host = host
        self._box = box
        self._gangway = gangway
        self._launcher: Popen[Any] | None = None

    def set_up(self) -> None:
        """Create the network, publish the range, and take a lease."""
        self._gangway("network", "create", "web", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
        self._gangway("attach", self._box.name, "--network", "web")
        self._gangway("publish", self._box.name, "-p", "40000-40009:40000-40009")
        self._launcher, _ = published.publish(self._host, "tcp", "127.0.0.1", "172.17.0.2", 80)

    def end(self, what: str) -> None:
        """End a user of settings, or a process that may be needed to restore them."""
        match what:
            case "network":
                self._gangway("detach", self._box.name)
                self._gangway("network", "rm", "web")
            case "lease":
                assert self._launcher is not None
                self._launcher.kill()
                self._launcher.wait()
                self._launcher = None
                wait_until(lambda: not self._has_lease(), "the end of its lease")
                if not self._gangway.json("network", "ls"):  # the daemon restores it after that, if it is not killed
                    wait_until(lambda: self._host.sysctl(TW_REUSE) == FOREIGN[TW_REUSE], "the setting of before")
            case "daemon" | "relay":
                self._kill(f"gangway.{what}")

    def _kill(self, module: str) -> None:
        killed = pids_running(module, self._host)
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not {*killed} & {*pids_running(module, self._host)}, "their end")
        if self._launcher is not None:  # its lease is taken from the next daemon, and served by the next relay
            wait_until(self._has_lease, "its lease")

    def kill_all(self) -> None:
        """Kill daemon, relay and launcher at once."""
        pids = [pid for module in ("gangway.daemon", "gangway.relay") for pid in pids_running(module, self._host)]
        every = (*pids, *([self._launcher.pid] if self._launcher else ()))
        for pid in every:  # none may see another one's end
            suspend(pid)
        for pid in every:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not {*pids} & processes_in(self._host.path).keys(), "their end")

    def start(self) -> None:
        """Start a daemon."""
        self._gangway.start()

    def _has_lease(self) -> bool:
        return any(mapping["source"] == "lease" for mapping in self._gangway.json("ls"))


@pytest.fixture
def host() -> Iterator[Namespace]:
    with Namespace("host") as made:
        for name, value in FOREIGN.items():
            made.sysctl(name, value)
        make_tables(made)
        yield made


@pytest.fixture
def before(host: Namespace) -> Snapshot:
    return snapshot(host, iptables=True)


@pytest.fixture
def site(host: Namespace, before: Snapshot) -> Iterator[Site]:
    """With iptables, as it changes a policy, too."""
    with Namespace("box") as box, Gangway(host, "--firewall", "iptables") as gangway:
        made = Site(host, box, gangway)
        made.set_up()
        yield made


def _settings(host: Namespace) -> list[str]:
    """Return the values of the settings that gangway changes here."""
    policy = host.run("iptables", "-S", "FORWARD").stdout.splitlines()[0]
    return [*(host.sysctl(name) for name in (TW_REUSE, RESERVED, *SWITCHES)), policy]


@pytest.mark.parametrize("order", [*permutations(("network", "lease", "daemon", "relay"))], ids="-".join)
def test_settings_are_restored_in_every_order_of_ends(
    host: Namespace, before: Snapshot, site: Site, order: tuple[str, ...]
) -> None:
    assert _settings(host) == ["1", f"{FOREIGN[RESERVED]},40000-40009", "1", "1", "1", "-P FORWARD DROP"]
    for what in order:
        site.end(what)
    wait_until_restored(host, before, iptables=True)


def test_a_setting_is_restored_by_the_next_daemon_if_all_were_killed(
    host: Namespace, before: Snapshot, site: Site
) -> None:
    site.end("network")
    site.kill_all()
    assert host.sysctl(TW_REUSE) == "1"
    site.start()
    wait_until_restored(host, before, iptables=True)


def test_a_setting_that_another_program_has_changed_is_left_alone(host: Namespace, site: Site) -> None:
    host.sysctl(TW_REUSE, "0")
    host.sysctl(RESERVED, "1000,2000-2010,3000,40000-40009")
    site.end("lease")
    site.end("network")
    assert host.sysctl(TW_REUSE) == "0"
    assert host.sysctl(RESERVED) == "1000,2000-2010,3000"
