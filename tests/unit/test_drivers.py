"""The choice of a driver, and the iptables driver on rules in memory: what is left by others, and after a failure."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from gangway.errors import Conflict, HostRefused
from gangway.facts import Firewall, HostFacts
from gangway.firewall.base import Driver
from gangway.firewall.choice import driver_for
from gangway.firewall.iptables import driver, timeouts
from gangway.firewall.iptables.driver import IptablesDriver
from gangway.firewall.nft.driver import NftDriver
from gangway.host.rule_notices import RuleNotices
from gangway.host.saved_settings import SavedSettings
from gangway.plan import Plan
from tests.unit.fake_host import FakeGuard, FakeStorage
from tests.unit.fake_iptables import Kernel, bare, restore, rules, save
from tests.unit.samples import mapping, planned, whole
from tests.unit.state_model import NEIGHBOURS

PREFIX = "GANGWAY"
OPEN = HostFacts(Firewall.IPTABLES)
CLOSED = HostFacts(Firewall.IPTABLES, forwarding=frozenset())
PLAN = whole(OPEN, mapping("0.0.0.0", "8000", "80"))
CLOSED_PLAN = whole(CLOSED, mapping("0.0.0.0", "8000", "80"))


class FakeTool:
    """iptables of one family; `refuses` counts the calls until one is refused, after it has written some tables."""

    is_legacy = False
    refuses = -1
    broken = False  # from then on, every call for that family is refused
    writes = 0

    def __init__(self, family: int) -> None:
        self.command = {4: "iptables", 6: "ip6tables"}[family]
        self.kernel, self.forward = HOST[family], POLICIES
        self.is_refused = False

    def apply(self, text: str) -> None:
        FakeTool.refuses -= 1
        self.is_refused = self.is_refused if FakeTool.broken else False
        if FakeTool.refuses == 0 or self.is_refused:
            tables = text.split("COMMIT\n")[:-1]
            for table in tables[: 0 if self.is_refused else FakeTool.writes]:
                restore(self.kernel, f"{table}COMMIT\n")
            self.is_refused = True
            raise HostRefused("iptables-restore: refused")
        restore(self.kernel, text)

    def listing(self, table: str | None = None) -> str:
        return save(self.kernel if table is None else {table: self.kernel[table]})

    def policy(self) -> str:
        return self.forward[self.command]

    def set_policy(self, policy: str) -> None:
        self.forward[self.command] = policy


class FakeLibrary:
    """libnftables that records what is applied."""

    def __init__(self) -> None:
        self.applied: list[str] = []

    def accepts(self, text: str) -> bool:
        return True

    def apply(self, text: str) -> None:
        self.applied.append(text)


HOST: dict[int, Kernel] = {}
POLICIES: dict[str, str] = {}


class Scene:
    """A host, a storage, and the log of what could not be restored."""

    def __init__(self) -> None:
        self.storage = FakeStorage()
        self.log: list[str] = []
        self.saved = SavedSettings(self.storage, self.log.append)
        self.library = FakeLibrary()
        self.notices, self.guard = RuleNotices(), FakeGuard()

    def driver(self, firewall: Firewall, prefix: str = PREFIX) -> Any:
        library: Any = self.library
        return driver_for(firewall, library, self.notices, self.guard, self.storage, self.saved, prefix)

    def is_bare(self) -> bool:
        is_open = POLICIES == {"iptables": "ACCEPT", "ip6tables": "ACCEPT"}
        return {4: bare(), 6: bare()} == HOST and is_open and not self.storage.texts


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    HOST.update({4: bare(), 6: bare()})
    POLICIES.update({"iptables": "ACCEPT", "ip6tables": "ACCEPT"})
    FakeTool.refuses, FakeTool.writes, FakeTool.broken = -1, 0, False
    monkeypatch.setattr(driver, "Iptables", FakeTool)
    monkeypatch.setattr(timeouts, "unavailable", lambda tools: "")
    for change in ("create", "delete"):
        monkeypatch.setattr(timeouts, change, lambda: None)
    found = Scene()
    yield found
    found.notices.close()


@pytest.mark.parametrize(
    ("rule", "policy", "set_later", "owned"),
    [
        ("", "ACCEPT", "", {4, 6}),
        ("", "DROP", "", {6}),
        ("", "DROP", "ACCEPT", {4, 6}),
        ("-A FORWARD -i docker0 -j ACCEPT", "ACCEPT", "", {6}),
    ],
)
@pytest.mark.parametrize("plan", [PLAN, CLOSED_PLAN], ids=["open", "closed"])
def test_forward_is_ours_without_rules_and_policy_of_others(
    scene: Scene, plan: Plan, rule: str, policy: str, set_later: str, owned: set[int]
) -> None:
    POLICIES["iptables"] = policy
    if rule:
        restore(HOST[4], f"*filter\n{rule}\nCOMMIT\n")
    iptables = scene.driver(Firewall.IPTABLES)
    iptables.rewrite(plan, None)
    if set_later:
        POLICIES["iptables"] = set_later
        iptables.rewrite(plan, None)  # as the next check does
    assert iptables.owned_forward_chains() == owned
    assert Driver(scene.notices, scene.guard).owned_forward_chains() == set()


@pytest.mark.parametrize("after", [Firewall.NFTABLES, Firewall.NONE])
def test_rules_of_iptables_are_removed_by_another_driver(scene: Scene, after: Firewall) -> None:
    first = scene.driver(Firewall.IPTABLES)
    assert isinstance(first, IptablesDriver)
    first.rewrite(CLOSED_PLAN, None)
    assert POLICIES == {"iptables": "DROP", "ip6tables": "DROP"}
    assert type(scene.driver(after)) is (NftDriver if after is Firewall.NFTABLES else Driver)
    assert scene.is_bare()
    assert scene.library.applied == []


@pytest.mark.parametrize("after", [Firewall.IPTABLES, Firewall.NONE])
def test_rules_of_nftables_are_removed_by_another_driver(scene: Scene, after: Firewall) -> None:
    scene.driver(Firewall.NFTABLES).rewrite(whole(HostFacts(Firewall.NFTABLES)), None)
    scene.driver(after)
    assert scene.library.applied[1:] == ["table inet gangway\ndelete table inet gangway\n"]
    scene.driver(after)
    assert len(scene.library.applied) == 2


def test_the_policy_stays_if_another_program_has_added_a_rule(scene: Scene) -> None:
    restore(HOST[4], "*filter\n-A FORWARD -i eth9 -j DROP\nCOMMIT\n")
    first = scene.driver(Firewall.IPTABLES)
    first.rewrite(CLOSED_PLAN, None)
    restore(HOST[4], "*filter\n-A FORWARD -i docker0 -j ACCEPT\nCOMMIT\n")
    first.remove()
    assert POLICIES == {"iptables": "DROP", "ip6tables": "ACCEPT"}
    (line,) = scene.log
    assert line.endswith("left at DROP: other programs have added rules to it: -A FORWARD -i docker0 -j ACCEPT")


@pytest.mark.parametrize("writes", [0, 1, 2, 4])
@pytest.mark.parametrize("refused", [1, 2])
@pytest.mark.parametrize("before", [None, PLAN])
def test_a_rewrite_that_fails_is_rolled_back(scene: Scene, before: Any, refused: int, writes: int) -> None:
    first = scene.driver(Firewall.IPTABLES)
    if before is not None:
        first.rewrite(before, None)
    host, policies = copy.deepcopy(HOST), dict(POLICIES)
    FakeTool.refuses, FakeTool.writes = refused, writes
    with pytest.raises(HostRefused):
        first.rewrite(CLOSED_PLAN, None)
    assert (host, policies) == (HOST, POLICIES)
    first.remove()
    assert scene.is_bare()


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("refused", [1, 2])
@pytest.mark.parametrize("prefix", ["GANGWAY", "DOCKER"])
def test_a_change_that_fails_is_undone(scene: Scene, prefix: str, refused: int, writes: int, broken: bool) -> None:
    """A tool may have written tables before it failed; one that goes on failing has not written any."""
    old = [planned(mapping("0.0.0.0", "8000", "80"), OPEN), planned(mapping("::", "8000", "80"), OPEN)]
    new = [planned(mapping("0.0.0.0", "9000", "80"), OPEN), planned(mapping("::", "9000", "80"), OPEN)]
    first = scene.driver(Firewall.IPTABLES, prefix)
    first.rewrite(whole(OPEN, *(one.mapping for one in old)), None)
    for removed, added in (((), new), (old, ()), (old, new)):
        host = copy.deepcopy(HOST)
        FakeTool.refuses, FakeTool.broken, FakeTool.writes = refused, broken, 0 if broken else writes
        with pytest.raises(HostRefused, match="refused"):
            first.change(removed, added)
        assert host == HOST
        FakeTool.broken = False
    first.change(old, new)
    first.change(new, ())
    first.remove()
    assert scene.is_bare()


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("refused", [1, 2])
def test_neighbours_are_added_and_removed_whole(scene: Scene, refused: int, writes: int) -> None:
    first = scene.driver(Firewall.IPTABLES)
    first.rewrite(PLAN, None)
    alone, joined = copy.deepcopy(HOST), replace(PLAN, further=frozenset(NEIGHBOURS))
    for removed, added, expected in (((), NEIGHBOURS, PLAN), (NEIGHBOURS, (), joined)):
        host = copy.deepcopy(HOST)
        FakeTool.refuses, FakeTool.writes = refused, writes
        with pytest.raises(HostRefused, match="refused"):
            first.change_further(removed, added)
        assert host == HOST
        assert first.has_rules_of(expected)
        first.change_further(removed, added)
    assert alone == HOST


def test_neighbours_are_remembered(scene: Scene) -> None:
    """A daemon that comes later finds their rules, which no chain of ours has."""
    first = scene.driver(Firewall.IPTABLES)
    first.rewrite(PLAN, None)
    first.change_further((), NEIGHBOURS)
    for family, subnet in ((4, "172.31.0.0/24"), (6, "fd31::/64")):
        assert any(subnet in rule for rule in rules(HOST[family], "nat", "POSTROUTING"))
    later = scene.driver(Firewall.IPTABLES)
    later.rewrite(PLAN, None)
    assert later.has_rules_of(PLAN)
    later.remove()
    assert scene.is_bare()


def test_rules_that_cannot_be_restored_are_found_by_the_next_check(scene: Scene) -> None:
    first = scene.driver(Firewall.IPTABLES)
    first.rewrite(PLAN, None)
    FakeTool.refuses, FakeTool.writes, FakeTool.broken = 1, 1, True
    with pytest.raises(HostRefused, match="could not be restored"):
        first.change((), [planned(mapping("0.0.0.0", "9000", "80"), OPEN)])
    assert any("--dport 9000" in rule for rule in rules(HOST[4], "nat", PREFIX))
    assert not first.is_intact(lambda: PLAN)
    FakeTool.broken = False
    first.rewrite(PLAN, None)
    assert not any("--dport 9000" in rule for rule in rules(HOST[4], "nat", PREFIX))
    assert first.is_intact(lambda: PLAN)


def test_a_change_is_remembered(scene: Scene) -> None:
    first = scene.driver(Firewall.IPTABLES, "DOCKER")
    first.rewrite(whole(OPEN), None)
    first.change((), [planned(mapping("0.0.0.0", "8000", "80"), OPEN)])
    assert len(rules(HOST[4], "nat", "POSTROUTING")) == 2
    scene.driver(Firewall.IPTABLES, "DOCKER").remove()
    assert scene.is_bare()


def test_another_programs_chain_of_the_same_name_is_refused(scene: Scene) -> None:
    restore(HOST[4], "*nat\n:DOCKER - [0:0]\nCOMMIT\n")
    with pytest.raises(Conflict, match="table nat has a chain DOCKER"):
        scene.driver(Firewall.IPTABLES, "DOCKER").rewrite(PLAN, None)
