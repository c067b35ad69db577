"""The published ports of one program: a longest-prefix trie and the counts that go with it.

A lookup by a block's own key finds that block or nothing, because the blocks of one protocol and address never overlap:
the port index sees to that before anything is published.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from gangway.ebpf.keys import KEY_BYTES, PortBlock, Span, pack_key, unpack_key
from gangway.ebpf.loader import LoadedObject
from gangway.ebpf.port_counts import PortCounts
from gangway.errors import HostRefused


class PortMap:
    """A trie of an object's maps, with values of `value_bytes`; `spans` yields the ports that an entry counts for.

    It owns the object.  Not thread-safe.
    """

    def __init__(
        self,
        loaded: LoadedObject,
        name: str,
        value_bytes: int,
        spans: Callable[[PortBlock, bytes], Iterable[Span]],
    ) -> None:
        self.loaded = loaded
        self._name = name
        self._value_bytes = value_bytes
        self._spans = spans
        self._counts = PortCounts(loaded.map_fd("port_counts"))
        self._counts.reset(span for entry in self.entries().items() for span in spans(*entry))

    def entries(self) -> dict[PortBlock, bytes]:
        """Return all entries, as the kernel has them."""
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
                if before is None:
                    self.remove((block,))
                else:
                    with suppress(HostRefused):
                        self._set(block, before)
            raise

    def remove(self, blocks: Iterable[PortBlock]) -> None:
        """Remove entries, as far as they exist."""
        for block in blocks:
            value = self.lookup(block)
            if value is not None and self.loaded.delete(self._name, pack_key(block)):
                self._counts.remove(self._spans(block, value))

    def close(self) -> None:
        """Close the object and its maps."""
        self._counts.close()
        self.loaded.close()

    def _set(self, block: PortBlock, value: bytes) -> None:
        former = self.lookup(block)
        self.loaded.update(self._name, pack_key(block), value)
        added = tuple(self._spans(block, value))
        removed = () if former is None else tuple(self._spans(block, former))
        if added != removed:
            self._counts.add(added)
            self._counts.remove(removed)
