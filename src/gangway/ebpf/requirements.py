"""What the programs need of the kernel and of the host: one probe for each assumption.

A probe returns None if the assumption holds, else why it does not, for an operator.
"""

import ctypes
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

from gangway.ebpf.libbpf import LIBRARY
from gangway.runtime import netns_cookie

_BTF = "/sys/kernel/btf/vmlinux"
_INITIAL_CGROUP_NAMESPACE = 0xEFFFFFFB  # include/linux/proc_ns.h: PROC_CGROUP_INIT_INO
# include/uapi/linux/capability.h
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def library() -> str | None:
    """libbpf, any version 1."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return f"{LIBRARY} is not installed (Debian: libbpf1)"
    return None


def capabilities() -> str | None:
    """CAP_NET_ADMIN, and CAP_SYS_ADMIN: it finds maps by ID, and includes CAP_BPF and CAP_PERFMON (capabilities(7))."""
    found = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    missing = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    return f"this process lacks {' and '.join(missing)}" if missing else None


def root_cgroup() -> str | None:
    """cgroup v2, seen from its root: the programs must run for all processes of the host."""
    if not re.search(r"\tcgroup2$", Path("/proc/filesystems").read_text(), re.MULTILINE):
        return "this kernel has no cgroup v2"
    if os.stat("/proc/self/ns/cgroup").st_ino != _INITIAL_CGROUP_NAMESPACE:
        return "this process is in a cgroup namespace of its own and cannot see the host's root cgroup"
    return None


def own_netns_cookie() -> int:
    """Return the cookie of the calling thread's network namespace.  OSError: the kernel has none."""
    with socket.socket(socket.AF_UNIX) as sock:
        return netns_cookie(sock)


def namespace_cookies() -> str | None:
    """SO_NETNS_COOKIE."""
    try:
        own_netns_cookie()
    except OSError:
        return "this kernel has no network namespace cookies (SO_NETNS_COOKIE, Linux 5.14)"
    return None


def kernel_types() -> str | None:
    """BTF of the kernel: where the fields of its structures are."""
    if not Path(_BTF).exists():
        return f"{_BTF} is missing: this kernel has no BTF (CONFIG_DEBUG_INFO_BTF), or /sys is not mounted"
    return None


def bind_errors() -> str | None:
    """bpf_set_retval: a program that refuses a bind() can choose the error.  Needed by steering only."""
    if kernel_types() is not None:
        return None  # unknown; loading fails anyway
    is_there = b"\0BPF_FUNC_set_retval\0" in Path(_BTF).read_bytes()
    return None if is_there else "this kernel has no bpf_set_retval (Linux 5.18)"


NEEDS: dict[str, Callable[[], str | None]] = {
    "libbpf": library,
    "capabilities": capabilities,
    "cgroup v2": root_cgroup,
    "namespace cookies": namespace_cookies,
    "kernel types": kernel_types,
}
"""The probes for what both programs need, by name."""
