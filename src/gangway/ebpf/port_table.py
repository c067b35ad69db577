"""A table of ports that programs in the kernel look at first: how many entries of a map have to do with each.

What this file knows: a map that is shared memory (BPF_F_MMAPABLE), of rows of 65,536 bytes.  What it must not know:
what a row is for.

A range is counted as a slice, however long it is.
"""

import mmap
from collections.abc import Iterable

ROWS = 4
_PORTS = 65536
# A count that is at its highest stays there until somebody takes over: who has to do with that port looks twice.
_MORE = bytes([*range(1, 256), 255])
_LESS = bytes([0, *range(254), 255])

Stretch = tuple[int, int, int]
"""A row, a first port, a last one."""


class PortTable:
    """The table behind a map's descriptor."""

    def __init__(self, fd: int) -> None:
        self._table = mmap.mmap(fd, _PORTS * ROWS)

    def close(self) -> None:
        """Lets go of the memory."""
        self._table.close()

    def add(self, stretches: Iterable[Stretch]) -> None:
        """One entry more for each of these ports."""
        _count(self._table, stretches, _MORE)

    def remove(self, stretches: Iterable[Stretch]) -> None:
        """One less."""
        _count(self._table, stretches, _LESS)

    def count_anew(self, stretches: Iterable[Stretch]) -> None:
        """These and no others: whoever was here before may have died between an entry and its count."""
        counts = bytearray(_PORTS * ROWS)
        _count(counts, stretches, _MORE)
        self._table[:] = bytes(counts)


def _count(table: mmap.mmap | bytearray, stretches: Iterable[Stretch], change: bytes) -> None:
    for row, first, last in stretches:
        start, end = row * _PORTS + first, row * _PORTS + last + 1
        table[start:end] = table[start:end].translate(change)
