"""Sends requests to the daemon by HTTP over its unix socket.

It does not use http.client: importing that takes twice as long as a request, and most of a command's time is spent on
imports.  The daemon sends a Content-Length and closes the connection after each answer, so there is little to parse.
For the same reason `typing` is imported by the type checker only.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time

from gangway import runtime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# How long to wait for a daemon that is just starting or ending, and how often to look.
_CONFLICT_S, _LOOK_S = 5.0, 0.05
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
            from gangway.cli.start import start_daemon
        try:
            start_daemon(path)
        except Refused as error:
            # Another daemon is just starting, and does not listen yet, or is just ending.
            if error.kind != "Conflict" or time.monotonic() > deadline_s:
                raise
            time.sleep(_LOOK_S)


def ask_running(path: str, method: str, target: str, body: object = None) -> Any:
    """Send a request to a daemon that runs, and return its answer.  NoDaemon: there is none.  Refused: it failed."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.1\r\nHost: gangway\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    received = bytearray()
    with connect(path) as sock:
        try:
            sock.sendall(head.encode() + content)
            while part := sock.recv(65536):
                received += part
            status, _, answer = received.partition(b"\r\n\r\n")
            found = json.loads(answer)
            if status.split(None, 2)[1] == b"200":
                return found
            refusal = Refused(found["kind"], found["error"])
        except BlockingIOError:
            refusal = Refused("HostRefused", f"the daemon at {path} did not answer within {_ANSWER_S} s")
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            refusal = Refused("HostRefused", f"no valid answer from the daemon at {path}: {error}")
    raise refusal


def connect(path: str) -> socket.socket:
    """Return a socket that is connected to the daemon.  NoDaemon: there is none.  Refused: it cannot be reached.

    Time limits are the kernel's: a Python socket with a timeout does not block, and connecting such a one to a unix
    socket fails at once when the queue of connections is full (net/unix/af_unix.c, unix_stream_connect).
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", _ANSWER_S, 0))
        sock.connect(path)
    except OSError as error:
        sock.close()
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            raise NoDaemon from None
        raise refused_by_host(f"the daemon at {path} cannot be reached", error) from None
    return sock


def refused_by_host(text: str, error: OSError) -> Refused:
    """Return the error for what the kernel refused."""
    advice = "; run as root" if isinstance(error, PermissionError) else ""
    return Refused("HostRefused", f"{text}: {error.strerror or error}{advice}")
