"""What the demos have in common: tables, one line for a failure, and the proof that nothing stays behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import echo_server


def run(show: Callable[[], None]) -> int:
    """Runs a demo; 1, and the reason in one line, if something is not as it should be."""
    if os.geteuid():
        return _fail("only root can make network namespaces")
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(1))  # an exception, so that everything is cleaned up
    before = _machine()
    try:
        show()
    except (echo_server.NoAnswer, AssertionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return _fail(" ".join(str(error).split()))
    after = _machine()
    for what, was in before.items():
        if after[what] != was:
            return _fail(f"something stayed behind: {what}: {sorted(set(after[what]) ^ set(was))}")
    print(f"\nEverything was cleaned up: no {', '.join(before)} stays behind.")
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Prints one; `right` are the columns that are flush right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _machine() -> dict[str, list[str]]:
    """What a demo could leave on the machine, by kind.

    Its namespaces, mounts and processes bear its pid in their names.
    """

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()

    mark = f"gw-{os.getpid()}-"
    return {
        "network namespace": [line for line in lines("ip", "netns", "list") if mark in line],
        "mount": [line for line in Path("/proc/self/mounts").read_text().splitlines() if mark in line],
        "process": [line for line in lines("ps", "-eo", "pid,args") if mark in line],
        "firewall rule": lines("nft", "-s", "list", "ruleset"),
        "kernel setting": [Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()],
    }


def _fail(reason: str) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return 1
