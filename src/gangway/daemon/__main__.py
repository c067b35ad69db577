"""`python -m gangway.daemon START`: what `gangway daemon` becomes, and what a command starts that finds no daemon.

What this file knows: how a start is told, as JSON, and how its failure is said.  What it must not know: anything else.

    {"socket": PATH, "options": {…}, "config": FILE or null, "until_idle": bool, "ready_fd": number}

`ready_fd` is a pipe to whoever waits: `0\\n` when the daemon serves, or the error's kind and text.
"""

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from gangway.daemon import config, process
from gangway.errors import GangwayError, InvalidRequest
from gangway.relay.log import Log, open_log


class Told(msgspec.Struct):
    """A start, as it is told."""

    socket: str
    options: dict[str, str | bool]
    config: str | None = None
    until_idle: bool = False
    ready_fd: int | None = None


def main() -> int:
    """Runs a daemon to its end."""
    told = msgspec.json.decode(sys.argv[1], type=Told)
    try:
        settings = config.load(Path(told.config) if told.config else None, told.options)
        log = open_log(settings.relay_settings.log) if told.until_idle else Log(_to_stderr)
        start = process.Start(settings, Path(told.socket).absolute(), told.until_idle, log)
        process.run(start, lambda: _serves(told.ready_fd))
    except (GangwayError, OSError) as error:
        _fails(told.ready_fd, error)
        return 2 if isinstance(error, InvalidRequest) else 1
    return 0


def _serves(ready_fd: int | None) -> None:
    """What was needed to come this far is not needed again: it goes back to the kernel."""
    gc.collect()
    gc.freeze()
    with suppress(AttributeError):  # glibc's; musl has none
        ctypes.CDLL(None).malloc_trim(0)
    if ready_fd is not None:
        with suppress(OSError):
            os.write(ready_fd, b"0\n")
        os.close(ready_fd)


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
