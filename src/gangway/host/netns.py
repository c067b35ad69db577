"""Network namespaces: which one a container's name stands for, and running code in it.

A namespace lives as long as a process is in it, or a mount or an open descriptor refers to it.  So no descriptor stays
open here, or the namespace of a container that has ended would live on.  It is recognized by its inode number on nsfs,
which no other namespace has while it lives (namespaces(7)), and where that number may have been used again, by its
cookie (SO_NETNS_COOKIE, Linux 5.14), which is unique until the next boot.
"""

import ctypes
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gangway import runtime
from gangway.errors import Conflict, HostRefused, InvalidRequest, Unsupported
from gangway.host import probe

OWN = "/proc/thread-self/ns/net"
"""The path of the calling thread's namespace."""
_FLAGS = os.O_RDONLY | os.O_CLOEXEC
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_OF_PROCESS = re.compile(r"/proc/[0-9]+/(task/[0-9]+/)?ns/net")
_NAMED = "/run/netns"  # where ip-netns(8) mounts them
_libc = ctypes.CDLL(None, use_errno=True)


def path_of(container: str) -> str:
    """Return the path of a container's namespace, given as `pid:PID`, a path, or a name of ip-netns(8)."""
    kind, colon, pid = container.partition(":")
    if colon and kind == "pid":
        if not re.fullmatch("[0-9]{1,9}", pid):
            raise InvalidRequest(f"invalid container {container!r}: {pid!r} is not a process id")
        return f"/proc/{pid}/ns/net"
    if "/" in container:
        return os.path.abspath(container)
    return f"{_NAMED}/{container}"


def inode_at(path: str) -> int:
    """Return the inode number of the namespace at `path`.  Conflict: there is none."""
    try:
        own, found = os.stat(OWN), os.stat(path)
    except PermissionError:
        raise HostRefused(f"cannot read the namespace {path}: permission denied; run as root") from None
    except OSError as error:
        raise Conflict(f"there is no network namespace {path}: {error.strerror}") from None
    if own.st_dev != found.st_dev:
        raise Conflict(f"{path} is not a network namespace")
    return found.st_ino


def exists(path: str) -> bool:
    """True if there is a network namespace at `path`, and it is not the calling thread's own."""
    try:
        own, found = os.stat(OWN), os.stat(path)
    except OSError:
        return False
    return own.st_dev == found.st_dev and own.st_ino != found.st_ino


def current_inode(path: str) -> int | None:
    """Return the inode number of whatever is at `path` now; None if nothing is."""
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def cookie_at(path: str) -> str:
    """Return what no other namespace than that at `path` ever has: boot and cookie; on older kernels the boot only.

    Conflict: there is none.
    """
    cookie = ""
    with entered(path), socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
        cookie = str(runtime.netns_cookie(sock))
    return f"{probe.boot_id()} {cookie}"


def is_of_process(path: str) -> bool:
    """True if a path names the namespace by a process, whose number may be another process's later."""
    return _OF_PROCESS.fullmatch(path) is not None


def process_identity(pid: int) -> str:
    """Return what no other process ever has: boot, pid and start time (proc_pid_stat(5)).  Conflict: it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # from the third one on
            state, start = fields[0], fields[19]  # in ticks since boot
    except (OSError, IndexError):
        state = start = ""
    if state in ("", "Z", "X"):  # a zombie has ended, though its parent has not noticed
        raise Conflict(f"there is no process {pid}")
    return f"{probe.boot_id()} {pid} {start}"


def has_process_ended(identity: str) -> bool:
    """True unless the process with this identity still runs."""
    with suppress(Conflict):
        return process_identity(int(identity.split()[1])) != identity
    return True


@contextmanager
def entered(path: str) -> Iterator[None]:
    """Run a block with the calling thread in the namespace at `path`; sockets made there stay in it."""
    own = os.open(OWN, _FLAGS)
    try:
        other = _open(path)
        try:
            _setns(other, path)
        finally:
            os.close(other)
        try:
            yield
        finally:
            _setns(own, "the thread's own namespace")
    finally:
        os.close(own)


def unshare() -> None:
    """Move the calling process to a new, empty namespace."""
    if _libc.unshare(_CLONE_NEWNET):
        error = ctypes.get_errno()
        raise Unsupported(f"cannot create a network namespace: {os.strerror(error)}; run as root")


def _open(path: str) -> int:
    try:
        return os.open(path, _FLAGS)
    except OSError as error:
        raise Conflict(f"there is no network namespace {path}: {error.strerror}") from None


def _setns(fd: int, name: str) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise HostRefused(f"cannot enter {name}: {os.strerror(error)}")
