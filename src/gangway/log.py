"""The log: lines to syslog or a file, with a limit of one warning of each kind per second.

It does not use the logging module: with its imports that would take a fifth of the relay's memory.  Also, logging
reopens its file, which a process without privileges cannot.
"""

import os
import syslog
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

_NAME = "gangway"
_MAX_TEXTS = 1000
_LEVELS = {syslog.LOG_INFO: "info", syslog.LOG_WARNING: "warning", syslog.LOG_ERR: "error"}


def open_log(target: str) -> "Log":
    """Open `syslog` or the file with this path, to append to it.  OSError: the file cannot be opened."""
    if target == "syslog":
        syslog.openlog(_NAME, syslog.LOG_PID, syslog.LOG_DAEMON)
        return Log(syslog.syslog)
    fd = open_file(target)

    def write(level: int, line: str) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with suppress(OSError):  # connections go on when the disk is full
            os.write(fd, f"{when} {_NAME}[{os.getpid()}] {_LEVELS[level]}: {line}\n".encode())

    return Log(write, fd=fd)


def open_file(path: str) -> int:
    """Open the file to append to it, created if it does not exist; return the descriptor.  OSError: it cannot be."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)


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

    def failure(self, error: BaseException) -> None:
        """Log an unexpected error with its traceback."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._write(syslog.LOG_ERR, line)
