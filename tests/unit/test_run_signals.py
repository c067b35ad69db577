"""Signals to `gangway run` that are for its command."""

import subprocess
import sys

from gangway.cli import run

_SCRIPT = """
import os, signal, sys
from gangway.cli.run import _PASSED_ON, _wait

command = os.fork()
if command == 0:
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # tests may run in the background of a shell that ignores it
    signal.alarm(30)
    signal.pause()
signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
other = os.fork()
if other == 0:
    os._exit(0)
os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
os.kill(os.getpid(), signal.SIGQUIT)
sys.exit(_wait(command))
"""


def test_the_end_of_another_child_is_not_taken_for_the_commands() -> None:
    """A daemon that `run` has started is its child, too."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT], timeout=run._PATIENCE_S + 20, check=False)
    assert done.returncode == 128 + 3
