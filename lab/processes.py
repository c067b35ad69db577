"""gangway's processes in a network namespace, and what they weigh."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lab.netns import Namespace


def pids_running(module: str, namespace: Namespace) -> list[int]:
    """The pids of those that run a module (`python -m gangway.relay`) in a namespace."""
    inode = Path(namespace.path).stat().st_ino
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if module.encode() in words and (process / "ns/net").stat().st_ino == inode:
                found.append(int(process.name))
    return found


def pss_kib(pids: Iterable[int]) -> int:
    """Their memory in KiB: a process's own pages, and its part of those that it shares."""
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total
