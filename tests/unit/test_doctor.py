"""`gangway doctor`: what this host lacks, and the consequences."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from gangway.daemon.doctor import checks, docker_check
from gangway.daemon.messages import CheckAnswer
from gangway.docker.watcher import Watcher
from gangway.ebpf import requirements
from gangway.facts import Firewall, HostFacts
from gangway.firewall.base import Driver
from gangway.host import connected, conntrack, probe
from gangway.model import Protocol
from gangway.reconcile.changes import PASSES_INPUT
from gangway.reconcile.dataplane import DataPlane
from gangway.reconcile.observe import Tools
from tests.unit.fake_host import FakeGuard
from tests.unit.samples import NFTABLES, NO_CGROUPS


class NoIptables(Tools):
    """The tools of a host that has nftables only."""

    def unusable(self, firewall: Firewall) -> str | None:
        return None if firewall is Firewall.NFTABLES else "iptables is not installed"


class FakeProgram:
    """An eBPF program that is attached, unless a test says otherwise."""

    def __init__(self, unavailable: str = "", attached: bool = True) -> None:
        self.unavailable = unavailable
        self.attached = attached

    def is_attached(self) -> bool:
        return self.attached


ATTACHED, DETACHED = FakeProgram(), FakeProgram(attached=False)
UNAVAILABLE = FakeProgram(NO_CGROUPS, attached=False)


class FakeDataPlane:
    """The two programs."""

    def __init__(self, redirect: FakeProgram = ATTACHED, steering: FakeProgram = ATTACHED) -> None:
        self.redirect = redirect
        self.steering = steering


ALL_ATTACHED = FakeDataPlane()


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "NEEDS", {"one thing": lambda: None, "another": lambda: "there is no other"})
    monkeypatch.setattr(probe, "is_root", lambda: True)
    monkeypatch.setattr(conntrack, "unavailable", lambda: "")
    monkeypatch.setattr(connected, "unavailable", lambda: "")


def report(
    facts: HostFacts = NFTABLES,
    programs: FakeDataPlane = ALL_ATTACHED,
    leases: int = 0,
    no_timeouts: str = "",
    no_new_ports: str = "",
    unguarded: str = "",
) -> dict[str, CheckAnswer]:
    """Return the checks by their names."""
    dataplane = cast(DataPlane, programs)
    driver = cast(Driver, SimpleNamespace(no_timeouts=no_timeouts, no_new_ports=no_new_ports))
    found = list(checks(NoIptables(), facts, dataplane, FakeGuard(unguarded), leases, driver))
    assert len({check.check for check in found}) == len(found)
    return {check.check: check for check in found}


def test_connections_to_excluded_addresses_need_steering() -> None:
    check = "excluded addresses: connections are refused"
    assert check not in report()
    excluding = replace(NFTABLES, exclude=("192.0.2.5",))
    assert (report(excluding)[check].holds, "UDP clients wait" in report(excluding)[check].note) == (True, True)
    without = report(excluding, FakeDataPlane(steering=UNAVAILABLE))[check]
    assert (without.holds, f"clients wait at its socket: {NO_CGROUPS}" in without.note) == (False, True)


def changes(found: dict[str, CheckAnswer]) -> dict[str, CheckAnswer]:
    """Return the checks that differ from those of a host where all is well."""
    usual = report()
    assert found.keys() == usual.keys()
    return {what: check for what, check in found.items() if check != usual[what]}


def test_consequence_of_no_raw_sockets() -> None:
    (check,) = changes(report(replace(NFTABLES, no_raw="it is not permitted"))).values()
    assert check.note == "it is not permitted: UDP ports that dockerd holds are not relayed"


def test_consequence_of_a_missing_guard() -> None:
    (check,) = changes(report(unguarded="the kernel has none")).values()
    assert check.note == "the kernel has none: a flush of all rules by another program resets them"


def test_available_requirements_have_no_note() -> None:
    found = report()
    failed = {what: check.note for what, check in found.items() if not check.holds}
    assert failed == {"firewall: iptables": "iptables is not installed", "eBPF: another": "there is no other"}
    informs = f"published ports {PASSES_INPUT}"
    assert {check.note for check in found.values() if check.holds} == {"", "in use", "none", informs}


def test_without_root_only_launchers_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "is_root", lambda: False)
    assert report()["root"] == CheckAnswer("root", False, "not root: only docker-proxy's ports, all by relay")


@pytest.mark.parametrize(
    ("what", "programs", "consequence"),
    [
        ("redirect: attached", FakeDataPlane(redirect=UNAVAILABLE), "clients of loopback addresses are relayed"),
        (
            "steering: attached",
            FakeDataPlane(steering=UNAVAILABLE),
            "each published port takes a socket; ports that dockerd holds are not relayed",
        ),
    ],
)
def test_unavailable_program_is_reported_with_the_consequence(
    what: str, programs: FakeDataPlane, consequence: str
) -> None:
    assert changes(report(programs=programs)) == {what: CheckAnswer(what, False, f"{NO_CGROUPS}: {consequence}")}


@pytest.mark.parametrize(
    ("what", "programs"),
    [
        ("redirect: attached", FakeDataPlane(redirect=DETACHED)),
        ("steering: attached", FakeDataPlane(steering=DETACHED)),
    ],
)
def test_detached_program_is_reported(what: str, programs: FakeDataPlane) -> None:
    found = changes(report(programs=programs))
    assert list(found) == [what]
    assert not found[what].holds
    assert found[what].note.startswith("another program detached it: it is attached again within seconds")


def test_protocol_without_sockets_is_reported() -> None:
    found = report(replace(NFTABLES, missing_protocols=frozenset({Protocol.SCTP})))
    assert [found[f"relay: {protocol}"].holds for protocol in Protocol] == [True, True, False]


def test_leases_are_counted() -> None:
    what = "docker-proxy launchers"
    assert changes(report(leases=3)) == {what: CheckAnswer(what, True, "3 ports published by leases")}


@pytest.mark.parametrize(
    ("problem", "holds", "note"),
    [("", True, "dockerd: 1 network"), ("cannot be read", False, "cannot be read; dockerd: 1 network")],
)
def test_what_is_served_of_dockers_is_reported(problem: str, holds: bool, note: str) -> None:
    watcher = cast(Watcher, SimpleNamespace(problem=problem, summary="dockerd: 1 network"))
    assert docker_check(watcher, True) == CheckAnswer("Docker's networks and ports", holds, note)
    left = "left to Docker: [docker] enabled is false"
    assert docker_check(None, False) == CheckAnswer("Docker's networks and ports", True, left)
    assert docker_check(watcher, False) == CheckAnswer("Docker's networks and ports", holds, f"{left}; {note}")


@pytest.mark.parametrize(
    ("facts", "holds", "note"),
    [
        (NFTABLES, True, ""),
        (replace(NFTABLES, forwarding=frozenset({6})), True, "net.ipv4.ip_forward is off: it is switched on when"),
        (replace(NFTABLES, forwarding=frozenset(), may_forward=False), False, "net.ipv4.ip_forward is off"),
        (HostFacts(Firewall.NONE, forwarding=frozenset()), False, "net.ipv4.ip_forward is off"),
        (replace(NFTABLES, unforwardable=((4, "it is read-only"),)), False, "it is read-only: clients elsewhere are"),
        (replace(NFTABLES, forward_droppers=((4, "ip theirs drop"),)), False, "ip theirs drop drops"),
    ],
)
def test_forwarding_is_reported(facts: HostFacts, holds: bool, note: str) -> None:
    check = report(facts)["forwarding: IPv4"]
    assert check.holds is holds
    assert check.note.startswith(note)


def test_tracked_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report()["tracked connections"].holds
    monkeypatch.setattr(conntrack, "unavailable", lambda: "no access")
    expected = "no access: connections by nat survive unpublish; UDP clients keep their former road"
    assert report()["tracked connections"] == CheckAnswer("tracked connections", False, expected)


def test_redirected_connections_that_cannot_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connected, "unavailable", lambda: "no SOCK_DESTROY")
    expected = "no SOCK_DESTROY: a redirected connection may survive unpublish"
    assert report()["redirect: connections end"] == CheckAnswer("redirect: connections end", False, expected)


def test_conntracks_timeouts() -> None:
    found = changes(report(no_timeouts="no such module"))
    assert found == {
        "tracked connections: half-closed": CheckAnswer(
            "tracked connections: half-closed",
            False,
            "no such module: they end net.netfilter.nf_conntrack_tcp_timeout_close_wait seconds after one end has "
            "closed and the other is silent",
        )
    }


def test_answers_from_new_ports() -> None:
    name = "nat: UDP answers from new ports"
    note = "no maps: by nat a UDP server's answer from a new port (TFTP) may come from another address"
    assert changes(report(no_new_ports="no maps")) == {name: CheckAnswer(name, False, note)}
