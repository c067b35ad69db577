"""The daemon as a process: what runs, of which version, and how it is ended."""

from __future__ import annotations

import os
import select
import time

from gangway import __version__
from gangway.cli.client import NoDaemon, Refused, ask_running, connect
from gangway.cli.views import columns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Status = dict[str, Any]

_END_S, _LOOK_S = 60.0, 0.05  # how long the daemon may take to end, and how often to look without pidfd_open(2)
_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def status(path: str) -> Status | None:
    """Return the status of the daemon that listens at `path`, as GET /status has it; None: there is none."""
    try:
        answer: Status = ask_running(path, "GET", "/status")
    except NoDaemon:
        return None
    return answer


def versions(found: Status | None) -> Iterator[str]:
    """Yield the versions of what runs, line by line."""
    daemon = f"{found['version']}  pid {found['pid']}" if found else "does not run"
    yield from _lines([("client", __version__), ("daemon", daemon), ("relay", _relay(found))])


def mismatches(found: Status | None) -> Iterator[str]:
    """Yield what runs and is of another version than this program, and what to do."""
    if found and found["version"] != __version__:
        yield "the daemon is of another version than this command: gangway daemon restart replaces it"
    if found and found["relay_pid"] and found["relay_version"] != found["version"]:
        advice = f"it serves until it ends; kill {found['relay_pid']} ends it, and its connections"
        yield f"the relay is of another version than the daemon: {advice}"


def described(found: Status, now_s: float) -> list[str]:
    """Return a daemon's status at a Unix time, line by line."""
    starter = "a service manager" if found["is_service"] else "a command, a launcher or an operator"
    rows = [
        ("daemon", f"{found['version']}  pid {found['pid']}, for {_duration(now_s - found['started'])}"),
        ("started by", starter),
        ("socket", found["socket"]),
        ("relay", _relay(found)),
        *((name, str(found[name])) for name in ("networks", "containers", "mappings", "leases")),
    ]
    return list(_lines(rows))


def stop_daemon(path: str) -> bool:
    """End the daemon that listens at `path`, and wait until it has ended; False: there is none.

    Refused: it is a service manager's, or does not end.
    """
    try:
        pid = ask_running(path, "GET", "/status")["pid"]
        ended = _pidfd(pid)
        ask_running(path, "POST", "/stop")
    except NoDaemon:
        return False
    if not _has_ended(path, ended):
        raise Refused("HostRefused", f"the daemon (pid {pid}) has not ended within {_END_S:.0f} s: see its log")
    return True


def _lines(rows: list[tuple[str, str]]) -> Iterator[str]:
    return map(str.rstrip, columns(rows))


def _relay(found: Status | None) -> str:
    if not found or not found["relay_pid"]:
        return "does not run"
    return f"{found['relay_version'] or 'unknown'}  pid {found['relay_pid']}"


def _duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    left = max(0, round(seconds))
    parts: list[str] = []
    for unit, size in _UNITS:
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
        left %= size
    return " ".join(parts[:2])


def _pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends; None: the kernel has none (before Linux 5.3)."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _has_ended(path: str, ended: int | None) -> bool:
    """Wait for the daemon's end; False: it takes too long."""
    if ended is not None:
        found = select.select([ended], [], [], _END_S)[0]
        os.close(ended)
        return bool(found)
    deadline_s = time.monotonic() + _END_S
    while time.monotonic() < deadline_s:
        try:
            connect(path).close()
        except NoDaemon:
            return True
        time.sleep(_LOOK_S)
    return False
