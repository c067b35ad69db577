"""`python -m gangway.daemon START`: what `gangway daemon` becomes, and what a command or a launcher starts when there
is no daemon.

START is JSON; every key may be left out:

    {"socket": PATH, "options": {…}, "config": FILE, "until_idle": bool, "ready_fd": NUMBER}

`until_idle`: the daemon ends when there is nothing to look after; it is started with the socket, options, file and
environment with which an operator last started one here (`start`), unless it is given others.  `ready_fd` is a pipe to
the process that waits: `0\\n` when the daemon serves, or the error's kind and text.
"""

import ctypes
import gc
import os
import signal
import sys
from contextlib import suppress
from functools import partial

import msgspec

from gangway import runtime
from gangway.daemon import detach, main
from gangway.daemon.declared_files import folder_for
from gangway.daemon.start import Start
from gangway.errors import GangwayError, HostRefused, InvalidRequest
from gangway.log_targets import AUTO, open_log


def run() -> int:
    """Run a daemon to its end; return its exit status."""
    gc.disable()  # almost every object that is created before it serves is kept
    os.environ["SSL_CERT_FILE"] = os.devnull  # aiohttp loads all certificates when it is imported, and we need none
    start = msgspec.json.decode(sys.argv[1] if len(sys.argv) > 1 else "{}", type=Start)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it serves
    name = f"gangway-{os.path.basename(runtime.folder())}"
    if start.until_idle:
        detach.detach(name, start.ready_fd)
        start.apply_last()
    is_abandoned = False
    log = open_log(AUTO, foreground=True)
    try:
        load = partial(start.load, os.environ)
        loaded = load()
        config = loaded.config
        log = open_log(config.log, config.log_level, config.log_format, foreground=not start.until_idle)
        for text in loaded.warnings:
            log.warning(text)
        declared = folder_for(start.config)
        is_abandoned = main.run(loaded, start.socket, log, start.until_idle, lambda: _ready(start), load, declared)
    except (GangwayError, OSError) as error:
        _report_failure(start.ready_fd, error)
        return 2 if isinstance(error, InvalidRequest) else 1
    except Exception as error:
        log.failure(error)
        _report_failure(start.ready_fd, HostRefused(f"internal error: {error!r}; the log has the details"))
        return 1
    finally:
        if start.until_idle:
            detach.remove_groups(name, is_abandoned)
    return 0


def _ready(start: Start) -> None:
    """Record how an operator has started the daemon, and report that it serves.

    Memory that only the start has used is returned to the kernel.  There is little garbage that only a collection would
    find: 0.2 MB.
    """
    if not start.until_idle:
        start.record(os.environ)
    gc.freeze()
    gc.enable()
    with suppress(AttributeError):  # glibc's; musl has none
        ctypes.CDLL(None).malloc_trim(0)
    if start.ready_fd is not None:
        with suppress(OSError):
            os.write(start.ready_fd, b"0\n")
        os.close(start.ready_fd)
        start.ready_fd = None  # another file may get the number


def _report_failure(ready_fd: int | None, error: Exception) -> None:
    if ready_fd is None:
        print(f"gangway: {error}", file=sys.stderr)
        return
    with suppress(OSError):  # the starting process has exited
        os.write(ready_fd, f"{type(error).__name__} {error}".encode())


if __name__ == "__main__":
    sys.exit(run())
