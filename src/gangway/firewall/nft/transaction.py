"""Changes of the table's sets and maps, and their text for nft(8)."""

from collections.abc import Iterator
from typing import NamedTuple

TABLE = "inet gangway"
"""The table that has all rules."""
MOST_ELEMENTS = 4000
"""The most elements in one transaction: libnftables needs some 2 KB for each while it works."""

Elements = dict[str, list[str]]
"""The elements of each set or map, by its name, in nft's language."""


class Transaction(NamedTuple):
    """Elements to delete from sets and maps of the table, and then elements to add."""

    deletes: Elements
    adds: Elements

    def text(self) -> str:
        """Return the statements for nft(8)."""
        return "".join((*_statements("delete", self.deletes), *_statements("add", self.adds)))

    def inverse(self) -> "Transaction":
        """Return the transaction that undoes this one."""
        return Transaction(deletes=self.adds, adds=self.deletes)

    def extended(self, deletes: Elements, adds: Elements) -> "Transaction":
        """Return the transaction that also deletes and adds elements of other sets and maps."""
        return Transaction(self.deletes | deletes, self.adds | adds)

    def split(self, limit: int = MOST_ELEMENTS) -> Iterator["Transaction"]:
        """Yield transactions of at most `limit` elements that do the same one after the other; mostly it is one.

        Between them some ports of a long range are not translated; the relay serves their clients.
        """
        single = [(verb, name, one) for verb in (0, 1) for name, found in self[verb].items() for one in found]
        for at in range(0, len(single), limit):
            part = Transaction({}, {})
            for verb, name, element in single[at : at + limit]:
                part[verb].setdefault(name, []).append(element)
            yield part


def _statements(verb: str, elements: Elements) -> Iterator[str]:
    for name, found in elements.items():
        for at in range(0, len(found), MOST_ELEMENTS):
            yield f"{verb} element {TABLE} {name} {{ {', '.join(found[at : at + MOST_ELEMENTS])} }}\n"
