"""Many mappings in many containers: the time to publish another port, and a restart of the daemon.

The containers are empty network namespaces. They are created before the daemon's host and deleted after it, all in one
batch of `ip`: a daemon that noticed their deletion would still be busy with it when it has to stop.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread

from bench.daemon import DaemonSetup
from bench.errors import CannotCarry, CannotMeasure
from bench.traffic import ECHO
from bench.turn import Outcome, Turn, daemon_setup, medians
from lab.gangwayd import CommandFailed
from lab.netns import Namespace

CONTAINERS, PORTS_EACH = 1_000, 10
QUICK_CONTAINERS = 100
PUBLICATIONS = 50
RESTARTS = 3
RESTART_LIMIT_S = 2.0
_FIRST = 10000
_PROBED = 9000
_PAUSE_S = 0.005
_PATIENCE_S = 5
_FILL_S = 300
_NAMES = f"gw-{os.getpid()}-many"


def with_many_containers(turn: Turn) -> dict[str, Outcome]:
    """Measure the time to publish another port, with many containers and with none, and the time of a restart.

    The turn's own host is the one without containers.
    """
    count = QUICK_CONTAINERS if turn.quick else CONTAINERS
    with _namespaces(count) as names, turn.setup.contender.set_up() as other:
        full, empty = daemon_setup(other), daemon_setup(turn.setup)
        _fill(full, names)
        times = [(publication_s(full), publication_s(empty)) for _ in range(PUBLICATIONS)]
        turn.load.serve(full)
        return {"scale-one-more": medians(times), "scale-restart": _restart(full, 1 + count * PORTS_EACH)}


def _fill(setup: DaemonSetup, names: Sequence[str]) -> None:
    deadline_s = time.monotonic() + _FILL_S
    for number, name in enumerate(names):
        if time.monotonic() > deadline_s:
            raise CannotCarry(f"only {number} of {len(names)} containers attached and published after {_FILL_S} s")
        first = _FIRST + number * PORTS_EACH
        setup.request("/endpoints", {"container": name, "network": setup.network})
        ports = [mapping(port) for port in range(first, first + PORTS_EACH)]
        setup.request("/mappings", {"container": name, "ports": ports})


def mapping(port: int) -> str:
    """Return a mapping of a host port as after `-p`; the container's port does not matter."""
    return f"0.0.0.0:{port}:{ECHO}/tcp"


def publication_s(setup: DaemonSetup) -> float:
    """Return the seconds that it takes to publish another port, and unpublish that port."""
    one = [mapping(_FIRST - 1)]
    start_s = time.perf_counter()
    setup.request_ports("/mappings", one)
    elapsed_s = time.perf_counter() - start_s
    setup.request_ports("/mappings/withdraw", one)
    return elapsed_s


def _restart(setup: DaemonSetup, mappings: int) -> Outcome:
    """Measure the time from the daemon's SIGTERM until the next daemon serves; no client may fail meanwhile."""
    setup.request_ports("/mappings", [mapping(_PROBED)])
    try:
        with _connecting(setup.client.space, setup.address), _connecting(setup.host, "127.0.0.1"):
            restart_s = median(_restart_s(setup) for _ in range(RESTARTS))
    except (CannotCarry, CommandFailed, AssertionError) as error:
        return CannotCarry(str(error))
    found = len(setup.gangway.json("ls"))
    return (
        (restart_s, RESTART_LIMIT_S)
        if found == mappings
        else CannotCarry(f"only {found} of {mappings} mappings restored")
    )


def _restart_s(setup: DaemonSetup) -> float:
    start_s = time.perf_counter()
    setup.gangway.stop()
    setup.gangway.start()  # returns when the daemon listens, which it does after it has checked everything
    return time.perf_counter() - start_s


@contextmanager
def _connecting(space: Namespace, address: str) -> Iterator[None]:
    """Keep connecting to an address during the block. CannotCarry: some connections failed."""
    done, failures = Event(), list[str]()

    def keep_connecting() -> None:
        with space.entered():
            while not done.wait(_PAUSE_S):
                try:
                    _connect(address)
                except OSError as error:
                    failures.append(str(error))

    client = Thread(target=keep_connecting)
    client.start()
    try:
        yield
    finally:
        done.set()
        client.join()
    if failures:
        raise CannotCarry(f"{len(failures)} connections to {address} failed: {failures[0]}")


def _connect(address: str) -> None:
    with socket.create_connection((address, _PROBED), _PATIENCE_S) as client:
        client.sendall(b"x")
        if client.recv(1) != b"x":
            raise OSError("closed without an answer")


@contextmanager
def _namespaces(count: int) -> Iterator[list[str]]:
    names = [f"{_NAMES}-{number}" for number in range(count)]
    try:
        _batch(f"netns add {name}" for name in names)
        yield names
    finally:
        _batch(f"netns delete {name}" for name in names if Path(f"/run/netns/{name}").exists())


def _batch(lines: Iterator[str]) -> None:
    """Run many `ip` commands in one process, also those after one that fails."""
    words = ["ip", "-force", "-batch", "-"]
    done = subprocess.run(words, input="\n".join(lines), text=True, capture_output=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"ip: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
