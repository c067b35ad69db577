"""What this host is told to be able to do, and what follows from what it cannot."""

from dataclasses import replace

import pytest

from gangway.daemon.doctor import Check, checks
from gangway.ebpf import requirements as bpf_probe
from gangway.model import Protocol
from gangway.plan import Firewall, HostFacts
from gangway.reconcile.observe import Tools
from tests.unit.samples import NFTABLES, NO_CGROUPS, NO_REDIRECT, NO_STEERING


class NoIptables(Tools):
    """A host's that has nftables only."""

    def __init__(self) -> None:
        """Nothing is looked for."""

    def unusable(self, firewall: Firewall) -> str | None:
        return None if firewall is Firewall.NFTABLES else "there is no iptables"


@pytest.fixture(autouse=True)
def a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf_probe, "NEEDS", {"one thing": lambda: None, "another": lambda: "it has no other"})


def told(facts: HostFacts = NFTABLES, is_redirecting: bool = True, is_steering: bool = True) -> dict[str, Check]:
    found = list(checks(NoIptables(), facts, is_redirecting, is_steering))
    assert len({check.what for check in found}) == len(found)
    return {check.what: check for check in found}


def test_what_holds_needs_no_note() -> None:
    found = told()
    assert [what for what, check in found.items() if not check.holds] == ["firewall: iptables", "programs: another"]
    assert {check.note for check in found.values() if check.holds} == {"", "in use"}
    assert found["firewall: iptables"].note == "there is no iptables"
    assert found["programs: another"].note == "it has no other"


@pytest.mark.parametrize(
    ("what", "lacking", "follows"),
    [
        ("redirect: attached", NO_REDIRECT, "who asks a loopback address is relayed"),
        ("steering: attached", NO_STEERING, "each published port takes a socket"),
    ],
)
def test_what_the_kernel_lacks_comes_with_what_follows(what: str, lacking: HostFacts, follows: str) -> None:
    assert told(lacking)[what] == Check(what, False, f"{NO_CGROUPS}: {follows}")
    others = {name: check for name, check in told(lacking).items() if name != what}
    assert others == {name: check for name, check in told().items() if name != what}


@pytest.mark.parametrize(
    ("what", "is_redirecting", "is_steering"),
    [("redirect: attached", False, True), ("steering: attached", True, False)],
)
def test_what_somebody_has_detached_is_told(what: str, is_redirecting: bool, is_steering: bool) -> None:
    found = told(is_redirecting=is_redirecting, is_steering=is_steering)
    assert not found[what].holds
    assert found[what].note.startswith("somebody has detached it")
    assert [name for name, check in found.items() if check != told()[name]] == [what]


def test_why_there_is_none_comes_before_that_it_is_not_attached() -> None:
    assert told(NO_STEERING, is_steering=False)["steering: attached"] == told(NO_STEERING)["steering: attached"]


def test_protocols_that_the_kernel_has_no_sockets_of_are_told() -> None:
    found = told(replace(NFTABLES, missing_protocols=frozenset({Protocol.SCTP})))
    assert [found[f"relay: {protocol}"].holds for protocol in Protocol] == [True, True, False]


@pytest.mark.parametrize(
    ("facts", "holds", "note"),
    [
        (NFTABLES, True, ""),
        (replace(NFTABLES, forwarding=frozenset({6})), True, "net.ipv4.ip_forward is off, and is switched on"),
        (replace(NFTABLES, forwarding=frozenset(), may_forward=False), False, "net.ipv4.ip_forward is off"),
        (HostFacts(Firewall.NONE, forwarding=frozenset()), False, "net.ipv4.ip_forward is off"),
        (replace(NFTABLES, forward_droppers=((4, "ip theirs drop"),)), False, "ip theirs drop drops"),
    ],
)
def test_whether_a_family_is_forwarded_is_told(facts: HostFacts, holds: bool, note: str) -> None:
    check = told(facts)["forwarding: IPv4"]
    assert check.holds is holds
    assert check.note.startswith(note)
