"""`python -m gangway.daemon START`: what `gangway daemon` becomes, and what a command starts that finds no daemon.

What this file knows: how a start is told, as JSON, and how its failure is said.  What it must not know: anything else.

    {"socket": PATH, "options": {…}, "config": FILE or null, "until_idle": bool, "ready_fd": number}

`ready_fd` is a pipe to whoever waits: `0\\n` when the daemon serves, or the error's kind and text.
"""

import ctypes
import gc
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from gangway import runtime
from gangway.daemon import config
from gangway.daemon import main as process
from gangway.errors import GangwayError, InvalidRequest
from gangway.log import Log, open_log

_STDERR = 2


class Told(msgspec.Struct):
    """A start, as it is told."""

    socket: str | None = None
    options: dict[str, str | bool] = {}
    config: str | None = None
    until_idle: bool = False
    ready_fd: int | None = None


def main() -> int:
    """Runs a daemon to its end."""
    gc.disable()  # until it serves, almost all that is made stays
    told = msgspec.json.decode(sys.argv[1], type=Told)
    if told.until_idle:
        _let_go(told.ready_fd)
        _as_last_time(told)
    try:
        path = told.socket or runtime.default_socket()
        settings, _ = config.load(Path(told.config) if told.config else None, told.options)
        state = settings.state or (f"{path}.db" if told.socket else runtime.default_state())
        settings = msgspec.structs.replace(settings, state=state)
        log = open_log(settings.relay_settings.log) if told.until_idle else Log(_to_stderr)
        start = process.Start(settings, Path(path).absolute(), told.until_idle, log)
        process.run(start, lambda: _serves(told))
    except (GangwayError, OSError) as error:
        _fails(told.ready_fd, error)
        return 2 if isinstance(error, InvalidRequest) else 1
    return 0


def _as_last_time(told: Told) -> None:
    with suppress(OSError, msgspec.MsgspecError), open(os.path.join(runtime.folder(), runtime.START), "rb") as file:
        last = msgspec.json.decode(file.read(), type=Told)
        told.options, told.config = {**last.options, **told.options}, last.config


def _let_go(ready_fd: int | None) -> None:
    """Whoever started us may have had a lock, or a directory that is to be unmounted."""
    os.chdir("/")
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > _STDERR and fd != ready_fd:
            with suppress(OSError):
                os.close(fd)


def _serves(told: Told) -> None:
    """Leaves word of how an operator has started it, for the command that starts the next one.

    What was needed to come this far is not needed again: it goes back to the kernel.
    """
    if not told.until_idle:
        with suppress(OSError), open(os.path.join(runtime.create_folder(), runtime.START), "w") as file:
            json.dump({"options": told.options, "config": told.config}, file)
    gc.collect()
    gc.freeze()
    gc.enable()
    with suppress(AttributeError):  # glibc's; musl has none
        ctypes.CDLL(None).malloc_trim(0)
    if told.ready_fd is not None:
        with suppress(OSError):
            os.write(told.ready_fd, b"0\n")
        os.close(told.ready_fd)


def _fails(ready_fd: int | None, error: Exception) -> None:
    if ready_fd is None:
        print(f"gangway: {error}", file=sys.stderr)
        return
    with suppress(OSError):  # it has said that it serves, and nobody waits any more
        os.write(ready_fd, f"{type(error).__name__} {error}".encode())


def _to_stderr(_level: int, line: str) -> None:
    print(f"gangway: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
