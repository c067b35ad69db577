"""What programs in the kernel need of it and of the host: one function for each, which says why it is not there.

What this file knows: where to look.  What it must not know: what is done without.

Each gives None if all is well, else a line for an operator.
"""

import ctypes
import mmap
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

LIBRARY = "libbpf.so.1"
_TYPES = "/sys/kernel/btf/vmlinux"
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h, since Linux 5.14
_HOSTS_CGROUPS = 0xEFFFFFFB  # include/linux/proc_ns.h: PROC_CGROUP_INIT_INO
# include/uapi/linux/capability.h
_NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def library() -> str | None:
    """libbpf, of any version 1."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return f"{LIBRARY} is not installed (Debian: libbpf1)"
    return None


def capabilities() -> str | None:
    """capabilities(7): CAP_SYS_ADMIN finds a map by its number, and includes CAP_BPF and CAP_PERFMON."""
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    missing = [name for name, bit in _NEEDED.items() if not effective >> bit & 1]
    return f"this process lacks {' and '.join(missing)}" if missing else None


def cgroups() -> str | None:
    """cgroup v2, and not a part of the hierarchy only: all of the host's processes have to be in it."""
    if not re.search(r"\tcgroup2$", Path("/proc/filesystems").read_text(), re.MULTILINE):
        return "this kernel has no cgroup v2"
    if os.stat("/proc/self/ns/cgroup").st_ino != _HOSTS_CGROUPS:
        return "this process is in a cgroup namespace of its own, and does not see the host's hierarchy"
    return None


def netns_cookie(sock: socket.socket) -> int:
    """The number that tells a socket's network namespace from all others.  OSError: there is none (before 5.14)."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def own_cookie() -> int:
    """That of the calling thread's namespace."""
    with socket.socket(socket.AF_UNIX) as sock:
        return netns_cookie(sock)


def cookies() -> str | None:
    """SO_NETNS_COOKIE."""
    try:
        own_cookie()
    except OSError:
        return "this kernel does not tell network namespaces apart by a cookie (Linux 5.14)"
    return None


def types() -> str | None:
    """BTF: where the fields of the kernel's own structures are."""
    if not Path(_TYPES).exists():
        return "this kernel does not describe its types (CONFIG_DEBUG_INFO_BTF), or /sys is not mounted"
    return None


def errors() -> str | None:
    """bpf_set_retval: a program that refuses a bind() can say why."""
    name = b"\0BPF_FUNC_set_retval\0"
    if types() is not None:
        return None  # so nobody can tell
    try:
        with open(_TYPES, "rb") as described, mmap.mmap(described.fileno(), 0, prot=mmap.PROT_READ) as text:
            found = text.find(name) >= 0
    except (OSError, ValueError):  # a kernel that does not let it be mapped
        found = name in Path(_TYPES).read_bytes()
    return None if found else "a program in this kernel cannot say that a port is taken (Linux 5.18)"


NEEDS: dict[str, Callable[[], str | None]] = {
    "libbpf": library,
    "capabilities": capabilities,
    "cgroup v2": cgroups,
    "namespace cookies": cookies,
    "kernel types": types,
}
"""What all programs need, by name."""
