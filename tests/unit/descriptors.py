"""This process's descriptors: what they are, and how many."""

import os
from contextlib import suppress


def identity(fd: int) -> int:
    """The same of two descriptors of one thing."""
    return os.fstat(fd).st_ino


def socket_count() -> int:
    """How many of them are sockets'."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it was that of the folder
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return count
