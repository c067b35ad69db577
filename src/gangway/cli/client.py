"""Asks the daemon: HTTP over its unix socket.

What this file knows: how a request and its answer look on the wire, and how a daemon is started when there is none.
What it must not know: what is asked.

It is not http.client: importing that takes twice as long as asking does, and a command is mostly its imports.  The
daemon's answers have a Content-Length and the connection ends after each, so there is little to get wrong.  For the
same reason `typing` is for the type checker only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_SOCKET = "/run/gangway/gangway.sock"
STATE = "/var/lib/gangway/state.db"
"""The database of the daemon at the default socket; that of any other is beside its socket."""


# How long one waits for a daemon that somebody else is starting.
_PATIENCE_S = 5.0


class Refused(Exception):
    """The daemon said no, or cannot be asked.  `kind` is that of the error, as in `gangway.errors`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind

    @property
    def exit_code(self) -> int:
        """2: what was asked makes no sense; 1: it failed."""
        return 2 if self.kind == "InvalidRequest" else 1


class NoDaemon(Exception):
    """Nobody listens on the socket."""


def socket_path() -> str:
    """Where the daemon listens, unless a command says otherwise."""
    return os.environ.get("GANGWAY_SOCKET") or DEFAULT_SOCKET


def ask(path: str, method: str, target: str, body: object = None) -> Any:
    """Asks a daemon; starts one if there is none.  Refused: it said no."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask_running(path, method, target, body)
        except NoDaemon as nobody:
            try:
                start_daemon(path)
            except Refused as error:
                # Another command may have started one at the same moment, which does not listen yet.
                if error.kind != "Conflict" or time.monotonic() > deadline_s:
                    raise error from nobody
                time.sleep(0.05)


def ask_running(path: str, method: str, target: str, body: object = None) -> Any:
    """Asks a daemon.  NoDaemon: there is none."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: gangway\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise NoDaemon from None
        except OSError as error:
            advice = "; run as root" if isinstance(error, PermissionError) else ""
            raise Refused("HostRefused", f"the daemon at {path} cannot be reached: {error.strerror}{advice}") from None
        try:
            sock.sendall(head.encode() + content)
            status, answer = _receive(sock)
            found = json.loads(answer)
            refusal = None if status == 200 else Refused(found["kind"], found["error"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise Refused("HostRefused", f"what listens on {path} does not answer as a daemon does: {error}") from None
    if refusal is not None:
        raise refusal
    return found


def start_daemon(path: str) -> None:
    """Starts a daemon that ends itself when nothing is left to keep, and says so.  Refused: it does not start.

    It is told what the last one at this socket was told.
    """
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    command = daemon_command(path, **_last_start(path), until_idle=True, ready_fd=writing)
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    os.close(null)
    os.close(writing)
    with open(reading) as status:
        said = status.read()
    if said != "0\n":
        kind, _, text = said.partition(" ")
        raise Refused(kind or "HostRefused", text.strip() or "the daemon does not start, and does not say why")
    print(f"gangway: started a daemon (pid {pid}), which listens on {path}", file=sys.stderr)


def daemon_command(
    path: str, options: dict[str, Any] | None = None, config: str | None = None, **start: Any
) -> list[str]:
    """The command line of a daemon for a socket.

    -I: it is root's, and must not import what lies in the current directory.  -OO: without docstrings it takes some
    8 MB less.
    """
    path = os.path.abspath(path)
    given = {"state": STATE if path == DEFAULT_SOCKET else f"{path}.db", **(options or {})}
    given["state"] = os.path.abspath(given["state"])
    told = {"socket": path, "options": given, "config": config and os.path.abspath(config), **start}
    return [sys.executable, "-I", "-OO", "-m", "gangway.daemon", json.dumps(told)]


def _last_start(path: str) -> dict[str, Any]:
    """How the last daemon at this socket was started, if it was one of this user's and has left word of it."""
    word = f"{os.path.abspath(path)}.start"
    try:
        if os.stat(word).st_uid != os.geteuid():
            return {}
        with open(word) as file:
            told = json.load(file)
        return {"options": told["options"], "config": told["config"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _receive(sock: socket.socket) -> tuple[int, bytes]:
    """The status and the body of an answer.  ValueError: it is none."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    head, found, body = b"".join(parts).partition(b"\r\n\r\n")
    if not found:
        raise ValueError("it ended before it answered")
    return int(head.split(None, 2)[1]), body
