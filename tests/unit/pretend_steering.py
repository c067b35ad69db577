"""Steering without a kernel: its trie is a dict.  Its descriptors are some, as a relay is to hold them."""

import os
from collections.abc import Iterator, Sequence

from gangway.errors import HostRefused, Unsupported
from tests.unit.descriptors import identity
from tests.unit.pretend_redirect import looked_up


class Pretended:
    """As gangway.ebpf.steering's.  One that is given a `former`'s descriptors has its entries."""

    able = True
    """Whether this host can have one at all."""
    refused: bytes | None = None
    """A key that its trie does not take."""
    made: "list[Pretended]"
    """All of a test's."""

    def __init__(self, former: Sequence[int] = ()) -> None:
        if not Pretended.able:
            raise Unsupported("this kernel does not take the programs")
        self.trie: dict[bytes, bytes] = dict(Pretended.made[-1].trie) if former else {}
        self.shared: dict[tuple[str, int], int] = {}
        """What the sockets are, by protocol and family."""
        self.attached = True
        self.closed = False
        self.links = [os.memfd_create(f"link {number}") for number in range(3)]
        self.binding_fd, self.lent_fd = os.memfd_create("binding"), os.memfd_create("lent")
        Pretended.made.append(self)

    def share(self, protocol: str, family: int, fd: int) -> None:
        self.shared[protocol, family] = identity(fd)

    def set(self, key: bytes, value: bytes) -> None:
        if key == Pretended.refused:
            raise HostRefused("the map kept takes no more")
        self.trie[key] = value

    def erase(self, key: bytes) -> None:
        self.trie.pop(key, None)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.trie.items())

    def look_up(self, key: bytes) -> bytes | None:
        return looked_up(self.trie, key)

    def is_attached(self) -> bool:
        return self.attached

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        for fd in (*self.links, self.binding_fd, self.lent_fd):
            os.close(fd)
