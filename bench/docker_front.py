"""What dockerd's ports cost and carry: dockerd as it comes, and gangway in the place of its rules and proxies.

Each measurement uses two hosts (docker_hosts.py), and returns gangway's figure, followed by that of dockerd as it
comes. Times are those beyond a container without ports on the same host. With gangway, where they are small, containers
with ports and without alternate; with dockerd as it comes ports are published once. Traffic, first answers and the loop
of many containers alternate between the hosts.
"""

import time
from collections.abc import Iterator
from statistics import mean

from bench.curve import FRONT, STOCK, Cost, median_cost
from bench.docker_hosts import FIRST, DockerHost, docker_hosts
from bench.errors import CannotCarry
from bench.setup import Setup
from bench.turn import WARM_UP_S, Outcome, Turn, medians, widen_port_range

COUNTS = (1, 10, 100, 300)
MANY, QUICK_MANY = 2_000, 100
CONTAINERS, QUICK_CONTAINERS = 100, 10
PORTS_EACH = 3
BLOCK = 10
ANSWERS, QUICK_ANSWERS = 20, 5
ANSWER_LIMIT_S = 0.020
REPEATS = 5  # of what takes less than a second
SLICES = 15
_Pair = tuple[DockerHost, DockerHost]
_TRAFFIC = (
    ("docker-front-remote-rr64", "rr", 64, False),
    ("docker-front-remote-crr16", "crr", 16, False),
    ("docker-front-loopback-rr64", "rr", 64, True),
    ("docker-front-loopback-crr16", "crr", 16, True),
)

ROWS_BY_COUNT = ("docker-front-run-300", "docker-front-rm-300")
ROWS_OF_MANY = (
    *(f"docker-front-{what}-{MANY}" for what in ("run", "rm", "memory")),
    *(row for row, *_ in _TRAFFIC),
)


def costs_by_count(turn: Turn) -> dict[str, Outcome]:
    """Measure starting and removing containers with up to 300 ports, and add the points to the curve."""
    with docker_hosts(turn.setup) as (front, stock):
        empty = _without_ports(stock)
        for count in COUNTS:
            front_cost, front_excess = _alternating_costs(front, count)
            stock_cost = stock.cost(count)
            _add_points(turn, count, front_cost, stock_cost)
    return _times(count, front_excess, _beyond(stock_cost, empty))


def costs_of_many(turn: Turn) -> dict[str, Outcome]:
    """Measure a container with many ports: starting and removing it, memory, and traffic to one of its ports."""
    count = QUICK_MANY if turn.quick else MANY
    with docker_hosts(turn.setup) as (front, stock):
        front_cost, front_excess = _alternating_costs(front, count)
        empty = _without_ports(stock)
        before = stock.dockerd_bytes()
        started_s = stock.start_s(count)
        memory_bytes = stock.memory_bytes() - before
        front.start_s(count)
        traffic = _traffic(turn, (front, stock))
        stock_cost = Cost(started_s, stock.remove_s(count), memory_bytes)
    _add_points(turn, count, front_cost, stock_cost)
    memory: Outcome = front_cost.memory_bytes, stock_cost.memory_bytes
    times = _times(MANY, front_excess, _beyond(stock_cost, empty))
    return {**times, f"docker-front-memory-{MANY}": memory, **traffic}


def many_containers(turn: Turn) -> tuple[float, float]:
    """Return the seconds to start many containers, each with a few ports, one after the other."""
    count = QUICK_CONTAINERS if turn.quick else CONTAINERS
    with docker_hosts(turn.setup) as hosts:
        for host in hosts:
            host.cost(0)  # warms the caches
        blocks = [[_block_s(host, number) for host in hosts] for number in range(0, count, BLOCK)]
    front_s, stock_s = zip(*blocks, strict=True)
    return sum(front_s), sum(stock_s)


def first_answer(turn: Turn) -> tuple[float, float]:
    """Return the median seconds from `docker run`'s return to the first answer of its port, and the limit for it."""
    with docker_hosts(turn.setup) as hosts:
        times = [_answer_times(hosts) for _ in range(QUICK_ANSWERS if turn.quick else ANSWERS)]
    front_s, stock_s = medians(times)
    return front_s, stock_s + ANSWER_LIMIT_S


def _without_ports(host: DockerHost) -> Cost:
    host.cost(0)  # warms the caches
    return median_cost(host.cost(0) for _ in range(REPEATS))


def _alternating_costs(host: DockerHost, count: int) -> tuple[Cost, Cost]:
    """Return the cost of a container with ports, and the part of it that one without ports does not have."""
    host.cost(0)  # warms the caches
    pairs = [(host.cost(0), host.cost(count)) for _ in range(REPEATS)]
    return median_cost(cost for _, cost in pairs), median_cost(_beyond(cost, empty) for empty, cost in pairs)


def _beyond(cost: Cost, empty: Cost) -> Cost:
    return cost._replace(publish_s=cost.publish_s - empty.publish_s, unpublish_s=cost.unpublish_s - empty.unpublish_s)


def _times(count: int, front: Cost, stock: Cost) -> dict[str, Outcome]:
    return {
        f"docker-front-run-{count}": (front.publish_s, stock.publish_s),
        f"docker-front-rm-{count}": (front.unpublish_s, stock.unpublish_s),
    }


def _add_points(turn: Turn, count: int, front: Cost, stock: Cost) -> None:
    turn.curve.add(FRONT, count, front)
    turn.curve.add(STOCK, count, stock)


def _traffic(turn: Turn, hosts: _Pair) -> dict[str, Outcome]:
    """Measure traffic to the first port of each host's container, in alternation."""
    for host in hosts:
        turn.load.serve(host.traffic_setup(turn.setup, from_host=False), FIRST)
    outcomes: dict[str, Outcome] = {}
    for row, mode, clients, from_host in _TRAFFIC:
        setups = [host.traffic_setup(turn.setup, from_host) for host in hosts]
        try:
            front, stock = zip(*_slices(turn, mode, clients, setups), strict=True)
            _check_redirect(hosts[0], expected=from_host)
            outcomes[row] = mean(front), mean(stock)
        except CannotCarry as error:
            outcomes[row] = error
    return outcomes


def _slices(turn: Turn, mode: str, clients: int, setups: list[Setup]) -> Iterator[list[float]]:
    """Yield the rates of each slice of time, by host."""
    for setup in setups:
        widen_port_range(setup)
        turn.load.run(setup, mode, clients, WARM_UP_S, FIRST)
    for number in range(SLICES):
        order = setups[:: -1 if number % 2 else 1]
        rates = [turn.load.run(setup, mode, clients, turn.seconds / SLICES, FIRST).rate for setup in order]
        yield rates[:: -1 if number % 2 else 1]


def _check_redirect(host: DockerHost, expected: bool) -> None:
    assert host.gangway is not None
    if any(mapping["redirected"] for mapping in host.gangway.json("ls")) != expected:
        raise CannotCarry("no socket was redirected" if expected else "sockets were redirected")


def _block_s(host: DockerHost, first: int) -> float:
    """Start a block of containers, and return the seconds until the last one answers."""
    start_s = time.perf_counter()
    for number in range(first, first + BLOCK):
        ports = [FIRST + number * PORTS_EACH + each for each in range(PORTS_EACH)]
        published = [word for port in ports for word in ("-p", f"{port}:{port}")]
        host.run_container(f"many{number}", *published, port=ports[-1])
    host.wait_for(ports[-1], "answered")
    return time.perf_counter() - start_s


def _answer_times(hosts: _Pair) -> tuple[float, float]:
    found = []
    for host in hosts:
        found.append(host.start_and_answer_s(1)[1])
        host.remove_s(1)
    return found[0], found[1]
