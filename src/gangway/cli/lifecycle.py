"""The daemon as a process: its status and version, and its end."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from gangway import __version__, runtime
from gangway.cli.client import NoDaemon, Refused, ask, ask_running, connect
from gangway.cli.progress import wait_readable
from gangway.cli.tables import columns

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
    """Yield the versions of this program, the daemon and its relay, line by line."""
    daemon = f"{found['version']}  pid {found['pid']}" if found else "not running"
    yield from columns([("client", __version__), ("daemon", daemon), ("relay", _relay(found))])


def mismatches(found: Status | None) -> Iterator[str]:
    """Yield how the versions differ, and what to do."""
    if found is None:
        return
    restart = "systemctl restart gangway" if found["is_service"] else "gangway daemon restart"
    if found["version"] != __version__:
        yield f"version mismatch: daemon {found['version']}, command {__version__}; replace the daemon: {restart}"
    if found["relay_pid"] and found["relay_version"] != found["version"]:
        versions = f"relay {found['relay_version'] or 'unknown'}, daemon {found['version']}"
        yield f"version mismatch: {versions}; the next daemon replaces the relay: {restart}"


def described(found: Status, now_s: float) -> list[str]:
    """Return a daemon's status at a Unix time, line by line."""
    starter = "a command or launcher" if found["on_demand"] else "an operator"
    if found["is_service"]:
        starter = "a service manager"
    rows = [
        ("daemon", f"{found['version']}  pid {found['pid']}, for {_duration(now_s - found['started'])}"),
        ("started by", starter),
        ("socket", found["socket"]),
        ("relay", _relay(found)),
        *((name, str(found[name])) for name in ("networks", "containers", "mappings", "leases")),
    ]
    return list(columns(rows))


def end_daemon(path: str, found: Status, target: str = "/stop") -> Any:
    """End the daemon that listens at `path` and has this status by a POST, and wait until it has ended.

    Return its answer; None if it has just ended by itself.  Refused: it is a service manager's, or does not end.
    """
    answer, ended = None, _pidfd(found["pid"])
    with suppress(NoDaemon):
        answer = ask_running(path, "POST", target)
    if not (_has_ended(ended) if ended is not None else _has_gone_silent(path)):
        raise Refused("HostRefused", f"the daemon (pid {found['pid']}) did not exit within {_END_S:.0f} s: see its log")
    return answer


def restart_daemon(path: str) -> None:
    """End the daemon that listens at `path`, and start it again with the same options; start one if there is none.

    Refused: another program has started it, or it is another network namespace's.
    """
    found = status(path)
    if found is not None:
        if found["folder"] != runtime.folder():
            raise Refused("Conflict", f"the daemon at {path} is another network namespace's: enter that with nsenter")
        if not found["on_demand"] and not found["is_service"]:
            raise Refused("Conflict", _by_hand(found["pid"]))
        end_daemon(path, found)
    ask(path, "GET", "/status")  # which starts a daemon


def _by_hand(pid: int) -> str:
    """Return why a daemon that an operator has started cannot be restarted by a command, and what to do."""
    from gangway.daemon.start import Start

    start = Start()
    start.apply_last()
    return (
        f"the daemon (pid {pid}) belongs to the terminal or program in which an operator has started it, and a command "
        f"cannot start another one there: end it, for example by kill {pid} (ports stay published), and start it "
        f"there again: {start.command_line()}"
    )


def _relay(found: Status | None) -> str:
    if not found or not found["relay_pid"]:
        return "not running"
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


def _has_ended(process: int) -> bool:
    """Wait for the end of a process, and close its pidfd; False: it takes too long."""
    found = wait_readable(process, _END_S, "waiting for the daemon to end")
    os.close(process)
    return found


def _has_gone_silent(path: str) -> bool:
    """Wait until no daemon listens at `path`; False: it takes too long."""
    deadline_s = time.monotonic() + _END_S
    while time.monotonic() < deadline_s:
        try:
            connect(path).close()
        except NoDaemon:
            return True
        time.sleep(_LOOK_S)
    return False
