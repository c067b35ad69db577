"""A change that takes several transactions: all of it, or none."""

from pathlib import Path
from typing import Any

import pytest

from gangway.errors import HostRefused
from gangway.firewall.base import NftDriver
from gangway.firewall.nft import render as nftables
from gangway.state.database import Database
from tests.unit.samples import mapping, planned

MOVED = planned(mapping("0.0.0.0", "1024-13023", "2024-14023"))


class Kernel:
    """Elements, as transactions add and delete them; the one with this number is refused."""

    def __init__(self, refused: int) -> None:
        self.elements: set[str] = set()
        self._left = refused

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
def test_what_was_done_of_a_change_is_undone_if_the_rest_is_refused(store: Database, refused: int) -> None:
    nft: Any = Kernel(refused)
    with pytest.raises(HostRefused, match="no memory"):
        NftDriver(nft, store).change((), [MOVED])
    assert nft.elements == set()


def test_a_change_of_several_transactions_comes_and_goes(store: Database) -> None:
    nft: Any = Kernel(refused=100)
    rules = NftDriver(nft, store)
    rules.change((), [MOVED])
    assert len(nft.elements) == 3 * nftables.MOST_ELEMENTS
    rules.change([MOVED], ())
    assert nft.elements == set()
