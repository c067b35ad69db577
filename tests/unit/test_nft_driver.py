"""A change that takes several transactions is made as a whole, or not at all."""

from pathlib import Path
from typing import Any

import pytest

from gangway.errors import HostRefused
from gangway.firewall.nft.driver import NftDriver
from gangway.firewall.nft.render import MOST_ELEMENTS
from gangway.state.database import Database
from tests.unit.samples import mapping, planned

MOVED = planned(mapping("0.0.0.0", "1024-13023", "2024-14023"))


class Kernel:
    """Applies transactions to a set of elements; refuses the one with this number."""

    def __init__(self, refused: int) -> None:
        self.elements: set[str] = set()
        self._left = refused

    def accepts(self, text: str) -> bool:
        return True

    def apply(self, text: str) -> None:
        self._left -= 1
        if self._left == -1:
            raise HostRefused("nftables: no memory")
        for line in text.splitlines():
            verb, found = line.split(" ", 1)[0], set(line[line.index("{") + 1 : -1].strip().split(", "))
            self.elements = self.elements | found if verb == "add" else self.elements - found


@pytest.fixture
def store(tmp_path: Path) -> Database:
    return Database(tmp_path / "state")


@pytest.mark.parametrize("refused", range(3))
def test_a_change_is_undone_if_a_part_is_refused(store: Database, refused: int) -> None:
    nft: Any = Kernel(refused)
    with pytest.raises(HostRefused, match="no memory"):
        NftDriver(nft, store).change((), [MOVED])
    assert nft.elements == set()


def test_several_transactions_are_applied(store: Database) -> None:
    nft: Any = Kernel(refused=100)
    driver = NftDriver(nft, store)
    driver.change((), [MOVED])
    assert len(nft.elements) == 3 * MOST_ELEMENTS
    driver.change([MOVED], ())
    assert nft.elements == set()
