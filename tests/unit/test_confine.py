"""What the relay may call the kernel for: a call that is not listed fails, and one that no relay makes ends it."""

import signal
import subprocess
import sys

import pytest

CONFINED = """
import ctypes, os, socket
from gangway.relay.core.serving import confine
from gangway.relay.privilege import drop_privileges
drop_privileges()
confine()
try:
    {call}
except OSError as error:
    print(error.strerror)
else:
    print("done")
"""


def outcome(call: str) -> tuple[int, str]:
    """Return the exit status of a confined process that makes a call, and what it printed."""
    command = [sys.executable, "-c", CONFINED.format(call=call)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return ran.returncode, ran.stdout.strip()


@pytest.mark.parametrize("call", ['os.execv("/bin/true", ["true"])', "os.fork()", "ctypes.CDLL(None).unshare(0)",
                                  "os.setuid(0)", "os.kill(1, 0)", "socket.socket(socket.AF_PACKET)"])  # fmt: skip
def test_call_that_no_relay_makes_ends_the_process(call: str) -> None:
    assert outcome(call) == (-signal.SIGSYS, "")


def test_call_that_is_not_listed_fails() -> None:
    assert outcome('os.mkdir("/tmp/never")') == (0, "Function not implemented")


def test_threads_that_have_just_been_started_begin() -> None:
    """A thread's first calls come after the list applies to it, if the machine is busy."""
    call = "[os.sched_yield() for _ in range(100)]"
    threads = """
from gangway.log import Log
from gangway.relay.core.loop import Loop
from gangway.relay.core.serving import Core
from gangway.relay.settings import Settings
core = Core(Loop(), Settings()._replace(workers=16), Log(print))
"""
    command = [sys.executable, "-c", CONFINED.replace("confine()\n", threads + "confine()\n").format(call=call)]
    for _ in range(5):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (ran.returncode, ran.stdout) == (0, "done\n")


@pytest.mark.parametrize("call", ['socket.create_server(("127.0.0.1", 0)).close()', "os.kill(os.getpid(), 0)"])
def test_listed_call_is_made(call: str) -> None:
    assert outcome(call) == (0, "done")
