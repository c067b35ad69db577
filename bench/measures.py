"""How each row is measured: a function from a contender's turn to a figure.

Some functions return a pair, gangway's figure and its reference; some return the figures of several rows, because they
take long. Before traffic is measured, the same traffic runs for `WARM_UP_S`: docker-proxy's heap grows. Figures are in
seconds, bytes, or per second.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import mean, median

from bench import database, docker_front, traffic, unrelated
from bench.contenders import DockerProxy
from bench.errors import CannotCarry
from bench.many_containers import mapping, publication_s, with_many_containers
from bench.publishing import all_ports, many_in_docker
from bench.ranges import last_port
from bench.setup import Port
from bench.traffic import DATAGRAMS, NEEDED, STREAMS, LoadResult
from bench.turn import WARM_UP_S, Outcome, Turn, check_road, daemon_setup, medians, widen_port_range
from lab.dockerd import Dockerd, DockerFailed
from lab.processes import pss_kib

SUSTAINED_S, QUICK_SUSTAINED_S = 30, 12
STARTS = 50
PORTS = 500
UDP_CLIENTS = 2000
DOCKER_PORTS = 200
MAPPINGS = 10_000
BATCH = 500
SLICES = 30
IDLE_CONNECTIONS, IDLE_PORTS = 9_500, 4  # in gangway's relay each one has two of its 20,000 descriptors
BULK_FACTOR = 4  # bulk transfers run longer: how well the two ends of a connection keep in step varies
ALTERNATIONS, QUICK_ALTERNATIONS = 60, 20
PUBLICATIONS, COMMANDS = 50, 40
SETTLE_S = 1.0
REAP_S = 0.1
IDLE_LIMIT_BYTES, IDLE_RELAY_LIMIT_BYTES = 60e6, 12e6
REQUESTS = 100_000  # whose CPU time is a row
_FIRST = 10000
_PYTHON = "/usr/bin/python3"  # the Python of gangway's virtual environment


def rate(mode: str, clients: int, turn: Turn) -> float:
    """Return operations (or bytes) per second."""
    _serve(turn, (NEEDED[mode],))
    turn.load.run(turn.setup, mode, clients, WARM_UP_S)
    return turn.load.run(turn.setup, mode, clients, turn.seconds).rate


def request_response(clients: int, rows: Sequence[str], turn: Turn) -> dict[str, Outcome]:
    """Return operations per second, the CPU seconds for `REQUESTS` of them, and the 99th percentile of the latency."""
    _serve(turn, (NEEDED["rr"],))
    result, cpu_s = _run_with_cpu_time("rr", clients, turn)
    return dict(zip(rows, ((result.rate,), (cpu_s / result.done * REQUESTS,), (result.p99_s,)), strict=False))


def bulk(clients: int, rows: Sequence[str], turn: Turn) -> dict[str, Outcome]:
    """Return bytes per second to and from the container, and the CPU seconds per byte, the mean of both directions."""
    _serve(turn, STREAMS)
    runs = [_run_with_cpu_time(mode, clients, turn) for mode in ("up", "down")]
    cpu_for_byte = mean(cpu_s / result.done for result, cpu_s in runs)
    return dict(zip(rows, (*((result.rate,) for result, _ in runs), (cpu_for_byte,)), strict=False))


def connection_rate(turn: Turn) -> float:
    """Return connections per second, with enough local ports; sustained_connection_rate measures without them."""
    widen_port_range(turn.setup)
    return rate("crr", 16, turn)


def sustained_connection_rate(turn: Turn) -> float:
    """Return connections per second after the first third of the time: 28,000 local ports last for about 4 s."""
    seconds = QUICK_SUSTAINED_S if turn.quick else SUSTAINED_S
    turn.setup.host.sysctl("net.ipv4.ip_local_port_range", "32768 60999")  # the kernel's defaults
    turn.setup.host.sysctl("net.ipv4.tcp_tw_reuse", 2)
    _serve(turn, STREAMS)
    each_second = turn.load.run(turn.setup, "crr", 16, seconds).each_second
    return mean(each_second[seconds // 3 :])


def transaction_rate(clients: int, turn: Turn) -> float:
    """Return pgbench's transactions per second."""
    server = turn.database()
    with server.served(turn.setup):
        turn.setup.publish(database.PORT)
        server.run(turn.setup, clients, WARM_UP_S)
        return server.run(turn.setup, clients, turn.seconds)


def start_time(turn: Turn) -> float:
    """Return the median time to start a launcher; the launchers before it keep running, as with dockerd."""
    contender = turn.setup.contender
    assert isinstance(contender, DockerProxy)
    first, *others = _ports(STARTS + 1)
    turn.setup.publish(first)
    return median(
        turn.setup.group.start_launcher(contender.command(turn.setup.container_address, port)) for port in others
    )


def port_memory(turn: Turn) -> float:
    """Return the memory per port of all processes in the host's namespace: launchers, daemon and relay."""
    turn.setup.publish(*_ports(PORTS))
    return turn.setup.group.pss_bytes() / PORTS


def client_memory(turn: Turn) -> float:
    """Return the memory per UDP client, after a request and its answer; the proxy remembers the client for a while."""
    group = turn.setup.group
    _serve(turn, DATAGRAMS)
    turn.load.run(turn.setup, "udp", 1, 0)
    before = group.pss_bytes()
    turn.load.run(turn.setup, "udp", UDP_CLIENTS, 0)
    return (group.pss_bytes() - before) / UDP_CLIENTS


def connection_memory(turn: Turn) -> float:
    """Return the memory per connection that has exchanged one byte and is open."""
    group, ports = turn.setup.group, _ports(IDLE_PORTS)
    _serve(turn, tuple(ports))
    for port in ports:
        with turn.load.idle(turn.setup, 1, port.host):
            pass
    before = group.pss_bytes()
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(turn.load.idle(turn.setup, IDLE_CONNECTIONS // IDLE_PORTS, port.host))
        time.sleep(SETTLE_S)
        return (group.pss_bytes() - before) / IDLE_CONNECTIONS


def docker_time(turn: Turn) -> float:
    """Return the seconds to start and to remove a container with many ports."""
    contender = turn.setup.contender
    assert isinstance(contender, DockerProxy)
    ports = f"{_FIRST}-{_FIRST + DOCKER_PORTS - 1}"
    try:
        with Dockerd(turn.setup.host, contender.program) as docker:
            start_s = time.perf_counter()
            docker.run("run", "-d", "--name", "bench", "-p", f"{ports}:{ports}", docker.image, "sleep", "1d")
            docker.run("rm", "-f", "bench")
            return time.perf_counter() - start_s
    except DockerFailed as error:
        raise CannotCarry(str(error)) from None


def rate_and_direct(mode: str, clients: int, turn: Turn) -> tuple[float, float]:
    """Return operations (or bytes) per second to the published port and to the container's own, in alternation."""
    _serve(turn, (NEEDED[mode],))
    published, direct = turn.setup, replace(turn.setup, address=turn.setup.container_address)
    slice_s = turn.seconds / SLICES * (BULK_FACTOR if mode in ("up", "down") else 1)
    turn.load.run(published, mode, clients, WARM_UP_S)
    rates: dict[str, list[float]] = {published.address: [], direct.address: []}
    for number in range(SLICES):
        for setup in (published, direct)[:: -1 if number % 2 else 1]:
            rates[setup.address].append(turn.load.run(setup, mode, clients, slice_s).rate)
    check_road(daemon_setup(turn.setup))
    return mean(rates[published.address]), mean(rates[direct.address])


def connection_rate_and_direct(turn: Turn) -> tuple[float, float]:
    """Return connections per second to the published port and to the container's own."""
    widen_port_range(turn.setup)
    return rate_and_direct("crr", 16, turn)


def unrelated_connect_time(mode: str, turn: Turn) -> tuple[float, float]:
    """Return the time of a connect() to a port that is not published, with gangway's eBPF programs and without."""
    alternations = QUICK_ALTERNATIONS if turn.quick else ALTERNATIONS
    return medians(unrelated.times_s(turn.setup.host, turn.load, mode, MAPPINGS, alternations))


def publish_time(turn: Turn) -> tuple[float, float]:
    """Return the median time to publish another port by the API, with many published and with none.

    Two daemons alternate.
    """
    with turn.setup.contender.set_up() as other:
        full, empty = daemon_setup(turn.setup), daemon_setup(other)
        for first in range(_FIRST, _FIRST + MAPPINGS, BATCH):
            full.request_ports("/mappings", [mapping(port) for port in range(first, first + BATCH)])
        times = [(publication_s(full), publication_s(empty)) for _ in range(PUBLICATIONS)]
    return medians(times)


def command_time(turn: Turn) -> tuple[float, float]:
    """Return the median time of the command `gangway publish`, and of a Python that does nothing, alternating."""
    setup = daemon_setup(turn.setup)
    times = []
    for port in range(_FIRST, _FIRST + COMMANDS + 1):
        command_s = setup.command_s("publish", setup.container.name, "-p", f"{port}:{traffic.ECHO}")
        times.append((command_s, setup.group.run_s([_PYTHON, "-c", "pass"])))
        setup.request_ports("/mappings/withdraw", ())
    return medians(times[1:])  # the first pair warms the caches


def idle_memory(turn: Turn) -> dict[str, Outcome]:
    """Return the memory of the daemon and its relay with one idle port, and that of the relay; and the limits."""
    turn.setup.publish(*_ports(1))
    time.sleep(SETTLE_S)
    relay_bytes = pss_kib(daemon_setup(turn.setup).gangway.relays()) * 1024
    return {
        "idle-memory": (turn.setup.group.pss_bytes(), IDLE_LIMIT_BYTES),
        "idle-relay-memory": (relay_bytes, IDLE_RELAY_LIMIT_BYTES),
    }


def _serve(turn: Turn, ports: tuple[Port, ...]) -> None:
    turn.load.serve(turn.setup)
    turn.setup.publish(*ports)


def _run_with_cpu_time(mode: str, clients: int, turn: Turn) -> tuple[LoadResult, float]:
    """Return a client's result, and the CPU seconds of the contender's processes meanwhile."""
    turn.load.run(turn.setup, mode, clients, WARM_UP_S)
    before = _settled_cpu_s(turn)
    result = turn.load.run(turn.setup, mode, clients, turn.seconds)
    return result, _settled_cpu_s(turn) - before


def _settled_cpu_s(turn: Turn) -> float:
    """Return the CPU seconds when socat's children have exited, and count for their parent."""
    time.sleep(REAP_S)
    return turn.setup.group.cpu_s()


def _ports(count: int) -> list[Port]:
    return [Port("tcp", traffic.ECHO, port) for port in range(_FIRST, _FIRST + count)]


MEASURES: dict[str, Callable[[Turn], float]] = {
    "rr8-16k": partial(rate, "rr16k", 8),
    "crr16": connection_rate,
    "crr-sustained": sustained_connection_rate,
    "pgbench50": partial(transaction_rate, 50),
    "pgbench1": partial(transaction_rate, 1),
    "udp1": partial(rate, "udp", 1),
    "udp64": partial(rate, "udp", 64),
    "start": start_time,
    "port-memory": port_memory,
    "udp-memory": client_memory,
    "idle-connections": connection_memory,
    "docker": docker_time,
    "relay-remote-rr8-16k": partial(rate, "rr16k", 8),
    "relay-remote-crr16": connection_rate,
    "relay-ipv6-rr64": partial(rate, "rr", 64),
    "relay-ipv6-crr16": connection_rate,
    "redirect-rr1": partial(rate, "rr", 1),
    "redirect-rr64": partial(rate, "rr", 64),
    "redirect-crr16": connection_rate,
    "redirect-up1": partial(rate, "up", 1),
    "redirect-down1": partial(rate, "down", 1),
    "redirect-udp1": partial(rate, "udp", 1),
    "redirect-udp64": partial(rate, "udp", 64),
    "nat-rr1": partial(rate, "rr", 1),
    "nat-rr64": partial(rate, "rr", 64),
    "nat-crr16": connection_rate,
}

# gangway's turns in these rows. The second figure is the reference's, which has no turn of its own.
PAIRS: dict[str, Callable[[Turn], tuple[float, float]]] = {
    "redirect-rr1": partial(rate_and_direct, "rr", 1),
    "redirect-rr64": partial(rate_and_direct, "rr", 64),
    "redirect-crr16": connection_rate_and_direct,
    "redirect-up1": partial(rate_and_direct, "up", 1),
    "redirect-down1": partial(rate_and_direct, "down", 1),
    "redirect-udp1": partial(rate_and_direct, "udp", 1),
    "redirect-udp64": partial(rate_and_direct, "udp", 64),
    "redirect-unpublished": partial(unrelated_connect_time, "served"),
    "redirect-refused": partial(unrelated_connect_time, "refused"),
    "publish-10000": publish_time,
    "publish-command": command_time,
    **{f"scale-{road}-rr64": partial(last_port, "rr", 64) for road in ("remote", "loopback", "relay")},
    **{f"scale-{road}-crr16": partial(last_port, "crr", 16) for road in ("remote", "loopback", "relay")},
    "scale-relay-udp64": partial(last_port, "udp", 64),
    "docker-front-containers-100": docker_front.many_containers,
    "docker-front-first-answer": docker_front.first_answer,
}


def _one_turn(
    measure: Callable[[int, Sequence[str], Turn], dict[str, Outcome]], clients: int, *rows: str
) -> dict[str, Callable[[Turn], dict[str, Outcome]]]:
    return dict.fromkeys(rows, partial(measure, clients, rows))


# One turn that measures several rows.
SHARED: dict[str, Callable[[Turn], dict[str, Outcome]]] = {
    **_one_turn(request_response, 1, "rr1", "rr1-cpu"),
    **_one_turn(request_response, 64, "rr64", "rr64-cpu", "rr64-p99"),
    **_one_turn(request_response, 1, "relay-remote-rr1", "relay-remote-rr1-cpu"),
    **_one_turn(request_response, 64, "relay-remote-rr64", "relay-remote-rr64-cpu", "relay-remote-rr64-p99"),
    **_one_turn(bulk, 1, "up1", "down1", "bulk-cpu"),
    **_one_turn(bulk, 8, "up8", "down8"),
    **dict.fromkeys(("idle-memory", "idle-relay-memory"), idle_memory),
    **dict.fromkeys(("scale-publish", "scale-unpublish", "scale-memory"), all_ports),
    **dict.fromkeys(("scale-one-more", "scale-restart"), with_many_containers),
    **dict.fromkeys(("docker-many-run", "docker-many-rm", "docker-many-memory", "docker-many-threads"), many_in_docker),
    **dict.fromkeys(docker_front.ROWS_BY_COUNT, docker_front.costs_by_count),
    **dict.fromkeys(docker_front.ROWS_OF_MANY, docker_front.costs_of_many),
}
