"""A change that takes several transactions: all of it, or none."""

from pathlib import Path
from typing import Any

import pytest

from gangway.daemon.rules import NftRules
from gangway.daemon.store import Store
from gangway.errors import HostRefused
from gangway.firewall import nftables
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
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.mark.parametrize("refused", range(3))
def test_what_was_done_of_a_change_is_undone_if_the_rest_is_refused(store: Store, refused: int) -> None:
    nft: Any = Kernel(refused)
    with pytest.raises(HostRefused, match="no memory"):
        NftRules(nft, store).change((), [MOVED])
    assert nft.elements == set()


def test_a_change_of_several_transactions_comes_and_goes(store: Store) -> None:
    nft: Any = Kernel(refused=100)
    rules = NftRules(nft, store)
    rules.change((), [MOVED])
    assert len(nft.elements) == 3 * nftables.MOST_ELEMENTS
    rules.change([MOVED], ())
    assert nft.elements == set()
