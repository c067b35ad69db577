"""The cost of redirect and steering for unrelated connections: a connect() with their eBPF programs and without.

The programs are attached to the root cgroup, so they run for every namespace on the machine: a host with them and one
without cannot be measured side by side. Instead the programs are attached and detached many times, for short slices,
and the medians are compared; what slows the machine down for a second affects only a few slices of both. No other
process may have such programs attached meanwhile: a slice during which one had is repeated.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from bench.errors import CannotCarry
from bench.traffic import Load
from gangway.ebpf.keys import PortBlock, SteeringState, Target, blocks
from gangway.ebpf.redirect import Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import GangwayError
from lab.holder import Holder
from lab.netns import Namespace
from lab.waiting import wait_until

SLICE_S = 0.03
SETTLE_S = 0.02  # the kernel frees maps and programs with a delay
_FIRST = 10000
_TARGET = Target("172.30.0.2", 80)
_PATIENCE_S = 60
_ATTEMPTS = 3  # per alternation, on average
_CONNECT4 = re.compile(
    r"^link_type:\tcgroup$.*^attach_type:\t10$", re.MULTILINE | re.DOTALL
)  # include/uapi/linux/bpf.h


def times_s(host: Namespace, load: Load, mode: str, mappings: int, alternations: int) -> list[tuple[float, float]]:
    """Return the seconds for one connect() with `mappings` ports published and with no program attached, in pairs.

    `mode` is "served" (a server accepts the connection) or "refused".
    """
    found: list[tuple[float, float]] = []
    with load.connecting(host, mode, SLICE_S) as connect_s, host.entered():
        connect_s()  # warms the caches
        for _ in range(_ATTEMPTS * alternations):
            _wait_for_others()
            pair = _with_programs_s(connect_s, mappings), _after_settling_s(connect_s)
            if not any(_others()):
                found.append(pair)
            if len(found) == alternations:
                return found
    raise CannotCarry("other processes keep attaching programs to connect()")


def _with_programs_s(connect_s: Callable[[], float], mappings: int) -> float:
    first, second = Holder(), Holder()
    try:
        with closing(Redirect(first)) as redirect, closing(Steering(second)) as steering:
            ports = range(_FIRST, _FIRST + mappings)
            redirect.add({PortBlock("tcp", "0.0.0.0", port, port): _TARGET for port in ports})
            steering.add(dict.fromkeys(blocks("tcp", "0.0.0.0", ports[0], ports[-1]), SteeringState.SERVED))
            return _after_settling_s(connect_s)
    except GangwayError as error:
        raise CannotCarry(f"cannot attach the eBPF programs: {error}") from None
    finally:  # they have the links, too
        first.stop()
        second.stop()


def _after_settling_s(connect_s: Callable[[], float]) -> float:
    time.sleep(SETTLE_S)
    return connect_s()


def _wait_for_others() -> None:
    try:
        wait_until(lambda: not any(_others()), "other processes to detach their programs", _PATIENCE_S)
    except AssertionError:
        raise CannotCarry(
            f"process {next(_others(), 0)} has attached programs to connect(), too: the figure would include them"
        ) from None


def _others() -> Iterator[int]:
    """Yield the pids of other processes that keep programs attached to connect()."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if pid != os.getpid():
            with suppress(OSError):  # the process has exited, or closed a descriptor
                if any(_CONNECT4.search(path.read_text()) for path in Path(f"/proc/{pid}/fdinfo").iterdir()):
                    yield pid
