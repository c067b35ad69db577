"""The log: lines to syslog or a file, with a limit of one warning of each kind per second.

It does not use the logging module: with its imports that would take a fifth of the relay's memory.  Also, logging
reopens its file, which a process without privileges cannot.
"""

import os
import select
import socket
import stat
import syslog
import time
import traceback
from _thread import allocate_lock
from collections.abc import Callable

_NAME = "gangway"
_STDERR, _SYSLOG = 2, "/dev/log"
_MAX_TEXTS = 1000
_CALM_S = 60.0
_LEVELS = {syslog.LOG_INFO: "info", syslog.LOG_WARNING: "warning", syslog.LOG_ERR: "error"}


def open_log(target: str) -> "Log":
    """Open `syslog` or the file with this path, to append to it.  OSError: the file cannot be opened."""
    if target == "syslog":
        return Log(Writer(_connect_syslog, _for_syslog, is_reopened=True))
    fd = open_file(target)
    return Log(Writer(lambda: fd, _for_file), fd=fd)


def open_file(path: str) -> int:
    """Open the file to append to it, created if it does not exist; return the descriptor.  OSError: it cannot be."""
    return os.open(path, _flags(path) | os.O_CREAT, 0o640)


def stderr_log() -> "Log":
    """Return the log of a daemon that an operator runs."""
    return Log(Writer(lambda: _STDERR, lambda _level, line: f"{_NAME}: {line}\n"))


def unusable(target: str) -> str:
    """Return why a log cannot be written to `target`; empty if it can, as far as this user may look."""
    if target == "syslog":
        return ""
    try:
        os.close(os.open(target, _flags(target)))
    except FileNotFoundError:
        folder = os.path.dirname(target)
        return "" if os.path.isdir(folder) else f"there is no folder {folder}"
    except PermissionError as error:
        return "" if os.geteuid() else str(error.strerror)
    except OSError as error:
        return str(error.strerror)
    return ""


class Writer:
    """Writes lines to a descriptor, and never waits for whoever reads it: lines that it does not take are counted.

    `connect` returns the descriptor; if it `is_reopened`, it is called again after a failure.  Of a pipe poll(2) says
    whether PIPE_BUF bytes fit, and no more are written at once (pipe(7)).
    """

    def __init__(self, connect: Callable[[], int], form: Callable[[int, str], str], is_reopened: bool = False) -> None:
        self._connect, self._form, self._is_reopened = connect, form, is_reopened
        self._fd: int | None = None
        self._lost = 0
        self._lock = allocate_lock()

    def __call__(self, level: int, line: str) -> None:
        with self._lock:
            note = f"{self._lost} lines were lost: the log did not take them"
            if self._lost and self._put(self._form(syslog.LOG_WARNING, note)):
                self._lost = 0
            if self._lost or not self._put(self._form(level, line)):
                self._lost += 1

    def _put(self, text: str) -> bool:
        """Write a text; False if the log did not take it."""
        try:
            self._fd = self._connect() if self._fd is None else self._fd
            ready = select.poll()
            ready.register(self._fd, select.POLLOUT)
            if not ready.poll(0):
                return False
            os.write(self._fd, text.encode(errors="replace")[: select.PIPE_BUF])
        except BlockingIOError:
            return False
        except OSError:  # connections go on when the disk is full
            if self._is_reopened and self._fd is not None:
                os.close(self._fd)
                self._fd = None
            return False
        return True


def _flags(target: str) -> int:
    """Return the flags to open a file with.  Nobody may read a named pipe yet: it takes what fits (fifo(7))."""
    try:
        is_pipe = stat.S_ISFIFO(os.stat(target).st_mode)
    except OSError:
        is_pipe = False
    return (os.O_RDWR if is_pipe else os.O_WRONLY) | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def _connect_syslog() -> int:
    """Return a connection to syslogd.  The C library's would wait for a syslogd that hangs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(_SYSLOG)
        return sock.detach()


def _for_syslog(level: int, line: str) -> str:
    return f"<{syslog.LOG_DAEMON | level}>{time.strftime('%b %e %H:%M:%S')} {_NAME}[{os.getpid()}]: {line}"


def _for_file(level: int, line: str) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {_NAME}[{os.getpid()}] {_LEVELS[level]}: {line}\n"


class Log:
    """Writes lines with `write(level, line)`, where the levels are syslog's.  `clock` returns monotonic seconds."""

    def __init__(
        self, write: Callable[[int, str], None], clock: Callable[[], float] = time.monotonic, fd: int | None = None
    ) -> None:
        """`fd` is the descriptor of the file that `write` writes to."""
        self._write = write
        self._fd = fd
        self._clock = clock
        self._written: dict[str, tuple[float, int]] = {}
        """For each text: when it was last written, and how many lines were suppressed since."""

        self._lasting: dict[str, float] = {}
        """When what lasts was last reported."""

    def use(self, fd: int) -> None:
        """Write to the file that is open as `fd`, if this log is a file: it was renamed, and there is a new one."""
        if self._fd is not None:
            os.dup2(fd, self._fd, inheritable=False)

    def info(self, text: str, *args: object) -> None:
        """Log `text % args`."""
        self._write(syslog.LOG_INFO, text % args)

    def warning(self, text: str, *args: object) -> None:
        """Log `text`, or `text % args`; count it instead if the same `text` was logged less than a second ago."""
        now_s = self._clock()
        if len(self._written) > _MAX_TEXTS:
            self._written.clear()
        last_s, suppressed = self._written.get(text, (now_s - 1.0, 0))
        if now_s - last_s < 1.0:
            self._written[text] = (last_s, suppressed + 1)
            return
        self._written[text] = (now_s, 0)
        note = f" ({suppressed} more like this were suppressed)" if suppressed else ""
        self._write(syslog.LOG_WARNING, (text % args if args else text) + note)

    def lasting(self, text: str) -> None:
        """Log that something lasts: once, and again only if it has not been reported for a minute."""
        now_s = self._clock()
        if len(self._lasting) > _MAX_TEXTS:
            self._lasting.clear()
        if now_s - self._lasting.get(text, -_CALM_S) >= _CALM_S:
            self._write(syslog.LOG_WARNING, text)
        self._lasting[text] = now_s

    def unexpected(self, error: BaseException, done: str) -> None:
        """Log an error that is a fault of the program, where it happened, and what was `done` about it, in one line."""
        frames = traceback.extract_tb(error.__traceback__)[:-4:-1]  # the innermost first
        where = ", called by ".join(f"{os.path.basename(one.filename)}:{one.lineno} {one.name}" for one in frames)
        self.warning(f"internal error: {error!r} in {where}: {done}")

    def failure(self, error: BaseException) -> None:
        """Log an unexpected error with its traceback."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._write(syslog.LOG_ERR, line)
