"""The number of map entries for each port: what the programs look at first.

It is an array map that is shared memory (BPF_F_MMAPABLE): rows of 65,536 bytes, one for each port.  Counting a range is
one slice assignment, however long the range is.
"""

import mmap
from collections.abc import Iterable

from gangway.ebpf.keys import Span

ROWS = 4
_PORTS = 65536
# A count that reaches 255 stays there until the next reset: the programs then look into the trie in vain.
_INCREMENTED = bytes([*range(1, 256), 255])
_DECREMENTED = bytes([0, *range(254), 255])


class PortCounts:
    """The counts in the map with this descriptor, which stays the caller's.  Not thread-safe."""

    def __init__(self, fd: int) -> None:
        self._table = mmap.mmap(fd, _PORTS * ROWS)

    def close(self) -> None:
        """Unmap the memory."""
        self._table.close()

    def add(self, spans: Iterable[Span]) -> None:
        """Count one entry more for the ports of each span."""
        _translate(self._table, spans, _INCREMENTED)

    def remove(self, spans: Iterable[Span]) -> None:
        """Count one entry less for the ports of each span."""
        _translate(self._table, spans, _DECREMENTED)

    def reset(self, spans: Iterable[Span]) -> None:
        """Count these spans and nothing else: another daemon may have died between an entry and its count."""
        counts = bytearray(_PORTS * ROWS)
        _translate(counts, spans, _INCREMENTED)
        self._table[:] = bytes(counts)


def _translate(table: mmap.mmap | bytearray, spans: Iterable[Span], change: bytes) -> None:
    for row, first, last in spans:
        start, end = row * _PORTS + first, row * _PORTS + last + 1
        table[start:end] = table[start:end].translate(change)
