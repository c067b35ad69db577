"""`gangway run`: a command in a network namespace of its own.

The command's process is created first, in a new network namespace, and waits; the daemon attaches that namespace and
publishes its ports; then the process becomes the command.  When the process ends, so does the namespace, and the daemon
notices that by itself; a request of ours makes it notice at once, so that the ports are free.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from urllib.parse import quote

from gangway.cli.client import Refused, ask
from gangway.cli.views import mapping_line
from gangway.errors import GangwayError
from gangway.host import netns

_NOT_FOUND, _FAILED = 127, 126  # as in sh(1)


def run(command: Sequence[str], path: str, container: str, network: str | None, ports: Sequence[str]) -> int:
    """Run a command as a container that has these ports; return its exit code, or 128 + n after signal n.

    Refused: the daemon at `path` refused to attach or to publish, and the command was not run.
    """
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become(command, theirs)
    theirs.close()
    attached = False
    try:
        with ours:
            if ours.recv(1):
                body = {"container": container, "network": network or "", "namespace": f"/proc/{pid}/ns/net"}
                attached = bool(ask(path, "POST", "/endpoints", body))
                if ports:
                    for mapping in ask(path, "POST", "/mappings", {"container": container, "ports": ports}):
                        print(f"gangway: {mapping_line(mapping)}", file=sys.stderr)
                ours.send(b"0")
    finally:
        code = _wait(pid)
        if attached:
            _detach(path, container)
    return code


def _detach(path: str, container: str) -> None:
    """Detach a container whose command has ended; an error is reported, but the exit code is the command's."""
    try:
        ask(path, "DELETE", f"/endpoints/{quote(container, safe='')}")
    except Refused as error:
        if error.kind != "Conflict":  # the daemon has noticed its end already
            print(f"gangway: {error}", file=sys.stderr)


def _become(command: Sequence[str], parent: socket.socket) -> None:
    """In the child: create a namespace, wait for a byte, and become the command; exit if none comes."""
    code = 1
    try:
        netns.unshare()
        parent.send(b"0")
        if parent.recv(1):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the command would inherit that
            os.execvp(command[0], list(command))
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        code = _NOT_FOUND if is_missing else _FAILED
        print(f"gangway: {command[0]}: {'no such command' if is_missing else error.strerror}", file=sys.stderr)
    except GangwayError as error:
        print(f"gangway: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> int:
    """Wait for a process and return its exit code; pass SIGTERM on to it.

    Ctrl-C at a terminal reaches the process as well, which decides what to do; so it is ignored here.
    """
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    _, status = os.waitpid(pid, 0)
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGTERM, before[1])
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
