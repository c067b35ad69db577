"""The relay's log: to syslog or a file, one line of a kind a second."""

import logging
import logging.handlers
import sys
import time

# Where syslogd or journald listen.
SYSLOG = "/dev/log"


def handler_for(target: str) -> logging.Handler:
    """The handler for `syslog` or a file's path.  No syslog on the machine: standard error.  OSError: the file cannot be had."""
    if target != "syslog":
        handler: logging.Handler = logging.FileHandler(target)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s[%(process)d] %(levelname)s %(message)s"))
        return handler
    try:
        handler = logging.handlers.SysLogHandler(SYSLOG)
        handler.setFormatter(logging.Formatter("%(name)s[%(process)d]: %(message)s"))
    except OSError:
        handler = logging.StreamHandler(sys.stderr)
    return handler


class Log:
    """A logger whose warnings are limited: of the same text one a second, and then how many were left out."""

    def __init__(self, logger: logging.Logger) -> None:
        self.info = logger.info
        self._logger = logger
        self._said: dict[str, tuple[float, int]] = {}

    def warning(self, text: str, *facts: object) -> None:
        """Logs `text % facts` unless the same `text` was logged within the last second."""
        now = time.monotonic()
        last, left_out = self._said.get(text, (-1.0, 0))
        if now - last < 1.0:
            self._said[text] = (last, left_out + 1)
            return
        self._said[text] = (now, 0)
        more = f" ({left_out} more since)" if left_out else ""
        self._logger.warning(text + more, *facts)
