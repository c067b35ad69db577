"""Starts a daemon."""

import fcntl
import json
import os
import select
import signal
import sys
import time
from typing import Any

from gangway import runtime
from gangway.cli.client import NoDaemon, Refused, connect, refused_by_host

# How long a daemon may take to start, and how often to look whether the folder is still locked.
_START_S, _LOOK_S = 60.0, 0.05


def start_daemon(path: str) -> None:
    """Start a daemon that ends itself when it has nothing to do, unless one listens at `path` by now.

    The runtime folder is locked meanwhile, so that of several processes only one starts a daemon; launchers of
    docker-proxy lock it, too.  The daemon gets the options of the last one in this network namespace that an operator
    started.  Refused: it does not start.
    """
    if os.geteuid() and path.startswith(f"{runtime.BASE}/"):
        raise Refused("HostRefused", f"no daemon runs at {path}, and only root can start it: run as root")
    try:
        folder = os.open(runtime.create_folder(), os.O_RDONLY)
    except OSError as error:
        raise refused_by_host(f"no daemon runs, and none can be started: {error.filename}", error) from None
    try:
        _lock(folder)
        connect(path).close()
    except NoDaemon:
        _start(path)
    finally:
        os.close(folder)


def daemon_command(path: str, options: dict[str, Any], config: str | None = None, **start: Any) -> list[str]:
    """Return the command line of a daemon that listens at `path`.

    -I: it runs as root, and must not import modules from the current directory.  -OO: without docstrings it takes
    8 MB less.
    """
    if "state" in options:
        options["state"] = os.path.abspath(options["state"])
    if config is not None:
        start["config"] = os.path.abspath(config)
    if os.path.abspath(path) != runtime.default_socket():
        start["socket"] = os.path.abspath(path)
    return [sys.executable, "-I", "-OO", "-m", "gangway.daemon", json.dumps({"options": options, **start})]


def _start(path: str) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    command = daemon_command(path, {}, until_idle=True, ready_fd=writing)
    actions = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    os.close(writing)
    in_time = bool(select.select([reading], [], [], _START_S)[0])
    status = os.read(reading, 65536).decode(errors="replace") if in_time else ""  # the daemon writes it at once
    os.close(reading)
    if not in_time:
        os.kill(pid, signal.SIGTERM)
        raise Refused("HostRefused", f"the daemon did not start within {_START_S:.0f} s: stopped it")
    if status != "0\n":
        kind, _, text = status.partition(" ")
        raise Refused(kind or "HostRefused", text.strip() or "the daemon exited while it started")
    print(f"gangway: started a daemon (pid {pid}), which listens on {path}", file=sys.stderr)


def _lock(folder: int) -> None:
    """Lock a folder until it is closed.  Refused: another process keeps it locked."""
    deadline_s = time.monotonic() + _START_S
    while True:
        try:
            return fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                text = f"another process has been starting a daemon for {_START_S:.0f} s, and keeps"
                raise Refused("HostRefused", f"{text} {runtime.folder()} locked") from None
            time.sleep(_LOOK_S)
