"""Kernel settings of the calling thread's network namespace.

What this file knows: /proc/sys.  What it must not know: what a setting is for.
"""

from pathlib import Path

from gangway.errors import HostRefused

_ROOT = Path("/proc/sys")
_MOST_BYTES = 1 << 18  # a list is told to the first read only, as much as that has room for (proc_do_large_bitmap)


def interfaces(family: int) -> list[str]:
    """The names below net.ipv4.conf or net.ipv6.conf; `all` and `default` are not interfaces, and not among them."""
    names = sorted(path.name for path in (_ROOT / f"net/ipv{family}/conf").glob("*"))
    return [name for name in names if name not in ("all", "default")]


def read(name: str) -> str | None:
    """A setting's value; None if the kernel has no such setting."""
    try:
        with _path(name).open("rb", buffering=0) as setting:
            return setting.read(_MOST_BYTES).decode().strip()
    except OSError:
        return None


def write(name: str, value: str) -> None:
    """Sets it.  HostRefused: the kernel does not let us."""
    try:
        _path(name).write_text(f"{value}\n")  # an empty list is a write, too
    except OSError as error:
        raise HostRefused(f"{name} cannot be set to {value}: {error.strerror}; run as root") from None


def extend(name: str, value: str) -> None:
    """Adds to one that is a list of numbers: what is not written at its beginning (kernel/sysctl.c).  HostRefused: the
    kernel does not let us."""
    try:
        with _path(name).open("rb+", buffering=0) as setting:
            left = value.encode()
            while left:  # a page at a time
                setting.seek(1)
                left = left[setting.write(left) or len(left) :]
    except OSError as error:
        raise HostRefused(f"{value} cannot be added to {name}: {error.strerror}; run as root") from None


def _path(name: str) -> Path:
    """As sysctl(8) has it: with slashes where an interface's name may have dots."""
    return _ROOT.joinpath(*name.split("/" if "/" in name else "."))
