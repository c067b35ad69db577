"""What redirect and steering cost those that they do not concern: a connect() with their programs, and without.

What this file knows: gangway's loaders, proc_pid_fdinfo(5).  What it must not know: how a connect() is timed.

How it works.  The programs are attached to the root of the cgroups, so that they run for every namespace on the
machine: a host that has them cannot stand beside one that has not.  They come and go in time instead, in many short
turns, and the medians are compared: what slows the machine down for a second spoils a few turns of both.  For the same
reason nobody else may have such programs attached; a turn during which somebody has is taken again.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from bench.errors import CannotCarry
from bench.traffic import Load
from gangway.ebpf.keys import PortBlock, Target, blocks
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError
from lab.holder import Holder
from lab.netns import Namespace
from lab.waiting import wait_until

SLICE_S = 0.03
SETTLE_S = 0.02  # the kernel frees maps and programs some time after their end
_FIRST = 10000
_TARGET = Target("172.30.0.2", 80)
_PATIENCE_S = 60
_ATTEMPTS = 3  # for each turn, in the mean
_CONNECT4 = re.compile(
    r"^link_type:\tcgroup$.*^attach_type:\t10$", re.MULTILINE | re.DOTALL
)  # include/uapi/linux/bpf.h


def times_s(host: Namespace, load: Load, mode: str, mappings: int, alternations: int) -> list[tuple[float, float]]:
    """Seconds for one connect(), refused or served: with so many ports published, and with nothing attached."""
    found: list[tuple[float, float]] = []
    with load.connecting(host, mode, SLICE_S) as ask, host.entered():
        ask()  # for the caches
        for _ in range(_ATTEMPTS * alternations):
            _await_nobody()
            pair = _with_programs_s(ask, mappings), _settled_s(ask)
            if not any(_others()):
                found.append(pair)
            if len(found) == alternations:
                return found
    raise CannotCarry("other processes redirect sockets time and again")


def _with_programs_s(ask: Callable[[], float], mappings: int) -> float:
    holder = Holder()
    try:
        with closing(Redirect(holder)) as redirect, closing(Steering(holder)) as steering:
            ports = range(_FIRST, _FIRST + mappings)
            redirect.add({PortBlock("tcp", "0.0.0.0", port, port): _TARGET for port in ports})
            steering.add(blocks("tcp", "0.0.0.0", ports[0], ports[-1]))
            return _settled_s(ask)
    except GangwayError as error:
        raise CannotCarry(f"cannot redirect: {error}") from None
    finally:
        holder.stop()


def _settled_s(ask: Callable[[], float]) -> float:
    time.sleep(SETTLE_S)
    return ask()


def _await_nobody() -> None:
    try:
        wait_until(lambda: not any(_others()), "", _PATIENCE_S)
    except AssertionError:
        raise CannotCarry(f"process {next(_others(), 0)} redirects sockets, too, and would be measured") from None


def _others() -> Iterator[int]:
    """Processes that keep somebody's programs attached to connect(), but this one."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if pid != os.getpid():
            with suppress(OSError):  # it has ended, or closes a descriptor
                if any(_CONNECT4.search(path.read_text()) for path in Path(f"/proc/{pid}/fdinfo").iterdir()):
                    yield pid
