"""A change that takes several transactions is made as a whole, or not at all; what is there is compared by content."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gangway.errors import HostRefused
from gangway.firewall.nft import elements, kernel, render
from gangway.firewall.nft.driver import NftDriver
from gangway.firewall.nft.elements import Element
from gangway.firewall.nft.transaction import MOST_ELEMENTS
from gangway.host.rule_notices import RuleNotices
from gangway.state.database import Database
from tests.unit.fake_host import FakeGuard
from tests.unit.samples import NFTABLES, WEB, mapping, planned, whole
from tests.unit.state_model import NEIGHBOURS

MOVED = planned(mapping("0.0.0.0", "1024-13023", "2024-14023"))
PLAN = whole(NFTABLES, mapping("0.0.0.0", "80"), mapping("::", "1000-2000"), mapping("10.0.0.1", "81"))


class Kernel:
    """Applies transactions to elements by set; refuses the one with this number, if `is_late` after it was applied."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = {}
        self.refused = -1
        self.rules: tuple[bytes, ...] = (b"a chain", b"its rule")
        self.is_late = False

    def accepts(self, _text: str) -> bool:
        return True

    def apply(self, text: str) -> None:
        self.refused -= 1
        if self.refused == 0 and not self.is_late:
            raise HostRefused("nftables: no memory")
        if text.startswith("table"):
            self.found.clear()
        for line in text.splitlines():
            words = line.split(" ", 5)
            if words[1:2] == ["element"]:
                single = set(line[line.index("{") + 1 : -1].strip().split(", "))
                known = self.found.setdefault(words[4], set())
                assert not (single & known if words[0] == "add" else single - known)
                self.found[words[4]] = known | single if words[0] == "add" else known - single
        if self.refused == 0:
            raise HostRefused("nftables: no memory")

    def elements(self, _table: str, name: str) -> frozenset[Element]:
        found = self.found.get(name, ())
        if name in render.CHANGING_SETS:
            return frozenset(elements.pack(text, render.is_interval(name)) for text in found)
        return frozenset(Element(text.encode(), b"", b"") for text in found)

    def same(self) -> dict[str, set[str]]:
        return {name: set(found) for name, found in self.found.items() if found}


@pytest.fixture
def nft(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel()
    monkeypatch.setattr(kernel, "elements", found.elements)
    monkeypatch.setattr(kernel, "names", lambda _table: set())
    monkeypatch.setattr(kernel, "chains_and_rules", lambda _table: found.rules)
    return found


@pytest.fixture
def driver(nft: Kernel, tmp_path: Path) -> Iterator[NftDriver]:
    library: Any = nft
    notices = RuleNotices()
    found = NftDriver(library, notices, FakeGuard(), Database(tmp_path / "state"))
    found.rewrite(PLAN, None)
    yield found
    notices.close()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("refused", range(1, 4))
def test_a_change_is_undone_if_a_part_is_refused(driver: NftDriver, nft: Kernel, refused: int, is_late: bool) -> None:
    """Whether a transaction that was reported to have failed was carried out nevertheless, or not."""
    before, nft.refused, nft.is_late = nft.same(), refused, is_late
    with pytest.raises(HostRefused, match="no memory"):
        driver.change((), [MOVED])
    assert nft.same() == before
    assert driver.is_intact(lambda: PLAN)


@pytest.mark.parametrize("is_late", [False, True])
def test_neighbours_are_added_and_removed_whole(driver: NftDriver, nft: Kernel, is_late: bool) -> None:
    before, of_further = nft.same(), {"further4": {"172.31.0.0/24 . 172.30.0.2"}, "further6": {"fd31::/64 . fd30::2"}}
    joined = replace(PLAN, further=frozenset(NEIGHBOURS))
    nft.refused, nft.is_late = 1, is_late
    with pytest.raises(HostRefused, match="no memory"):
        driver.change_further((), NEIGHBOURS)
    assert (nft.same(), driver.has_rules_of(PLAN)) == (before, True)
    driver.change_further((), NEIGHBOURS)
    driver.change((), [MOVED])  # both are in what a failed change restores
    driver.change([MOVED], ())
    assert nft.same() == before | of_further
    assert (driver.has_rules_of(PLAN), driver.has_rules_of(joined)) == (False, True)
    nft.refused = 1
    with pytest.raises(HostRefused, match="no memory"):
        driver.change_further(NEIGHBOURS, ())
    assert (nft.same(), driver.has_rules_of(joined)) == (before | of_further, True)
    driver.change_further(NEIGHBOURS, ())
    assert nft.same() == before


def test_several_transactions_are_applied(driver: NftDriver, nft: Kernel) -> None:
    before = nft.same()
    driver.change((), [MOVED])
    assert len(nft.found["ports4"]) == 3 * MOST_ELEMENTS + 1
    driver.change([MOVED], ())
    assert nft.same() == before


@pytest.mark.parametrize(
    ("name", "element", "other"),
    [
        ("ports4", "tcp . 80 : 172.30.0.2 . 80", "tcp . 80 : 172.30.0.99 . 80"),
        ("ports4", "tcp . 80 : 172.30.0.2 . 80", "tcp . 81 : 172.30.0.2 . 80"),
        ("addresses4", "tcp . 10.0.0.1 . 81 : 172.30.0.2 . 81", "tcp . 10.0.0.1 . 81 : 172.30.0.2 . 82"),
        ("ranges6", "tcp . ::/0 . 1000-2000 : fd30::2", "tcp . ::/0 . 1000-2000 : fd30::3"),
        ("ranges6", "tcp . ::/0 . 1000-2000 : fd30::2", "tcp . ::/0 . 1000-1999 : fd30::2"),
        ("bridges", f'"{WEB.bridge}"', '"other"'),
        ("ports4", "", "udp . 53 : 172.30.0.2 . 53"),
        ("further4", "", "172.31.0.0/24 . 172.30.0.2"),
        ("ports4", "tcp . 80 : 172.30.0.2 . 80", ""),
    ],
)
def test_an_element_that_another_program_has_changed_is_found(
    driver: NftDriver, nft: Kernel, name: str, element: str, other: str
) -> None:
    assert driver.has_rules_of(PLAN)
    if element:
        nft.found[name].remove(element)
    if other:
        nft.found.setdefault(name, set()).add(other)
    assert not driver.has_rules_of(PLAN)


def test_a_rule_that_another_program_has_changed_is_found(driver: NftDriver, nft: Kernel) -> None:
    nft.rules = nft.rules[:1]
    assert not driver.has_rules_of(PLAN)


def test_rules_of_other_networks_are_found(driver: NftDriver) -> None:
    assert not driver.has_rules_of(replace(PLAN, networks=()))


def test_elements_are_unpacked() -> None:
    for text in ("172.30.0.2 . 80", "172.30.0.2", "fd30::2 . 80", "fd30::2"):
        assert elements.unpack_target(elements.pack(f"tcp . 80 : {text}", is_interval=False).target) == text
