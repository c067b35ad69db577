"""`gangway run`: a namespace for a command, attached and published for as long as it runs.

What this file knows: the order of things around one process.  What it must not know: how a container is attached.

How it works.  The command's process is made first, alone in a new network namespace, and waits; the daemon attaches
that namespace and publishes its ports; then the process becomes the command.  Nothing has to be cleaned up by us: when
the process ends, so does the namespace, and the daemon notices.  We only say so at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence

from gangway.errors import GangwayError
from gangway.host import netns

_NOT_FOUND, _FAILED = 127, 126  # as sh(1) has it


def run(command: Sequence[str], begin: Callable[[int], None]) -> int:
    """Runs it; `begin(pid)` is called when its namespace is there.  Gives the exit code, 128 + n after signal n."""
    ready, is_ready = os.pipe()
    go, do_go = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        os.close(do_go)
        _become(command, is_ready, go)
    os.close(is_ready)
    os.close(go)
    try:
        with open(ready, "rb") as status:
            if status.read() == b"0":
                begin(pid)
                os.write(do_go, b"0")
    finally:
        os.close(do_go)
        code = _wait(pid)
    return code


def _become(command: Sequence[str], is_ready: int, go: int) -> None:
    """The child: gets its namespace, waits for the word, and becomes the command.  Without the word it ends."""
    code = 1
    try:
        netns.unshare()
        os.write(is_ready, b"0")
        os.close(is_ready)
        if os.read(go, 1):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and that is inherited
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
    """A terminal's Ctrl-C reaches the command, too, and it is the command's to end; SIGTERM is passed on."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda _signal, _frame: os.kill(pid, signal.SIGTERM)),
    }
    _, status = os.waitpid(pid, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
