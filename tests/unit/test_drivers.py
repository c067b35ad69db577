"""The choice of a driver, and the iptables driver on rules in memory: what is left by others, and after a failure."""

import copy
from collections.abc import Collection
from typing import Any

import pytest

from gangway.errors import Conflict, HostRefused
from gangway.firewall.base import Driver
from gangway.firewall.choice import driver_for
from gangway.firewall.iptables import driver
from gangway.firewall.iptables.driver import IptablesDriver
from gangway.firewall.nft.driver import NftDriver
from gangway.host.saved_settings import SavedSettings
from gangway.plan import Firewall, HostFacts
from tests.unit.fake_host import FakeStorage
from tests.unit.fake_iptables import Kernel, bare, restore, rules, save
from tests.unit.samples import mapping, planned, whole

PREFIX = "GANGWAY"
OPEN = HostFacts(Firewall.IPTABLES)
CLOSED = HostFacts(Firewall.IPTABLES, forwarding=frozenset())
PLAN = whole(OPEN, mapping("0.0.0.0", "8000", "80"))
CLOSED_PLAN = whole(CLOSED, mapping("0.0.0.0", "8000", "80"))


class FakeTool:
    """iptables of one family; `refuses` counts the calls until one is refused."""

    refuses = -1

    def __init__(self, family: int) -> None:
        self.command = {4: "iptables", 6: "ip6tables"}[family]
        self.kernel, self.forward = HOST[family], POLICIES

    def apply(self, text: str) -> None:
        FakeTool.refuses -= 1
        if FakeTool.refuses == 0:
            raise HostRefused("iptables-restore: refused")
        restore(self.kernel, text)

    def listing(self, tables: Collection[str]) -> str:
        return save({name: self.kernel[name] for name in tables})

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

    def listing(self, _table: str) -> str:
        return ""


HOST: dict[int, Kernel] = {}
POLICIES: dict[str, str] = {}


class Scene:
    """A host, a storage, and the log of what could not be restored."""

    def __init__(self) -> None:
        self.storage = FakeStorage()
        self.log: list[str] = []
        self.saved = SavedSettings(self.storage, self.log.append)
        self.library = FakeLibrary()

    def driver(self, firewall: Firewall, prefix: str = PREFIX) -> Any:
        library: Any = self.library
        return driver_for(firewall, library, self.storage, self.saved, prefix)

    def is_bare(self) -> bool:
        is_open = POLICIES == {"iptables": "ACCEPT", "ip6tables": "ACCEPT"}
        return {4: bare(), 6: bare()} == HOST and is_open and not self.storage.texts


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    HOST.update({4: bare(), 6: bare()})
    POLICIES.update({"iptables": "ACCEPT", "ip6tables": "ACCEPT"})
    FakeTool.refuses = -1
    monkeypatch.setattr(driver, "Iptables", FakeTool)
    return Scene()


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


@pytest.mark.parametrize("refused", [1, 2])
@pytest.mark.parametrize("before", [None, PLAN])
def test_a_rewrite_that_fails_is_rolled_back(scene: Scene, before: Any, refused: int) -> None:
    first = scene.driver(Firewall.IPTABLES)
    if before is not None:
        first.rewrite(before, None)
    host, policies = copy.deepcopy(HOST), dict(POLICIES)
    FakeTool.refuses = refused
    with pytest.raises(HostRefused):
        first.rewrite(CLOSED_PLAN, before)
    assert (host, policies) == (HOST, POLICIES)
    first.remove()
    assert scene.is_bare()


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
