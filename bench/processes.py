"""Starting, measuring and ending a contender's processes.

A contender's processes are all that are in the host's network namespace, whatever their parent: gangway's daemon and
relay are session leaders without a parent, socat forks one process per client. The namespace was created for this turn,
so only this process enters it, too, from time to time.

Processes are started with posix_spawn, which takes the same short time however large this process is, so that the time
from exec to status is the contender's. As under dockerd, descriptors 0 to 2 are /dev/null and 3 is the status pipe.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from bench.errors import CannotCarry
from lab.netns import Namespace
from lab.processes import processes_in, pss_kib
from lab.waiting import wait_until

STATUS_FD = 3
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STATUS_S = 16  # how long dockerd waits
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
        """Start a program with docker-proxy's status pipe; return the seconds until it reported that it serves."""
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
                    raise CannotCarry(f"did not start: {_reason(reader, status)}")
                return elapsed_s
            finally:
                os.close(reader)

    def start(self, words: Sequence[str]) -> None:
        """Start a program without a status pipe; its standard error goes to the log."""
        with self._namespace.entered():
            self._spawn(words, self._stderr_to_log())

    def run_s(self, words: Sequence[str]) -> float:
        """Run a program, and return the seconds that it took; its standard error goes to the log."""
        with self._namespace.entered():
            start_s = time.perf_counter()
            pid = self._spawn(words, self._stderr_to_log())
            _, status = os.waitpid(pid, 0)
            elapsed_s = time.perf_counter() - start_s
        self._children.remove(pid)
        if status:
            raise CannotCarry(f"{words[0]} failed: {self._last_error() or status}")
        return elapsed_s

    def wait_for_ports(self, protocol: str, ports: set[int]) -> None:
        """Wait until sockets in the namespace listen on all these ports."""
        try:
            wait_until(lambda: ports <= self._listening(protocol), "its sockets to listen", _LISTEN_S)
        except AssertionError as error:
            raise CannotCarry(f"did not start: {self._last_error() or error}") from None

    def cpu_s(self) -> float:
        """Return the CPU seconds used so far, user and system, including children that have exited."""
        return sum(_cpu_ticks(pid) for pid in self.pids()) / _TICKS_PER_S

    def pss_bytes(self) -> int:
        """Return the memory (PSS) of all processes in the namespace."""
        return pss_kib(self.pids()) * 1024

    def pids(self) -> list[int]:
        """Return the processes that are in the namespace now, without this one."""
        return [pid for pid in processes_in(self._namespace.path) if pid != os.getpid()]

    def end(self) -> None:
        """End all processes: our children with SIGINT, as dockerd does, then those that they leave behind."""
        try:
            for number in (signal.SIGINT, signal.SIGKILL):
                _send(self._children, number)
                if _is_true_within(lambda: not self._reap(), _END_S):
                    break
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                _send(self.pids(), number)
                if _is_true_within(lambda: not self.pids(), _END_S):
                    break

    def _spawn(self, words: Sequence[str], last_action: _Action) -> int:
        null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
        # Python ignores these signals, and children inherit that; dockerd does not ignore them.
        restored = [signal.SIGPIPE, signal.SIGXFSZ]
        try:
            pid = os.posix_spawn(
                words[0], list(words), os.environ, file_actions=[*null, last_action], setsigdef=restored
            )
        except OSError as error:
            raise CannotCarry(f"did not start: {words[0]}: {error.strerror}") from None
        self._children.add(pid)
        return pid

    def _stderr_to_log(self) -> _Action:
        return os.POSIX_SPAWN_OPEN, 2, str(self._log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600

    def _last_error(self) -> str:
        """Return the last line of the log; empty if there is none."""
        lines = self._log.read_text().split("\n") if self._log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _reap(self) -> set[int]:
        """Wait for our children that have exited, and return those that still run."""
        self._children -= {pid for pid in self._children if os.waitpid(pid, os.WNOHANG)[0] == pid}
        return self._children

    def _listening(self, protocol: str) -> set[int]:
        with self._namespace.entered():
            tables = [Path(f"/proc/thread-self/net/{protocol}{version}").read_text() for version in ("", "6")]
        sockets = (line.split() for table in tables for line in table.splitlines()[1:])
        return {int(words[1].split(":")[1], 16) for words in sockets if words[3] == _LISTENING[protocol]}


def _read_status(reader: int) -> bytes:
    readable, _, _ = select.select([reader], [], [], _STATUS_S)
    return os.read(reader, 2) if readable else b""


def _reason(reader: int, status: bytes) -> str:
    if not status:
        return f"it exited, or reported nothing for {_STATUS_S} s"
    return os.read(reader, 4096).decode(errors="replace").strip()


def _cpu_ticks(pid: int) -> int:
    with suppress(OSError):
        # proc(5): the name in parentheses may contain anything; utime, stime, cutime, cstime are fields 14 to 17.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_true_within(condition: Callable[[], bool], patience_s: float) -> bool:
    with suppress(AssertionError):
        return wait_until(condition, "the processes to exit", patience_s)
    return False
