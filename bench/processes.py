"""A contender's processes: started, weighed, ended.

What this file knows: /proc, posix_spawn, signals.  What it must not know: which contender it has before it.

How it works.  A contender's processes are those that are in the host's network namespace, whoever their parent is:
gangway's relay is nobody's child, socat forks one for each client.  The namespace was made for this turn, so nobody
else's process is in it but ours, which enters it now and then.

A process is started by posix_spawn: it costs the same small time whatever this process has grown to, so that the time
from exec to status is the contender's.  As dockerd does it, descriptors 0 to 2 are /dev/null and 3 is the status pipe.
"""

import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from bench.errors import CannotCarry
from lab.netns import Namespace
from lab.waiting import wait_until

STATUS_FD = 3
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STATUS_S = 16  # dockerd's patience
_LISTEN_S = 5
_END_S = 10
_Action = tuple[int, int, int] | tuple[int, int, str, int, int]
_LISTENING = {"tcp": "0A", "udp": "07"}  # include/net/tcp_states.h


class ProcessGroup:
    """The processes of one contender, in one network namespace."""

    def __init__(self, namespace: Namespace, log: Path) -> None:
        self._namespace = namespace
        self._log = log
        self._children: set[int] = set()

    def start_launcher(self, words: Sequence[str]) -> float:
        """Starts a program that has docker-proxy's status pipe; the seconds until it said that it serves."""
        with self._namespace.entered():
            reader, writer = os.pipe()
            try:
                start_s = time.perf_counter()
                try:
                    self._spawn(words, (os.POSIX_SPAWN_DUP2, writer, STATUS_FD))
                finally:
                    os.close(writer)
                status = _read_status(reader)
                elapsed_s = time.perf_counter() - start_s
                if status != b"0\n":
                    raise CannotCarry(f"does not start: {_reason(reader, status)}")
                return elapsed_s
            finally:
                os.close(reader)

    def start(self, words: Sequence[str]) -> None:
        """Starts a program that has no status pipe; what it complains about is kept."""
        with self._namespace.entered():
            self._spawn(words, self._logged())

    def run_s(self, words: Sequence[str]) -> float:
        """Runs a program to its end; the seconds that took.  What it says is kept."""
        with self._namespace.entered():
            start_s = time.perf_counter()
            pid = self._spawn(words, self._logged())
            _, status = os.waitpid(pid, 0)
            elapsed_s = time.perf_counter() - start_s
        self._children.remove(pid)
        if status:
            raise CannotCarry(f"{words[0]} fails: {self._complaint() or status}")
        return elapsed_s

    def await_listening(self, protocol: str, ports: set[int]) -> None:
        """Waits until somebody in the namespace listens on all these ports."""
        try:
            wait_until(lambda: ports <= self._listening(protocol), "its sockets", _LISTEN_S)
        except AssertionError as error:
            raise CannotCarry(f"does not start: {self._complaint() or error}") from None

    def cpu_s(self) -> float:
        """CPU time spent so far, user and system, with the children that have ended."""
        return sum(_cpu_ticks(pid) for pid in self.pids()) / _TICKS_PER_S

    def pss_bytes(self) -> int:
        """Memory: each process's own pages, and its part of those that it shares."""
        return sum(_pss_kib(pid) for pid in self.pids()) * 1024

    def pids(self) -> list[int]:
        """Who is in the namespace now.  A zombie is in none."""
        home = os.stat(self._namespace.path)
        return [pid for pid in _pids() if pid != os.getpid() and _is_in(pid, home)]

    def end(self) -> None:
        """Ends them: our children by SIGINT, as dockerd does it, then whom those have left behind."""
        try:
            for how in (signal.SIGINT, signal.SIGKILL):
                _send(self._children, how)
                if _within(lambda: not self._reap(), _END_S):
                    break
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                _send(self.pids(), how)
                if _within(lambda: not self.pids(), _END_S):
                    break

    def _spawn(self, words: Sequence[str], last_action: _Action) -> int:
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
        # What Python ignores and dockerd does not would be ignored in the child, too.
        restored = [signal.SIGPIPE, signal.SIGXFSZ]
        try:
            pid = os.posix_spawn(
                words[0], list(words), os.environ, file_actions=[*null, last_action], setsigdef=restored
            )
        except OSError as error:
            raise CannotCarry(f"does not start: {words[0]}: {error.strerror}") from None
        self._children.add(pid)
        return pid

    def _logged(self) -> _Action:
        return os.POSIX_SPAWN_OPEN, 2, str(self._log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600

    def _complaint(self) -> str:
        """The last line of what was kept; empty if there is none."""
        lines = self._log.read_text().split("\n") if self._log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _reap(self) -> set[int]:
        """Our children that still run."""
        self._children -= {pid for pid in self._children if os.waitpid(pid, os.WNOHANG)[0] == pid}
        return self._children

    def _listening(self, protocol: str) -> set[int]:
        with self._namespace.entered():
            lines = Path(f"/proc/thread-self/net/{protocol}").read_text().splitlines()[1:]
        sockets = (line.split() for line in lines)
        return {int(words[1].split(":")[1], 16) for words in sockets if words[3] == _LISTENING[protocol]}


def _read_status(reader: int) -> bytes:
    readable, _, _ = select.select([reader], [], [], _STATUS_S)
    return os.read(reader, 2) if readable else b""


def _reason(reader: int, status: bytes) -> str:
    if not status:
        return f"it ended, or said nothing for {_STATUS_S} s"
    return os.read(reader, 4096).decode(errors="replace").strip()


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _is_in(pid: int, namespace: os.stat_result) -> bool:
    with suppress(OSError):  # it has ended
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), namespace)
    return False


def _cpu_ticks(pid: int) -> int:
    with suppress(OSError):
        # proc(5): the name, in parentheses, may hold anything; utime, stime, cutime, cstime are fields 14 to 17.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _pss_kib(pid: int) -> int:
    with suppress(OSError):
        found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0


def _send(pids: Iterable[int], how: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, how)


def _within(condition: Callable[[], bool], patience_s: float) -> bool:
    with suppress(AssertionError):
        return wait_until(condition, "", patience_s)
    return False
