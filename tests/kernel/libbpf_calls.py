"""libbpf, with calls that fail: what the kernel seldom does by itself."""

import ctypes
import errno
from collections.abc import Callable

import pytest

from gangway.ebpf import libbpf
from gangway.ebpf.keys import KEY_BYTES


class Calls:
    """The library; everything but what is said here goes to the real one."""

    def __init__(self, real: ctypes.CDLL) -> None:
        self._real = real
        self.rejects_programs = False
        self.failing_update: int | None = None
        """After so many updates of a trie, one fails."""
        self.before_update: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def bpf_object__load(self, opened: int) -> int:
        """Load programs, unless the kernel is to reject them."""
        if self.rejects_programs:
            ctypes.set_errno(errno.EINVAL)
            return -errno.EINVAL
        return int(self._real.bpf_object__load(opened))

    def bpf_map_update_elem(self, fd: int, key: bytes, value: bytes, flags: int) -> int:
        """Update an entry, unless this is the one that is to fail."""
        if len(key) == KEY_BYTES:
            self.before_update()
            if self.failing_update is not None:
                self.failing_update -= 1
                if self.failing_update < 0:
                    self.failing_update = None
                    return -errno.ENOSPC
        return int(self._real.bpf_map_update_elem(fd, key, value, flags))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The library that programs are loaded with during a test."""
    made = Calls(libbpf.library())
    monkeypatch.setattr(libbpf, "library", lambda: made)
    return made
