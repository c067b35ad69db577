"""The root of the cgroup v2 hierarchy: a program attached there runs for the sockets of every process.

It is used where it is mounted; if it is not mounted, it is mounted for this process alone (fsmount(2)).
"""

import ctypes
import os
import re
from contextlib import suppress
from ctypes import c_char_p, c_long
from pathlib import Path

from gangway.ebpf.libbpf import reason
from gangway.errors import Unsupported

# include/uapi/asm-generic/unistd.h: the same on all architectures
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC, _CMD_CREATE = 1, 6  # include/uapi/linux/mount.h: FSOPEN_, FSMOUNT_ and FSCONFIG_
_MOUNTED = re.compile(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", re.MULTILINE)  # proc_pid_mountinfo(5)


def open_root() -> int:
    """Return a descriptor of the root, the caller's to close.  Unsupported: it cannot be mounted."""
    for path in _MOUNTED.findall(Path("/proc/self/mountinfo").read_text()):
        with suppress(OSError):
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if os.access("cgroup.subtree_control", os.F_OK, dir_fd=root):
                return root
            os.close(root)  # another file system is mounted over it
    return _mount_privately()


def _mount_privately() -> int:
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = c_long
    context = syscall(c_long(_FSOPEN), c_char_p(b"cgroup2"), c_long(_CLOEXEC))
    if context >= 0:
        try:
            if syscall(c_long(_FSCONFIG), c_long(context), c_long(_CMD_CREATE), None, None, c_long(0)) == 0:
                root = syscall(c_long(_FSMOUNT), c_long(context), c_long(_CLOEXEC), c_long(0))
                if root >= 0:
                    return int(root)
        finally:
            os.close(context)
    raise Unsupported(f"cgroup v2 is not mounted and cannot be mounted: {reason()}")
