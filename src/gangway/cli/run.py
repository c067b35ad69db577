"""`gangway run`: a command in a network namespace of its own, attached and published while it runs.

The command's process is created first, in a new network namespace, and waits; the daemon attaches that namespace and
publishes its ports; then the process becomes the command.  When the process ends, so does the namespace, and the daemon
notices that by itself; the container is detached all the same, so that its ports are free at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from gangway.errors import GangwayError
from gangway.host import netns

_NOT_FOUND, _FAILED = 127, 126  # as in sh(1)


def run(command: Sequence[str], begin: Callable[[int], None]) -> int:
    """Run a command and return its exit code, or 128 + n after signal n.

    `begin(pid)` is called when the namespace exists; if it raises, the command does not run.
    """
    ready, is_ready = os.pipe()
    go, let_go = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.close(let_go)
        _become(command, is_ready, go)
    os.close(is_ready)
    os.close(go)
    try:
        with open(ready, "rb") as status:
            if status.read() == b"0":
                begin(pid)
                os.write(let_go, b"0")
    finally:
        os.close(let_go)
        code = _wait(pid)
    return code


def _become(command: Sequence[str], is_ready: int, go: int) -> None:
    """In the child: create a namespace, wait for a byte, and become the command.  At the end of the pipe, exit."""
    code = 1
    try:
        netns.unshare()
        os.write(is_ready, b"0")
        os.close(is_ready)
        if os.read(go, 1):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and the command would inherit that
            os.execvp(command[0], list(command))
    except FileNotFoundError:
        code = _NOT_FOUND
        print(f"gangway: {command[0]}: no such command", file=sys.stderr)
    except OSError as error:
        code = _FAILED
        print(f"gangway: {command[0]}: {error.strerror}", file=sys.stderr)
    except GangwayError as error:
        print(f"gangway: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> int:
    """Wait for a process and return its exit code; pass SIGTERM on to it.

    Ctrl-C at a terminal reaches the process as well, which decides what to do; so it is ignored here.
    """
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda _signal, _frame: os.kill(pid, signal.SIGTERM)),
    }
    _, status = os.waitpid(pid, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
