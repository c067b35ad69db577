"""What both demos use: tables, failures in one line, and a check that nothing is left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import echo_server


def run(show: Callable[[], None]) -> int:
    """Run a demo, and return the exit code; a failure is reported in one line."""
    if os.geteuid():
        return _fail("root is required to create network namespaces")
    signal.signal(
        signal.SIGTERM, lambda _signal, _frame: sys.exit(1)
    )  # as an exception, so that everything is cleaned up
    before = _inventory()
    try:
        show()
    except (echo_server.NoAnswer, AssertionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        return _fail(" ".join(str(error).split()))
    after = _inventory()
    for kind, lines in before.items():
        if after[kind] != lines:
            return _fail(f"not cleaned up: {kind}: {sorted(set(after[kind]) ^ set(lines))}")
    print(f"\nEverything was cleaned up: {', '.join(before)} are as before.")
    return 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a table; the columns in `right` are right-aligned."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = [
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _inventory() -> dict[str, list[str]]:
    """Return what a demo could leave behind on the machine, by kind.

    The names of its namespaces, mounts and processes contain its pid.
    """

    def lines(*command: str) -> list[str]:
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()

    mark = f"gw-{os.getpid()}-"
    return {
        "network namespaces": [line for line in lines("ip", "netns", "list") if mark in line],
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if mark in line],
        "processes": [line for line in lines("ps", "-eo", "pid,args") if mark in line],
        "firewall rules": lines("nft", "-s", "list", "ruleset"),
        "kernel settings": [Path("/proc/sys/net/ipv4/ip_forward").read_text().strip()],
    }


def _fail(reason: str) -> int:
    print(f"demo: {reason}", file=sys.stderr)
    return 1
