"""The file descriptors of this process."""

import os
from contextlib import suppress


def identity(fd: int) -> int:
    """Return the inode number: two descriptors of one file or socket have the same."""
    return os.fstat(fd).st_ino


def socket_count() -> int:
    """Return the number of open sockets."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the directory itself
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return count
