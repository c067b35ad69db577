"""The log: events, each with a name and fields for programs and a text for people.

One event feeds the lines of the log, whatever their format, the journal's fields and the API's stream of events.  Of
warnings there is a limit: one of each kind per second; of refused requests, one of each kind and user.

It does not use the logging module: with its imports that would take a fifth of the relay's memory.  Also, logging
reopens its file, which a process without privileges cannot.
"""

import json
import os
import syslog
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NamedTuple

LEVELS = {
    "debug": syslog.LOG_DEBUG,
    "info": syslog.LOG_INFO,
    "warning": syslog.LOG_WARNING,
    "error": syslog.LOG_ERR,
}
"""The levels by name, the least important first.  The numbers are syslog's: the greater, the less important."""
LEVEL_NAMES = {number: name for name, number in LEVELS.items()}
_MAX_TEXTS = 1000
_CALM_S = 60.0
_MAX_TEXT, _MAX_FIELD = 2000, 1000  # characters

Field = str | int | float


class Event(NamedTuple):
    """Something that happened, at `time_s` (Unix time)."""

    time_s: float
    level: int  # one of LEVELS
    name: str
    text: str  # one line
    fields: dict[str, Field]

    def as_json(self) -> str:
        """Return the event as JSON, in one line."""
        head = {"time": _timestamp(self.time_s), "level": LEVEL_NAMES[self.level], "event": self.name}
        return json.dumps({**head, "message": self.text, **self.fields}, ensure_ascii=False)


def event(name: str, text: str, fields: Mapping[str, Field], level: int = syslog.LOG_INFO) -> Event:
    """Return an event of this moment.  What would break a line, or a terminal, is replaced; what is too long is cut."""
    known = {key: _one_line(one, _MAX_FIELD) if isinstance(one, str) else one for key, one in fields.items()}
    return Event(time.time(), level, name, _one_line(text, _MAX_TEXT), known)


class Log:
    """Hands events to `write`.  `clock` returns monotonic seconds."""

    def __init__(
        self, write: Callable[[Event], object], clock: Callable[[], float] = time.monotonic, fd: int | None = None
    ) -> None:
        """`fd` is the descriptor of the file that `write` writes to."""
        self._writers = [write]
        self._fd = fd
        self._clock = clock
        self.level = syslog.LOG_INFO
        """Less important events are left out."""

        self._written: dict[str, tuple[float, int]] = {}
        """For each kind: when one was last written, and how many lines were suppressed since."""

        self._lasting: dict[str, float] = {}
        """When what lasts was last reported."""

    def use(self, fd: int) -> None:
        """Write to the file that is open as `fd`, if this log is a file: it was renamed, and there is a new one."""
        if self._fd is not None:
            os.dup2(fd, self._fd, inheritable=False)

    def add_writer(self, write: Callable[[Event], object]) -> None:
        """Hand events to `write`, too; it must not block."""
        self._writers.append(write)

    def write(self, happened: Event) -> None:
        """Write an event, if it is important enough."""
        if happened.level <= self.level:
            for write in self._writers:
                write(happened)

    def info(self, text: str, *args: object, event: str = "message", **fields: Field) -> None:
        """Log `text`, or `text % args`, as an event with this name and these fields."""
        self._write(syslog.LOG_INFO, event, text % args if args else text, fields)

    def write_limited(self, happened: Event, kind: str) -> None:
        """Write an event; count it instead if one of the same `kind` was written less than a second ago."""
        if (note := self._count(kind)) is not None:
            self.write(happened._replace(text=happened.text + note))

    def warning(self, text: str, *args: object, event: str = "message", **fields: Field) -> None:
        """Log `text`, or `text % args`; count it instead if the same `text` was logged less than a second ago."""
        if (note := self._count(text)) is not None:
            self._write(syslog.LOG_WARNING, event, (text % args if args else text) + note, fields)

    def _count(self, kind: str) -> str | None:
        """Return what to add to the text of an event of this kind; None: it is counted, and not to be written."""
        now_s = self._clock()
        if len(self._written) > _MAX_TEXTS:
            self._written.clear()
        last_s, suppressed = self._written.get(kind, (now_s - 1.0, 0))
        if now_s - last_s < 1.0:
            self._written[kind] = (last_s, suppressed + 1)
            return None
        self._written[kind] = (now_s, 0)
        return f" ({suppressed} more like this were suppressed)" if suppressed else ""

    def lasting(self, text: str) -> None:
        """Log that something lasts: once, and again only if it has not been reported for a minute."""
        now_s = self._clock()
        if len(self._lasting) > _MAX_TEXTS:
            self._lasting.clear()
        if now_s - self._lasting.get(text, -_CALM_S) >= _CALM_S:
            self._write(syslog.LOG_WARNING, "message", text, {})
        self._lasting[text] = now_s

    def unexpected(self, error: BaseException, done: str) -> None:
        """Log an error that is a fault of the program, where it happened, and what was `done` about it, in one line."""
        frames = traceback.extract_tb(error.__traceback__)[:-4:-1]  # the innermost first
        where = ", called by ".join(f"{os.path.basename(one.filename)}:{one.lineno} {one.name}" for one in frames)
        self.warning(f"internal error: {error!r} in {where}: {done}", event="internal-error")

    def failure(self, error: BaseException) -> None:
        """Log an unexpected error with its traceback."""
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._write(syslog.LOG_ERR, "internal-error", line, {})

    def _write(self, level: int, name: str, text: str, fields: dict[str, Field]) -> None:
        self.write(event(name, text, fields, level))


def _one_line(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return text if text.isprintable() else "".join(one if one.isprintable() else " " for one in text)


def _timestamp(time_s: float) -> str:
    """Return a local time as RFC 3339 has it, with milliseconds."""
    seconds, ms = divmod(int(time_s * 1000), 1000)
    local = time.strftime("%Y-%m-%dT%H:%M:%S %z", time.localtime(seconds))
    stamp, _, zone = local.partition(" ")
    return f"{stamp}.{ms:03d}{zone[:3]}:{zone[3:]}"
