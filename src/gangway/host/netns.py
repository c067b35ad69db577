"""Network namespaces: which one a container's name means, and being in it.

What this file knows: paths, inode numbers, setns(2).  What it must not know: what is done in there.

A namespace lives as long as a process is in it, or a mount or an open descriptor holds it; so no descriptor is kept
here, or a container that ended would never be gone.  What is remembered of it is its inode number on nsfs, which no
other namespace has while it lives (namespaces(7)).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from gangway.errors import Conflict, HostRefused, InvalidRequest, Unsupported

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_NAMED = "/run/netns"  # where ip-netns(8) mounts them
_libc = ctypes.CDLL(None, use_errno=True)


def path_of(container: str) -> str:
    """The path of a container's namespace: `pid:PID`, a path, or else a name of ip-netns(8)."""
    kind, colon, pid = container.partition(":")
    if colon and kind == "pid":
        if not pid.isdigit():
            raise InvalidRequest(f"{container!r}: {pid!r} is no process id")
        return f"/proc/{pid}/ns/net"
    if "/" in container:
        return os.path.abspath(container)
    return f"{_NAMED}/{container}"


def inode_of(path: str) -> int:
    """The number that a namespace is known by.  Conflict: there is none at `path`."""
    try:
        here, there = os.stat("/proc/thread-self/ns/net"), os.stat(path)
    except PermissionError:
        raise HostRefused(f"the namespace {path} may not be looked at: run as root") from None
    except OSError as error:
        raise Conflict(f"there is no network namespace {path}: {error.strerror}") from None
    if here.st_dev != there.st_dev:
        raise Conflict(f"{path} is not a network namespace")
    return there.st_ino


def is_there(path: str, inode: int) -> bool:
    """Whether `path` still leads to the namespace of that number."""
    try:
        return os.stat(path).st_ino == inode
    except OSError:
        return False


def is_another(path: str, inode: int) -> bool:
    """Whether `path` leads to a namespace that is not the one of that number."""
    try:
        return os.stat(path).st_ino != inode
    except OSError:
        return False


def own_inode() -> int:
    """The number of the calling thread's namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino


@contextmanager
def entered(path: str) -> Iterator[None]:
    """The calling thread is in the namespace for the time of the block; sockets made there stay there."""
    with open("/proc/thread-self/ns/net") as home, _open(path) as there:
        _setns(there.fileno(), path)
        try:
            yield
        finally:
            _setns(home.fileno(), "its own namespace")


def unshare() -> None:
    """The calling process gets a new, empty namespace."""
    if _libc.unshare(_CLONE_NEWNET):
        error = ctypes.get_errno()
        raise Unsupported(f"a network namespace cannot be made: {os.strerror(error)}; run as root")


def _open(path: str) -> TextIO:
    try:
        return open(path)
    except OSError as error:
        raise Conflict(f"there is no network namespace {path}: {error.strerror}") from None


def _setns(fd: int, name: str) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise HostRefused(f"{name} cannot be entered: {os.strerror(error)}")
