"""The processes of gangway's in this network namespace."""

import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from gangway.relay.privilege import NOBODY

DAEMON, RELAY, LAUNCHER = "gangway.daemon", "gangway.relay", "gangway-docker-proxy"
_END_S = 5.0  # how long a process may take to end


class Process(NamedTuple):
    pid: int
    kind: str  # one of those above
    words: list[str]  # its command line


def running() -> Iterator[Process]:
    """Yield this user's daemon, its relays and the launchers, as far as this user may see them."""
    own = os.stat("/proc/thread-self/ns/net")
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has exited
            words = [os.fsdecode(word) for word in (path / "cmdline").read_bytes().split(b"\0")]
            program = os.path.basename(os.readlink(path / "exe").removesuffix(" (deleted)"))
            kind = kind_of(program, words, _uid(path), os.geteuid())
            if kind is not None and os.path.samestat(os.stat(path / "ns/net"), own):
                yield Process(int(path.name), kind, words)


def kind_of(program: str, words: Sequence[str], uid: int, daemons: int) -> str | None:
    """Return what a process is, after its program, command line and user; None: none of gangway's.

    `daemons` is the daemon's user.  Other programs may have the name of a module among their arguments, too.
    """
    if program == LAUNCHER:
        return LAUNCHER
    users = {DAEMON: daemons, RELAY: daemons or NOBODY}  # root's relay drops its privileges
    return next((one for flag, one in pairwise(words) if flag == "-m" and users.get(one) == uid), None)


def _uid(path: Path) -> int:
    """Return the effective user of a process: its folder is root's if it has changed its user (proc(5))."""
    (line,) = (one for one in (path / "status").read_text().splitlines() if one.startswith("Uid:"))
    return int(line.split()[2])


def relays() -> list[int]:
    """Return the pids of the relays: one that was replaced goes on for as long as its connections do."""
    return [one.pid for one in running() if one.kind == RELAY]


def terminate(pid: int) -> bool:
    """Send SIGTERM to a process, and wait for its end; False: it takes too long."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:  # before Linux 5.3
        return _terminate_by_number(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        return bool(select.select([process], [], [], _END_S)[0])
    except ProcessLookupError:
        return True
    finally:
        os.close(process)


def _terminate_by_number(pid: int) -> bool:
    deadline_s = time.monotonic() + _END_S
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while time.monotonic() < deadline_s:
            os.kill(pid, 0)
            time.sleep(0.02)
        return False
    return True
