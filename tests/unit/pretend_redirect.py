"""The redirect without a kernel: its trie is a dict."""

import struct
from collections.abc import Collection, Iterator, Sequence
from itertools import count

from gangway.ebpf.redirect_entries import without_count
from gangway.errors import HostRefused, Unsupported

NUMBERS = count(1_000_000)
"""Descriptors that nobody has open."""


def looked_up(trie: dict[bytes, bytes], key: bytes) -> bytes | None:
    """As BPF_MAP_TYPE_LPM_TRIE does it: of the entries whose first bits are the key's, the one with the most."""

    def prefix(of: bytes) -> str:
        (bits,) = struct.unpack_from("=I", of)
        return "".join(f"{byte:08b}" for byte in of[4:])[:bits]

    found = [one for one in trie if prefix(key).startswith(prefix(one))]
    return trie[max(found, key=lambda one: len(prefix(one)))] if found else None


class Pretended:
    """As gangway.ebpf.redirect's.  One that is given a `former`'s descriptors has its entries."""

    able = True
    """Whether this host can have one at all."""
    room = 100
    """How many entries its trie takes."""
    last: "Pretended"
    """That which was made last."""

    def __init__(self, host_too: bool = False, former: Sequence[int] = (), lent_fd: int | None = None) -> None:
        if not Pretended.able:
            raise Unsupported("this kernel does not take the programs")
        self.host_too = host_too
        self.lent_fd = lent_fd
        self.trie: dict[bytes, bytes] = dict(Pretended.last.trie) if former else {}
        self.own: list[frozenset[bytes]] = []
        self.attached = True
        self.closed = False
        self.links = [next(NUMBERS)]
        Pretended.last = self

    def enter(self, key: bytes, value: bytes) -> None:
        assert key not in self.trie
        if len(self.trie) == Pretended.room:
            raise HostRefused("the redirect's map backends takes no more")
        self.trie[key] = value

    def erase(self, key: bytes) -> None:
        self.trie.pop(key, None)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self.trie.items():
            yield key, without_count(value)

    def look_up(self, key: bytes) -> bytes | None:
        return looked_up(self.trie, key)

    def set_own_addresses(self, addresses: Collection[bytes]) -> None:
        self.own.append(frozenset(addresses))

    def is_attached(self) -> bool:
        return self.attached

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
