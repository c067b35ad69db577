"""Where the log goes: the journal, syslog, a file or standard error; none of them can block the program.

    auto     the journal, if there is one, else syslog; of a program in the foreground: standard error
    syslog   the socket /dev/log
    a path   a file, to which lines are appended

The journal gets its fields by the protocol of systemd.io/JOURNAL_NATIVE_PROTOCOL: `GANGWAY_EVENT`, and one for each
field of the event.
"""

import os
import select
import socket
import stat
import syslog
import time
from _thread import allocate_lock
from collections.abc import Callable
from functools import partial

from gangway.log import LEVEL_NAMES, LEVELS, Event, Log, event

AUTO, SYSLOG = "auto", "syslog"
FORMATS = ("text", "json")
_NAME = "gangway"
_STDERR = 2
_SYSLOG, _JOURNAL = "/dev/log", "/run/systemd/journal/socket"
_MAX_LINE = select.PIPE_BUF
_MAX_CUT = 300  # characters of the text of an event that is too long as JSON


def open_log(target: str, level: str = "info", form: str = "text", foreground: bool = False) -> Log:
    """Open the log `target`.  OSError: the file cannot be opened."""
    as_json, fd = form == "json", None
    if target == AUTO and foreground and not _is_journal(_STDERR):
        writer = Writer(lambda: _STDERR, partial(_for_stderr, as_json))
    elif target == AUTO and os.path.exists(_JOURNAL):
        writer = Writer(partial(_connect, _JOURNAL), _for_journal, is_reopened=True)
    elif target in (AUTO, SYSLOG):
        writer = Writer(partial(_connect, _SYSLOG), partial(_for_syslog, as_json), is_reopened=True)
    else:
        fd = file = open_file(target)
        writer = Writer(lambda: file, partial(_for_file, as_json))
    log = Log(writer, fd=fd)
    log.level = LEVELS[level]
    return log


def open_file(path: str) -> int:
    """Open the file to append to it, created if it does not exist; return the descriptor.  OSError: it cannot be."""
    return os.open(path, _flags(path) | os.O_CREAT, 0o640)


def is_file(target: str) -> bool:
    """True if the log `target` is a file, which is opened again when it was renamed."""
    return target not in (AUTO, SYSLOG)


def unusable(target: str) -> str:
    """Return why a log cannot be written to `target`; empty if it can, as far as this user may look."""
    if not is_file(target):
        return ""
    if not target.startswith("/"):
        return f'it must be "{AUTO}", "{SYSLOG}" or a file\'s absolute path'
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
    """Writes events to a descriptor, and never waits for whoever reads it: those that it does not take are counted.

    `connect` returns the descriptor; if it `is_reopened`, it is called again after a failure.  Of a pipe poll(2) says
    whether PIPE_BUF bytes fit, and no more are written at once (pipe(7)).
    """

    def __init__(self, connect: Callable[[], int], form: Callable[[Event], bytes], is_reopened: bool = False) -> None:
        self._connect, self._form, self._is_reopened = connect, form, is_reopened
        self._fd: int | None = None
        self._lost = 0
        self._lock = allocate_lock()

    def __call__(self, happened: Event) -> None:
        with self._lock:
            note = f"{self._lost} lines were lost: the log did not take them"
            if self._lost and self._put(event("lost", note, {"lost": self._lost}, syslog.LOG_WARNING)):
                self._lost = 0
            if self._lost or not self._put(happened):
                self._lost += 1

    def _put(self, happened: Event) -> bool:
        """Write an event; False if the log did not take it."""
        try:
            self._fd = self._connect() if self._fd is None else self._fd
            ready = select.poll()
            ready.register(self._fd, select.POLLOUT)
            if not ready.poll(0):
                return False
            os.write(self._fd, self._form(happened))
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


def _connect(path: str) -> int:
    """Return a connection to syslogd or the journal.  The C library's would wait for a syslogd that hangs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(path)
        return sock.detach()


def _is_journal(fd: int) -> bool:
    """True if a service manager has connected a descriptor to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _for_journal(happened: Event) -> bytes:
    fields = {"MESSAGE": happened.text, "PRIORITY": happened.level, "SYSLOG_IDENTIFIER": _NAME}
    fields |= {"GANGWAY_EVENT": happened.name}
    fields |= {f"GANGWAY_{name.upper()}": value for name, value in happened.fields.items()}
    return "".join(f"{name}={value}\n" for name, value in fields.items()).encode(errors="replace")


def _for_syslog(as_json: bool, happened: Event) -> bytes:
    when = time.strftime("%b %e %H:%M:%S", time.localtime(happened.time_s))
    head = f"<{syslog.LOG_DAEMON | happened.level}>{when} {_NAME}[{os.getpid()}]: "
    return _line(head, happened.text if not as_json else _short_json(happened, _MAX_LINE - len(head)), "")


def _for_file(as_json: bool, happened: Event) -> bytes:
    if as_json:
        return _line("", _short_json(happened, _MAX_LINE - 1), "\n")
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(happened.time_s))
    return _line(f"{when} {_NAME}[{os.getpid()}] {LEVEL_NAMES[happened.level]}: ", happened.text, "\n")


def _for_stderr(as_json: bool, happened: Event) -> bytes:
    return _for_file(True, happened) if as_json else _line(f"{_NAME}: ", happened.text, "\n")


def _line(head: str, text: str, end: str) -> bytes:
    return (head + text).encode(errors="replace")[: _MAX_LINE - len(end)] + end.encode()


def _short_json(happened: Event, limit: int) -> str:
    """Return an event as JSON that has at most so many bytes; of one that is too long only the text's beginning."""
    text = happened.as_json()
    if len(text.encode(errors="replace")) > limit:
        text = happened._replace(text=f"{happened.text[:_MAX_CUT]} …", fields={}).as_json()
    return text
