"""The processes in a namespace, how much memory processes use, and how to stop one for a while."""

import os
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lab.netns import Namespace
from lab.waiting import wait_until


def processes_in(namespace: str | int, kind: str = "net") -> dict[int, list[str]]:
    """Return the command lines of the processes in a namespace, by pid, in ascending order.

    `namespace` is the path of the namespace or a descriptor of it, `kind` its name in /proc/PID/ns. A process that is
    exiting may have an empty command line; zombies are in no namespace.
    """
    wanted = os.stat(namespace)
    found = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with suppress(OSError):  # the process has exited meanwhile
            if os.path.samestat(os.stat(f"/proc/{pid}/ns/{kind}"), wanted):
                found[pid] = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
    return found


def pids_running(module: str, namespace: Namespace) -> list[int]:
    """Return the pids of the processes in a network namespace that run a Python module (`python3 -m MODULE`)."""
    return [pid for pid, words in processes_in(namespace.path).items() if module in words]


def pss_kib(pids: Iterable[int]) -> int:
    """Return the proportional set size (PSS) of some processes in KiB.

    It counts a process's own pages, and of each page that it shares its share.
    """
    total = 0
    for pid in pids:
        with suppress(OSError):  # the process has exited meanwhile
            found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total


def suspend(pid: int) -> None:
    """Send SIGSTOP to a process, and wait until all of its threads have stopped: each runs until it sees it."""
    os.kill(pid, signal.SIGSTOP)
    stats = list(Path(f"/proc/{pid}/task").glob("*/stat"))
    wait_until(lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats), "it to stop")
