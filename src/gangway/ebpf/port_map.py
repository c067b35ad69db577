"""The published ports of one program: a longest-prefix trie, and the number of its entries for each port.

A lookup by a block's own key finds that block or nothing, because the blocks of one protocol and address never overlap:
the port index prevents that before anything is published.

The programs look at the numbers first.  They are an array map that is shared memory (BPF_F_MMAPABLE): rows of 65,536
bytes, one for each port.  Counting a range is one slice assignment, however long the range is.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from gangway.ebpf.keys import KEY_BYTES, PortBlock, Span, pack_key, unpack_key
from gangway.ebpf.loader import LoadedObject
from gangway.errors import HostRefused

_PORTS = 65536
# A count that reaches 255 stays there until the next reset: the programs then look into the trie in vain.
_INCREMENTED = bytes([*range(1, 256), 255])
_DECREMENTED = bytes([0, *range(254), 255])


class PortCounts:
    """The counts in the map with this descriptor, which stays the caller's, and so many rows.  Not thread-safe."""

    def __init__(self, fd: int, rows: int) -> None:
        self._table = mmap.mmap(fd, _PORTS * rows)

    def close(self) -> None:
        self._table.close()

    def add(self, spans: Iterable[Span]) -> None:
        """Count one entry more for the ports of each span."""
        _translate(self._table, spans, _INCREMENTED)

    def remove(self, spans: Iterable[Span]) -> None:
        _translate(self._table, spans, _DECREMENTED)

    def reset(self, spans: Iterable[Span]) -> None:
        """Count these spans and nothing else: another daemon may have died between an entry and its count."""
        counts = bytearray(len(self._table))
        _translate(counts, spans, _INCREMENTED)
        self._table[:] = bytes(counts)


class PortMap:
    """A trie of an object's maps, with values of `value_bytes`; `spans` yields the ports that an entry counts for, in
    `rows` rows.

    It owns the object.  Not thread-safe.
    """

    def __init__(
        self,
        loaded: LoadedObject,
        name: str,
        value_bytes: int,
        rows: int,
        spans: Callable[[PortBlock, bytes], Iterable[Span]],
    ) -> None:
        self.loaded, self._name, self._value_bytes, self._spans = loaded, name, value_bytes, spans
        self._counts = PortCounts(loaded.map_fd("port_counts"), rows)
        self._counts.reset(span for entry in self.entries().items() for span in spans(*entry))

    def entries(self) -> dict[PortBlock, bytes]:
        found = self.loaded.entries(self._name, KEY_BYTES, self._value_bytes)
        return {unpack_key(key): value for key, value in found}

    def lookup(self, block: PortBlock) -> bytes | None:
        """Return the value of the block, or of the one that includes it; None if there is none."""
        return self.loaded.lookup(self._name, pack_key(block), self._value_bytes)

    def update(self, entries: Mapping[PortBlock, bytes]) -> None:
        """Add or change entries: all of them or none.  HostRefused: the kernel refused one."""
        former = {block: self.lookup(block) for block in entries}
        try:
            for block, value in entries.items():
                self._set(block, value)
        except HostRefused:
            for block, before in former.items():
                with suppress(HostRefused):
                    self.remove([block]) if before is None else self._set(block, before)
            raise

    def remove(self, blocks: Iterable[PortBlock]) -> None:
        for block in blocks:
            value = self.lookup(block)
            if value is not None and self.loaded.delete(self._name, pack_key(block)):
                self._counts.remove(self._spans(block, value))

    def close(self) -> None:
        self._counts.close()
        self.loaded.close()

    def _set(self, block: PortBlock, value: bytes) -> None:
        former = self.lookup(block)
        self.loaded.update(self._name, pack_key(block), value)
        added, removed = (() if one is None else tuple(self._spans(block, one)) for one in (value, former))
        if added != removed:
            self._counts.add(added)
            self._counts.remove(removed)


def _translate(table: mmap.mmap | bytearray, spans: Iterable[Span], change: bytes) -> None:
    for row, first, last in spans:
        start, end = row * _PORTS + first, row * _PORTS + last + 1
        table[start:end] = table[start:end].translate(change)
