"""Many ports at once: what it costs to publish them and to withdraw them, with gangway and with dockerd.

What this file knows: both programs' commands, the machine's memory.  What it must not know: bounds.

How it works.  Each figure is a command's, from its start to its end.  gangway's is on a host with the daemon running,
the container attached and nothing published yet: so the start of its relay is part of it.  dockerd's is that of a
container with so many ports, and of its end.  Memory is what the machine has less of when all has settled: sockets,
maps and rules are in no process's account.  It is told to some 10 MB only, as each processor has a stock of free pages
that count as taken; so gangway publishes on several hosts at once, and each has its share.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

from bench.contenders import DockerProxy
from bench.curve import DOCKERD, DROP_IN, GANGWAY, Cost
from bench.daemon import DaemonSetup
from bench.errors import CannotCarry
from bench.rows import SUBJECT
from bench.setup import Setup
from bench.turn import Outcome, Turn, daemon_setup
from lab.dockerd import Dockerd, DockerFailed
from lab.processes import pss_kib

FIRST, LAST = 1024, 65000
COUNTS = (1, 10, 100, 1_000, 10_000, LAST - FIRST + 1)
DOCKER_COUNTS = (1, 10, 100, 300)  # the last one is what every port is compared with
HOSTS, QUICK_HOSTS = 8, 3
MANY, QUICK_MANY = 1_000, 100
MOST_BYTES = 64e6
_DOCKERS_FIRST = 10000
_NOT_FOR_PORTS = {"dockerd", "containerd", "containerd-shim-runc-v2"}
_PAUSE_S = 1.0  # the kernel gathers its processors' counts as often: vm.stat_interval
_SETTLED_BYTES = 500e3
_PATIENCE_S = 5


def all_ports(turn: Turn) -> dict[str, Outcome]:
    """gangway: every port from FIRST to LAST, of tcp and udp.  dockerd: the last of its counts, of tcp.

    On the way, each one's points of the curve, of tcp.
    """
    if isinstance(turn.setup, DaemonSetup):
        _gangways_points(turn)
        publish_s, withdraw_s, memory_bytes = _cost_on_hosts(turn, LAST - FIRST + 1, ("tcp", "udp"))
    else:
        publish_s, withdraw_s, memory_bytes = _dockers_points(turn)
    restless = CannotCarry("the machine's memory does not keep still: others took or freed more than this meanwhile")
    return {
        "scale-publish": (publish_s,),
        "scale-unpublish": (withdraw_s,),
        "scale-memory": (memory_bytes, MOST_BYTES) if memory_bytes > 0 else restless,
    }


def many_in_docker(turn: Turn) -> dict[str, Outcome]:
    """A container with many ports: the time of its start and its end, and what the ports' processes weigh meanwhile."""
    count = QUICK_MANY if turn.quick else MANY
    contender = _proxy(turn.setup)
    with _dockerd(turn.setup, contender) as docker:
        before = _available_bytes()
        run_s = _run_s(docker, count)
        taken = before - _available_bytes()
        ours = [pid for pid, words in docker.processes().items() if _is_for_ports(words)]
        pss_bytes, threads = pss_kib(ours) * 1024, sum(map(_threads, ours))
        cost = Cost(run_s, _remove_s(docker), taken)
    turn.curve.add(DROP_IN if contender.name == SUBJECT else DOCKERD, count, cost)
    return {
        "docker-many-run": (cost.publish_s,),
        "docker-many-rm": (cost.withdraw_s,),
        "docker-many-memory": (pss_bytes,),
        "docker-many-threads": (threads,),
    }


def _gangways_points(turn: Turn) -> None:
    for count in COUNTS:
        cost = None
        with suppress(CannotCarry):  # which is shown as a point that is not there
            cost = _cost_on_hosts(turn, count, ("tcp",))
        turn.curve.add(GANGWAY, count, cost)


def _cost_on_hosts(turn: Turn, count: int, protocols: Sequence[str]) -> Cost:
    """gangway's, for each of several hosts."""
    ports = f"{FIRST}-{FIRST + count - 1}" if count > 1 else f"{FIRST}"
    asked = [word for protocol in protocols for word in ("-p", f"{ports}:{ports}/{protocol}")]
    with ExitStack() as stack:
        hosts = QUICK_HOSTS if turn.quick else HOSTS
        setups = [daemon_setup(stack.enter_context(turn.setup.contender.set_up())) for _ in range(hosts)]
        before = _available_bytes()
        publish_s = median(setup.command_s("publish", setup.container.name, *asked) for setup in setups)
        taken = before - _available_bytes()
        withdraw_s = median(setup.command_s("unpublish", setup.container.name, *asked) for setup in setups)
    return Cost(publish_s, withdraw_s, taken / hosts)


def _dockers_points(turn: Turn) -> Cost:
    with _dockerd(turn.setup, _proxy(turn.setup)) as docker:
        for count in DOCKER_COUNTS:
            before = _available_bytes()
            run_s = _run_s(docker, count)
            taken = before - _available_bytes()
            cost = Cost(run_s, _remove_s(docker), taken)
            turn.curve.add(DOCKERD, count, cost)
    return cost


@contextmanager
def _dockerd(setup: Setup, proxy: DockerProxy) -> Iterator[Dockerd]:
    try:
        with Dockerd(setup.host, proxy.program) as docker:
            yield docker
    except DockerFailed as error:
        raise CannotCarry(str(error)) from None


def _proxy(setup: Setup) -> DockerProxy:
    assert isinstance(setup.contender, DockerProxy)
    return setup.contender


def _run_s(docker: Dockerd, count: int) -> float:
    ports = f"{_DOCKERS_FIRST}-{_DOCKERS_FIRST + count - 1}"
    start_s = time.perf_counter()
    docker.run("run", "-d", "--name", "bench", "-p", f"{ports}:{ports}", docker.image, "sleep", "1d")
    return time.perf_counter() - start_s


def _remove_s(docker: Dockerd) -> float:
    start_s = time.perf_counter()
    docker.run("rm", "-f", "bench")
    return time.perf_counter() - start_s


def _available_bytes() -> int:
    """The memory that the machine has for whoever asks, once that is steady: what has ended is freed some time after
    its end."""
    found = _available_now()
    for _ in range(round(_PATIENCE_S / _PAUSE_S)):
        time.sleep(_PAUSE_S)
        before, found = found, _available_now()
        if abs(found - before) < _SETTLED_BYTES:
            break
    return found


def _available_now() -> int:
    return int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024


def _is_for_ports(words: Sequence[str]) -> bool:
    """A launcher, a docker-proxy, a relay: whatever dockerd would not have without ports."""
    return bool(words) and Path(words[0]).name not in _NOT_FOR_PORTS


def _threads(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir()))
    except FileNotFoundError:  # it has ended
        return 0
