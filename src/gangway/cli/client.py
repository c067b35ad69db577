"""Sends requests to the daemon by HTTP over its unix socket, and starts one if none runs.

It does not use http.client: importing that takes twice as long as a request, and most of a command's time is spent on
imports.  The daemon sends a Content-Length and closes the connection after each answer, so there is little to parse.
For the same reason `typing` is imported by the type checker only.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time

from gangway import runtime
from gangway.cli.progress import wait_readable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# How long to wait for a daemon that is just starting or ending, and how often to look.
_CONFLICT_S, _LOOK_S = 5.0, 0.05
# How long a daemon may take to start.
_START_S = 60.0
# How long the daemon may take to answer: a change may have to wait for others that are slow.
_ANSWER_S = 300


class Refused(Exception):
    """The daemon refused a request or cannot be reached.  `kind` names the error, as in `gangway.errors`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind
        self.exit_code = 2 if kind == "InvalidRequest" else 1


class NoDaemon(Exception):
    """No process listens on the socket."""


def socket_path() -> str:
    """Return the default path of the daemon's socket: GANGWAY_SOCKET, or else the namespace's own."""
    return os.environ.get("GANGWAY_SOCKET") or runtime.default_socket()


def ask(path: str, method: str, target: str, body: object = None) -> Any:
    """Send a request to the daemon and return its answer; start a daemon if there is none.  Refused: it failed."""
    deadline_s = time.monotonic() + _CONFLICT_S
    while True:
        try:
            return ask_running(path, method, target, body)
        except NoDaemon:
            pass
        try:
            start_daemon(path)
        except Refused as error:
            # Another daemon is just starting, and does not listen yet, or is just ending.
            if error.kind != "Conflict" or time.monotonic() > deadline_s:
                raise
            time.sleep(_LOOK_S)


def ask_running(path: str, method: str, target: str, body: object = None, limit_s: float = _ANSWER_S) -> Any:
    """Send a request to a daemon that runs, and return its answer.  NoDaemon: there is none.  Refused: it failed."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: gangway\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    received = bytearray()
    with connect(path, is_reading=method == "GET") as sock:
        try:
            sock.sendall(head.encode() + content)
            if not wait_readable(sock, limit_s, "waiting for the daemon"):
                raise BlockingIOError
            while part := sock.recv(65536):
                received += part
            status, _, answer = received.partition(b"\r\n\r\n")
            found = json.loads(answer)
            if status.split(None, 2)[1] == b"200":
                return found
            refusal = Refused(found["kind"], found["error"])
        except BlockingIOError:
            refusal = Refused("HostRefused", f"the daemon at {path} did not answer within {limit_s} s")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, ConnectionResetError) and not received:  # it ended before it accepted us
                raise NoDaemon from None
            refusal = Refused("HostRefused", f"no valid answer from the daemon at {path}: {error}")
    raise refusal


def connect(path: str, is_reading: bool = False) -> socket.socket:
    """Return a socket that is connected to the daemon.  NoDaemon: there is none.  Refused: it cannot be reached.

    A user who may not use this socket, but the one for reading, is connected to that if it `is_reading`.
    Time limits are the kernel's: a Python socket with a timeout does not block, and connecting such a one to a unix
    socket fails at once when the queue of connections is full (net/unix/af_unix.c, unix_stream_connect).
    """
    reason = runtime.socket_path_error(path)
    if reason is not None:
        raise Refused("InvalidRequest", reason)
    sock = socket.socket(socket.AF_UNIX)
    try:
        for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", _ANSWER_S, 0))
        sock.connect(path)
    except OSError as error:
        sock.close()
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            raise NoDaemon from None
        other = runtime.read_socket(path)
        if is_reading and isinstance(error, PermissionError) and other != path:
            try:
                return connect(other)
            except (NoDaemon, Refused):
                pass  # neither may this user use that one
        members = _members(path, *([other] if is_reading else []))
        raise refused_by_host(f"the daemon at {path} cannot be reached", error, members) from None
    return sock


def refused_by_host(text: str, error: OSError, others: str = "") -> Refused:
    """Return the error for what this user may not do: root may, and `others`."""
    advice = f"; run as root{others}" if isinstance(error, PermissionError) else ""
    return Refused("HostRefused", f"{text}: {error.strerror or error}{advice}")


def _members(*sockets: str) -> str:
    """Return who besides root may use one of these sockets: members of their groups."""
    import grp

    names = []
    for one in sockets:
        try:
            group = os.stat(one).st_gid
            names += [grp.getgrgid(group).gr_name] if group else []
        except (OSError, KeyError):
            pass  # the folder may not be searched, or the group has no name
    return f", or as a member of the group {' or '.join(names)}" if names else ""


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
    """Return the command line of a daemon that listens at `path`."""
    if "state" in options:
        options["state"] = os.path.abspath(options["state"])
    if config is not None:
        start["config"] = os.path.abspath(config)
    if os.path.abspath(path) != runtime.default_socket():
        start["socket"] = os.path.abspath(path)
    return [sys.executable, *runtime.python_flags(), "-m", "gangway.daemon", json.dumps({"options": options, **start})]


def _start(path: str) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    command = daemon_command(path, {}, until_idle=True, ready_fd=writing)
    actions = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(command[0], command, _environment(), file_actions=actions, setsid=True)
    os.close(writing)
    in_time = wait_readable(reading, _START_S, "starting a daemon")
    status = os.read(reading, 65536).decode(errors="replace") if in_time else ""  # the daemon writes it at once
    os.close(reading)
    if not in_time:
        os.kill(pid, signal.SIGTERM)
        raise Refused("HostRefused", f"the daemon did not start within {_START_S:.0f} s: stopped it")
    if status != "0\n":
        kind, _, text = status.partition(" ")
        raise Refused(kind or "HostRefused", text.strip() or "the daemon exited while it started")
    print(f"gangway: started a daemon (pid {pid}), which listens on {path}", file=sys.stderr)


def _environment() -> dict[str, str]:
    """Return the environment of a daemon: the settings in ours, and else the same whoever starts it.

    launcher/daemon.c has the same.
    """
    kept = {
        name: value for name, value in os.environ.items() if name == "XDG_RUNTIME_DIR" or name.startswith("GANGWAY_")
    }
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **kept}


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
