"""The controller's conditions: what leads from one to the other, what is repaired, and what is logged."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from gangway.errors import HostRefused
from gangway.facts import Detour, Firewall, HostFacts
from gangway.host import sockets, sysctl
from gangway.host.reserved_ports import RESERVED
from gangway.plan import Plan
from gangway.reasons import Code, Reason
from gangway.reconcile.controller import Condition
from gangway.relay import protocol
from gangway.relay.protocol import Destination
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.unit.fake_daemon import Daemon, FakeObserver, listening
from tests.unit.samples import WEB, network

PORTS = ["127.0.0.1:8000:80/udp", "9000-9001:90-91"]
OTHER = network("other", "172.31.0.0/24")

pytestmark = pytest.mark.usefixtures("own_namespace")


@pytest.fixture
def daemon(tmp_path: Path, box: Namespace) -> Iterator[Daemon]:
    """A daemon with a network, and a container whose ports are published."""
    found = Daemon(tmp_path)
    found.requests.create_network(WEB)
    found.requests.attach(box.name, "web", ())
    found.requests.publish(box.name, PORTS)
    found.calls.names.clear()
    yield found
    found.end()


@pytest.fixture
def later(daemon: Daemon, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that has followed the first one."""
    found = Daemon(tmp_path, daemon)
    yield found
    found.close()


def condition(daemon: Daemon) -> Condition:
    return daemon.controller._condition


def end(box: Namespace, daemon: Daemon) -> None:
    """End a container; the kernel deletes its link a moment later."""
    box.close()
    wait_until(lambda: daemon.controller.is_dead(box.name), "the end of the container's link", 5.0)


def see(daemon: Daemon, facts: HostFacts) -> None:
    """Change the facts about the host."""
    daemon.observer.given = facts


# Conditions


def test_condition_is_unknown_before_the_first_request(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    assert condition(daemon) is Condition.UNKNOWN
    daemon.requests.create_network(WEB)
    assert condition(daemon) is Condition.APPLIED
    daemon.end()


def test_daemon_that_starts_compares_everything(later: Daemon) -> None:
    assert condition(later) is Condition.APPLIED
    assert later.calls.count("driver.rewrite") == 1
    assert later.calls.count("relay.serve") == 0  # the relay serves the ports already
    assert later.is_consistent()


def test_check_of_an_undisturbed_host_changes_nothing(daemon: Daemon) -> None:
    daemon.controller.check(thorough=True)
    changes = {"driver.rewrite", "driver.change", "relay.serve", "relay.remove", "redirect.add", "redirect.remove"}
    assert not changes & set(daemon.calls.names)
    assert condition(daemon) is Condition.APPLIED


def test_failed_rewrite_is_dirty_and_written_again(daemon: Daemon) -> None:
    daemon.change_rules()
    daemon.calls.fail("driver.rewrite")
    daemon.controller.check_rules()
    assert condition(daemon) is Condition.DIRTY
    daemon.calls.fail()
    daemon.driver.intact = True
    daemon.controller.check()
    assert condition(daemon) is Condition.APPLIED
    assert daemon.calls.count("driver.rewrite") == 2
    assert daemon.is_consistent()


def test_routes_that_change_while_rules_are_written_are_not_missed(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    detour = Detour("up0", 4, frozenset({ip_address("192.0.2.5")}), Reason(Code.SOURCE_ROUTED, "from 192.0.2.5/32"))
    write = daemon.driver.rewrite

    def rewrite(plan: Plan, before: Plan | None) -> None:
        write(plan, before)
        see(daemon, replace(daemon.controller.facts, detours=(detour,)))

    monkeypatch.setattr(daemon.driver, "rewrite", rewrite)
    daemon.change_rules()
    daemon.controller.check()
    assert condition(daemon) is Condition.DIRTY
    monkeypatch.undo()
    daemon.calls.names.clear()
    daemon.controller.check()
    assert daemon.calls.count("driver.rewrite") == 1
    assert condition(daemon) is Condition.APPLIED


def test_other_failure_is_retried_without_rewriting_rules(daemon: Daemon) -> None:
    daemon.redirect.targets.clear()
    daemon.change_rules()
    daemon.calls.fail("redirect.add")
    daemon.controller.check()
    assert condition(daemon) is Condition.RETRYING
    assert daemon.calls.count("driver.rewrite") == 1
    daemon.calls.fail()
    daemon.controller.check()
    assert condition(daemon) is Condition.APPLIED
    assert daemon.calls.count("driver.rewrite") == 1
    assert daemon.is_consistent()


def test_failure_is_logged_once(daemon: Daemon) -> None:
    daemon.calls.fail("redirect.set_own_addresses")
    for _ in range(3):
        daemon.controller.check(thorough=True)
    assert daemon.log == ["redirect.set_own_addresses failed"]
    assert [*daemon.controller.problems] == ["redirect.set_own_addresses failed"]
    daemon.calls.fail()
    daemon.controller.check()
    assert [*daemon.controller.problems] == []
    daemon.controller.check()
    daemon.calls.fail("redirect.set_own_addresses")
    daemon.controller.check()
    assert daemon.log == ["redirect.set_own_addresses failed"] * 2


def test_request_that_cannot_be_undone_is_repaired(daemon: Daemon, box: Namespace) -> None:
    daemon.calls.fail("driver.change", "steering.remove")
    with pytest.raises(ExceptionGroup, match="not all of what was done already could be undone"):
        daemon.requests.publish(box.name, ["7000:70"])
    assert condition(daemon) is Condition.DIRTY
    assert not daemon.is_consistent()
    daemon.calls.fail()
    daemon.controller.check()
    assert condition(daemon) is Condition.APPLIED
    assert daemon.is_consistent()


def test_request_repairs_first(daemon: Daemon, box: Namespace) -> None:
    daemon.change_rules()
    daemon.relay.kill()
    daemon.requests.publish(box.name, ["7000:70"])
    assert daemon.driver.intact
    assert daemon.is_consistent()


# What is repaired


def test_ports_of_a_relay_that_exited_are_served_again(daemon: Daemon) -> None:
    daemon.relay.kill()
    assert not sockets.bound_ports("udp")
    daemon.controller.check()
    assert sockets.bound_ports("udp") == {8000}
    assert daemon.is_consistent()


def test_replaced_relays_keep_the_ports_that_are_wanted(daemon: Daemon) -> None:
    """The new relay may have exited, and serve none at first."""
    wanted = set(daemon.relay.ports)
    daemon.relay.kill()
    daemon.controller.check()
    assert wanted
    assert daemon.relay.pruned[-1] == wanted


def test_relay_that_a_lease_has_started_gets_all_ports(daemon: Daemon) -> None:
    """The relay runs again when the controller looks, but it is another one."""
    daemon.relay.kill()
    daemon.leases.grant(protocol.Lease("tcp", Destination("172.17.0.2", 80)), listening("0.0.0.0", 7000), 0)
    assert daemon.relay.is_running()
    daemon.controller.check()
    assert daemon.is_consistent()
    assert len(daemon.relay.ports) == 4


def test_leases_are_not_touched(daemon: Daemon) -> None:
    daemon.leases.grant(protocol.Lease("tcp", Destination("172.17.0.2", 80)), listening("0.0.0.0", 7000), 0)
    served, redirected = dict(daemon.relay.ports), dict(daemon.redirect.targets)
    daemon.controller.reconcile()
    assert (daemon.relay.ports, daemon.redirect.targets) == (served, redirected)
    daemon.relay.kill()
    daemon.controller.check()
    assert daemon.redirect.targets == redirected


def test_deleted_link_is_created_again(daemon: Daemon, own_namespace: Namespace, box: Namespace) -> None:
    own_namespace.ip("link", "delete", WEB.bridge)
    daemon.controller.check()
    assert daemon.is_consistent()
    assert "172.30.0.2/24" in box.ip("-4", "-o", "address")


def test_reserved_ports_are_listed_again(daemon: Daemon, box: Namespace) -> None:
    sysctl.write("net.ipv4.ip_local_port_range", "5000 20000")
    daemon.requests.publish(box.name, ["9100:91"])
    assert sysctl.read(RESERVED) == "9100"
    sysctl.write(RESERVED, "1234")
    daemon.controller.check(thorough=True)
    assert sysctl.read(RESERVED) == "1234,9000-9001,9100"


def test_changed_facts_are_decided_anew(daemon: Daemon) -> None:
    see(daemon, replace(FakeObserver.given, forward_droppers=((4, "ip theirs forward"),)))
    daemon.controller.check()
    assert daemon.log == ["ip theirs forward drops forwarded traffic (IPv4): traffic that it carried is relayed"]
    assert daemon.calls.count("driver.rewrite") == 1
    assert daemon.driver.plan is not None
    assert daemon.driver.plan.facts == daemon.controller.facts == daemon.requests.facts
    see(daemon, replace(FakeObserver.given, firewall=Firewall.NONE))
    daemon.controller.check()
    assert daemon.log[1:] == ["switching to none: another program's chain drops forwarded traffic"]
    assert daemon.is_consistent()


def test_forwarding_that_was_disabled_is_enabled_again(daemon: Daemon) -> None:
    see(daemon, replace(FakeObserver.given, forwarding=frozenset({4})))
    daemon.controller.check(time.monotonic() - 2.0)
    text = "net.ipv6.conf.all.forwarding was switched off by another program: switched on again"
    assert len(daemon.log) == 1
    assert re.fullmatch(rf"{text} after [2-9]\.\d\d s", daemon.log[0])
    assert sysctl.read("net.ipv6.conf.all.forwarding") == "1"


def test_unavailable_port_does_not_prevent_the_others(daemon: Daemon) -> None:
    daemon.relay.kill()
    with sockets.bind_port("udp", "127.0.0.1", 8000):
        for _ in range(2):
            daemon.controller.check()
        assert condition(daemon) is Condition.RETRYING
        assert len(daemon.relay.ports) == 2  # the range, in both families
        assert {block.first for block in daemon.redirect.targets} == {9000}  # its clients are the other program's
        assert daemon.log == ["port 127.0.0.1:8000/udp is in use"]
    daemon.controller.check()
    assert condition(daemon) is Condition.APPLIED
    assert daemon.is_consistent()


def test_detached_program_is_attached_again_without_networks(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.controller.check(thorough=True)
    assert daemon.calls.names[:2] == ["steering.reattach", "redirect.reattach"]
    daemon.end()


# What is logged about repairs


def test_repair_is_logged_once_with_its_duration(daemon: Daemon, own_namespace: Namespace) -> None:
    own_namespace.ip("address", "flush", "dev", WEB.bridge)
    noticed_s = time.monotonic() - 2.0
    daemon.controller.check(noticed_s)
    daemon.controller.check(noticed_s)
    lost = "address 172.30.0.1/24, address fd30::1/64, route 172.30.0.0/24, route fd30::/64"
    assert len(daemon.log) == 1
    assert re.fullmatch(rf"bridge {WEB.bridge}: {lost} missing: restored after [2-9]\.\d\d s", daemon.log[0])


def test_repair_of_rules_is_logged(daemon: Daemon) -> None:
    daemon.change_rules()
    daemon.controller.check_rules(time.monotonic() - 2.0)
    text = "rules were changed or deleted by another program: written again"
    assert len(daemon.log) == 1
    assert re.fullmatch(rf"{text} after [2-9]\.\d\d s", daemon.log[0])


def test_restart_of_the_relay_is_logged_once_for_networks_and_leases(daemon: Daemon) -> None:
    lease = protocol.Lease("tcp", Destination("172.17.0.2", 80))
    daemon.leases.grant(lease, listening("0.0.0.0", 7000), 0)
    daemon.relay.kill()
    daemon.controller.check()
    assert daemon.log == []
    text = daemon.leases.restore()
    assert re.fullmatch(r"relay exited \(signal 9\): restarted, 4 ports served again after \d\.\d\d s", text)
    daemon.controller.check()
    assert (daemon.log, daemon.leases.restore()) == ([], "")


def test_failure_to_repair_is_logged_without_the_repair(daemon: Daemon) -> None:
    daemon.change_rules()
    daemon.calls.fail("driver.rewrite")
    daemon.controller.check()
    assert daemon.log == ["driver.rewrite failed"]


# Containers that have ended


def test_dead_container_is_reaped(daemon: Daemon, box: Namespace) -> None:
    assert not daemon.controller.reap_dead_containers()
    assert not daemon.controller.is_dead(box.name)
    end(box, daemon)
    daemon.controller.check()
    assert daemon.log == [f"container {box.name} exited: its ports are unpublished"]
    assert daemon.requests.endpoints() == ()
    assert daemon.relay.ports == {}
    assert daemon.is_consistent()


def test_dead_container_whose_ports_cannot_be_removed_is_reaped_later(daemon: Daemon, box: Namespace) -> None:
    end(box, daemon)
    daemon.calls.fail("relay.remove")
    daemon.controller.check()
    assert daemon.requests.endpoints() == ()
    assert daemon.relay.ports
    assert condition(daemon) in (Condition.DIRTY, Condition.RETRYING)
    daemon.calls.fail()
    daemon.controller.check()
    assert condition(daemon) is Condition.APPLIED
    assert daemon.is_consistent()


def test_network_on_demand_ends_with_its_last_container(tmp_path: Path, box: Namespace) -> None:
    daemon = Daemon(tmp_path)
    daemon.requests.attach(box.name, None, ())
    assert len(daemon.requests.networks()) == 1
    end(box, daemon)
    daemon.controller.check()
    assert daemon.requests.networks() == ()
    assert daemon.is_consistent()
    daemon.end()


def test_removing_repairs_what_is_not_there(daemon: Daemon, box: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that another program has deleted cannot be removed one by one."""
    calls = 0

    def change(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise HostRefused("there is no such element")

    monkeypatch.setattr(daemon.driver, "change", change)
    daemon.requests.unpublish(box.name)
    assert (calls, daemon.calls.count("driver.rewrite")) == (2, 1)
    assert daemon.relay.ports == {}
