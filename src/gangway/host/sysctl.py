"""Kernel settings of the calling thread's network namespace: /proc/sys."""

import errno
import os
from pathlib import Path

from gangway.errors import HostRefused

_ROOT = Path("/proc/sys")
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_LIST_BYTES = 1 << 18  # only the first read returns a list, as much of it as fits (proc_do_large_bitmap)


class ReadOnly(HostRefused):
    """Settings cannot be written at all, as in many containers."""


def interfaces(family: int) -> list[str]:
    """Return `default` and the interfaces that have settings below net.ipv4.conf or net.ipv6.conf."""
    return sorted({path.name for path in (_ROOT / f"net/ipv{family}/conf").glob("*")} - {"all"})


def read(name: str) -> str | None:
    """Return a setting's value; None if the kernel has no such setting."""
    try:
        with path(name).open("rb", buffering=0) as setting:
            return setting.read(_LIST_BYTES).decode().strip()
    except OSError:
        return None


def unwritable(name: str) -> str:
    """Return why a setting cannot be written; empty if it can, or if the kernel has none.  Nothing is changed."""
    try:
        os.close(os.open(path(name), os.O_WRONLY))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write(name: str, value: str) -> None:
    """Set a value.  HostRefused: the kernel does not allow it."""
    try:
        path(name).write_text(f"{value}\n")  # with the newline an empty list is written, too
    except OSError as error:
        raise _refused(f"{name} cannot be set to {value}", error) from None


def extend(name: str, value: str) -> None:
    """Add to a list of numbers.  HostRefused: the kernel does not allow it.

    What is written at another position than 0 is added to the list (kernel/sysctl.c, proc_do_large_bitmap).
    """
    try:
        with path(name).open("rb+", buffering=0) as setting:
            left = value.encode()
            while left:  # the kernel reads one page at a time
                setting.seek(1)
                left = left[setting.write(left) or len(left) :]
    except OSError as error:
        raise _refused(f"{value} cannot be added to {name}", error) from None


def _refused(what: str, error: OSError) -> HostRefused:
    advice = "; run as root" if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() else ""
    kind = ReadOnly if error.errno in _READ_ONLY else HostRefused
    return kind(f"{what}: {error.strerror}{advice}")


def path(name: str) -> Path:
    """Return the file of a setting; names are spelled as in sysctl(8): with slashes if an interface's has dots."""
    return _ROOT.joinpath(*name.split("/" if "/" in name else "."))
