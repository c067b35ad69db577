"""Many ports at once: the cost of publishing and unpublishing them, with gangway and with dockerd.

Times are those of a whole command. gangway's runs on a host with the daemon running, the container attached and nothing
published yet, so that it includes the start of the relay. dockerd's starts, or removes, a container with the ports.

Memory is the decrease of the machine's available memory once that is steady, because sockets, maps and rules are not
charged to any process. It is exact to some 10 MB only: each processor keeps a stock of free pages, which count as used.
So gangway publishes on several hosts at once, and the decrease is divided by their number.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median

from bench.contenders import DockerProxy
from bench.curve import DOCKERD, GANGWAY, Cost
from bench.daemon import DaemonSetup
from bench.errors import CannotCarry
from bench.setup import Setup
from bench.turn import Outcome, Turn, daemon_setup
from lab.dockerd import Dockerd, DockerFailed
from lab.processes import pss_kib

FIRST, LAST = 1024, 65000
COUNTS = (1, 10, 100, 1_000, 10_000, LAST - FIRST + 1)
DOCKER_COUNTS = (1, 10, 100, 300)  # all ports are compared with the last one
HOSTS, QUICK_HOSTS = 8, 3
MANY, QUICK_MANY = 1_000, 100
LIMIT_BYTES = 64e6
_DOCKER_FIRST = 10000
_WITHOUT_PORTS = {"dockerd", "containerd", "containerd-shim-runc-v2"}
_PAUSE_S = 1.0  # the kernel sums up its processors' counters at this interval (vm.stat_interval)
_SETTLED_BYTES = 500e3
_PATIENCE_S = 5


def all_ports(turn: Turn) -> dict[str, Outcome]:
    """Measure gangway with all ports from FIRST to LAST, tcp and udp; dockerd with the last of its counts, tcp.

    Also adds the points of the contender to the curve, with tcp ports only.
    """
    if isinstance(turn.setup, DaemonSetup):
        _add_gangway_points(turn)
        publish_s, unpublish_s, memory_bytes = _cost_on_hosts(turn, LAST - FIRST + 1, ("tcp", "udp"))
    else:
        publish_s, unpublish_s, memory_bytes = _add_docker_points(turn)
    unsteady = CannotCarry("available memory is not steady: other programs used or freed more than this meanwhile")
    return {
        "scale-publish": (publish_s,),
        "scale-unpublish": (unpublish_s,),
        "scale-memory": (memory_bytes, LIMIT_BYTES) if memory_bytes > 0 else unsteady,
    }


def many_in_docker(turn: Turn) -> dict[str, Outcome]:
    """Measure starting and removing a container with many ports, and its proxies: launchers, daemon and relay."""
    count = QUICK_MANY if turn.quick else MANY
    with _dockerd(turn.setup, _proxy(turn.setup)) as docker:
        run_s = _run_s(docker, count)
        proxies = [pid for pid, words in docker.processes().items() if _is_for_ports(words)]
        pss_bytes, threads = pss_kib(proxies) * 1024, sum(map(_threads, proxies))
        remove_s = _remove_s(docker)
    return {
        "docker-many-run": (run_s,),
        "docker-many-rm": (remove_s,),
        "docker-many-memory": (pss_bytes,),
        "docker-many-threads": (threads,),
    }


def _add_gangway_points(turn: Turn) -> None:
    for count in COUNTS:
        cost = None
        with suppress(CannotCarry):  # the curve then has no such point
            cost = _cost_on_hosts(turn, count, ("tcp",))
        turn.curve.add(GANGWAY, count, cost)


def _cost_on_hosts(turn: Turn, count: int, protocols: Sequence[str]) -> Cost:
    """Return gangway's cost per host, with several hosts at once."""
    ports = f"{FIRST}-{FIRST + count - 1}" if count > 1 else f"{FIRST}"
    arguments = [word for protocol in protocols for word in ("-p", f"{ports}:{ports}/{protocol}")]
    with ExitStack() as stack:
        hosts = QUICK_HOSTS if turn.quick else HOSTS
        setups = [daemon_setup(stack.enter_context(turn.setup.contender.set_up())) for _ in range(hosts)]
        before = _available_bytes()
        publish_s = median(setup.command_s("publish", setup.container.name, *arguments) for setup in setups)
        used = before - _available_bytes()
        unpublish_s = median(setup.command_s("unpublish", setup.container.name, *arguments) for setup in setups)
    return Cost(publish_s, unpublish_s, used / hosts)


def _add_docker_points(turn: Turn) -> Cost:
    with _dockerd(turn.setup, _proxy(turn.setup)) as docker:
        for count in DOCKER_COUNTS:
            before = _available_bytes()
            run_s = _run_s(docker, count)
            used = before - _available_bytes()
            cost = Cost(run_s, _remove_s(docker), used)
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
    """Start the container, and return the seconds that took."""
    ports = f"{_DOCKER_FIRST}-{_DOCKER_FIRST + count - 1}"
    start_s = time.perf_counter()
    docker.run("run", "-d", "--name", "bench", "-p", f"{ports}:{ports}", docker.image, "sleep", "1d")
    return time.perf_counter() - start_s


def _remove_s(docker: Dockerd) -> float:
    """Remove the container, and return the seconds that took."""
    start_s = time.perf_counter()
    docker.run("rm", "-f", "bench")
    return time.perf_counter() - start_s


def _available_bytes() -> int:
    """Return the available memory once it is steady: the kernel frees memory some time after a process has exited."""
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
    """True for a launcher, gangway's daemon, a relay or a docker-proxy: what would not run without ports."""
    return bool(words) and Path(words[0]).name not in _WITHOUT_PORTS


def _threads(pid: int) -> int:
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir()))
    except FileNotFoundError:  # the process has exited
        return 0
