"""`gangway run`: a command in a network namespace of its own.

The command's process is created first, in a new network namespace, and waits; the daemon attaches that namespace and
publishes its ports; then the process becomes the command.  When the process ends, so does the namespace, and the daemon
notices that by itself; a request of ours makes it notice at once, so that the ports are free.

Signals are passed on to the command, which decides what to do.  If this process ends before the command, the kernel
kills the command, and the daemon detaches what the command may have left running.
"""

import ctypes
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
_FROM_TERMINAL = {signal.SIGINT, signal.SIGQUIT}
_PASSED_ON = {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, *_FROM_TERMINAL}
_PATIENCE_S = 1.0
_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def run(
    command: Sequence[str],
    path: str,
    container: str,
    network: str | None,
    ports: Sequence[str],
    admitted: Sequence[str],
) -> int:
    """Run a command as a container that has these ports, for clients of the subnets `admitted`, or for all.

    Return its exit code, or 128 + n after signal n.

    Refused: the daemon at `path` refused to attach or to publish, and the command was not run.
    """
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become(command, theirs, parent)
    theirs.close()
    attached = False
    try:
        with ours:
            if ours.recv(1):
                place = {"namespace": f"/proc/{pid}/ns/net", "owner": parent}
                body = {"container": container, "network": network or "", **place}
                endpoint = ask(path, "POST", "/endpoints", body)
                attached = True
                if endpoint["note"]:
                    print(f"gangway: {endpoint['note']}", file=sys.stderr)
                if ports:
                    wanted = {"container": container, "ports": ports, "from": admitted}
                    for mapping in ask(path, "POST", "/mappings", wanted):
                        print(f"gangway: {mapping_line(mapping)}", file=sys.stderr)
                signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
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


def _become(command: Sequence[str], channel: socket.socket, parent: int) -> None:
    """In the child: create a namespace, wait for a byte, and become the command; exit if none comes."""
    code = 1
    try:
        _die_with(parent)
        netns.unshare()
        channel.send(b"0")
        if channel.recv(1):
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


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, whatever ends it (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it ended before


def _wait(pid: int) -> int:
    """Wait for a process and return its exit code; pass signals on to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        received = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
        if received.si_signo != signal.SIGCHLD and not _reaches_both(received, pid):
            os.kill(pid, received.si_signo)
    while signal.sigtimedwait(_PASSED_ON, 0):
        pass  # it came too late for the command
    signal.pthread_sigmask(signal.SIG_SETMASK, before - _PASSED_ON)
    code = os.waitstatus_to_exitcode(ended[1])
    return code if code >= 0 else 128 - code


def _reaches_both(received: signal.struct_siginfo, pid: int) -> bool:
    """True if a signal was sent to the command, too: a terminal sends Ctrl-C to the whole process group.

    What another process sends may be for the group or for us alone: that shows when the command does not end by it.
    """
    if received.si_signo not in _FROM_TERMINAL:
        return False
    if received.si_code > 0:
        return True
    signal.sigtimedwait({signal.SIGCHLD}, _PATIENCE_S)  # which may be about a daemon that we have started
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
