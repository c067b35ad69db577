"""Drops root privileges for good.

Kernel facts:

* A process that changes from uid 0 to another loses its effective and permitted capabilities (capabilities(7)).  What
  is left is the bounding set, which is dropped while CAP_SETPCAP is still there, and set-user-ID programs, which
  no-new-privileges disarms.  A process that was not root keeps its user, and cannot gain privileges either.
"""

import ctypes
import os
import resource

# include/uapi/linux/prctl.h
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38

NOBODY = 65534  # the number of `nobody` on Debian, Fedora and Alpine: a minimal system may have no entry for the name


def drop_privileges() -> None:
    """Drop root and all capabilities for good.  OSError: the kernel refused."""
    if os.geteuid() == 0:
        capability = 0
        # EINVAL after the last capability of this kernel
        while _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
            _prctl(_PR_CAPBSET_DROP, capability)
            capability += 1
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def raise_descriptor_limit() -> None:
    """Raise the limit of open file descriptors to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
