"""Kernel settings of the calling thread's network namespace.

What this file knows: /proc/sys.  What it must not know: what a setting is for.
"""

from pathlib import Path

from gangway.errors import HostRefused

_ROOT = Path("/proc/sys")


def interfaces(family: int) -> list[str]:
    """The names below net.ipv4.conf or net.ipv6.conf; `all` and `default` are not interfaces, and not among them."""
    names = sorted(path.name for path in (_ROOT / f"net/ipv{family}/conf").glob("*"))
    return [name for name in names if name not in ("all", "default")]


def read(name: str) -> str | None:
    """A setting's value; None if the kernel has no such setting."""
    try:
        return _path(name).read_text().strip()
    except OSError:
        return None


def write(name: str, value: str) -> None:
    """Sets it.  HostRefused: the kernel does not let us."""
    try:
        _path(name).write_text(value)
    except OSError as error:
        raise HostRefused(f"{name} cannot be set to {value}: {error.strerror}; run as root") from None


def _path(name: str) -> Path:
    """As sysctl(8) has it: with slashes where an interface's name may have dots."""
    return _ROOT.joinpath(*name.split("/" if "/" in name else "."))
