"""The relay's log: to syslog or a file, a warning of one kind once a second.

What this file knows: where lines go, and how often.  What it must not know: what they are about.

Not the logging module: it and what it brings along would be a fifth of the memory of a process that logs a line a
day, and it reopens what it writes to, which a process without rights cannot.
"""

import os
import syslog
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

_NAME = "gangway"
_MOST_TEXTS = 1000
_LEVELS = {syslog.LOG_INFO: "info", syslog.LOG_WARNING: "warning", syslog.LOG_ERR: "error"}


def open_log(target: str) -> "Log":
    """The log for `syslog` or a file's path; what the file has is kept.  OSError: the file cannot be had."""
    if target == "syslog":
        syslog.openlog(_NAME, syslog.LOG_PID, syslog.LOG_DAEMON)
        return Log(syslog.syslog)
    fd = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def write(level: int, line: str) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with suppress(OSError):  # a full disk is no reason to end connections
            os.write(fd, f"{when} {_NAME}[{os.getpid()}] {_LEVELS[level]}: {line}\n".encode())

    return Log(write)


class Log:
    """Writes lines by `write(level, line)`; levels are syslog's.  `clock` gives seconds, monotonic."""

    def __init__(self, write: Callable[[int, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}

    def info(self, text: str, *facts: object) -> None:
        """Logs `text % facts`."""
        self._write(syslog.LOG_INFO, text % facts)

    def warning(self, text: str, *facts: object) -> None:
        """Logs `text % facts`, unless the same `text` was logged within the last second: then it is counted."""
        now_s = self._clock()
        if len(self._said) > _MOST_TEXTS:
            self._said.clear()
        last_s, left_out = self._said.get(text, (now_s - 1.0, 0))
        if now_s - last_s < 1.0:
            self._said[text] = (last_s, left_out + 1)
            return
        self._said[text] = (now_s, 0)
        more = f" ({left_out} more like this were left out)" if left_out else ""
        self._write(syslog.LOG_WARNING, text % facts + more)

    def failure(self, error: BaseException) -> None:
        """Logs an error that nobody foresaw, with where it happened."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._write(syslog.LOG_ERR, line)
