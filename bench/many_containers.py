"""Many mappings in many containers: one more of them, and a daemon that starts anew among them.

What this file knows: how a host is filled.  What it must not know: bounds.

How it works.  The containers are network namespaces with nobody in them.  They are made before the daemon's host and
go after it, all in one batch of `ip`: a daemon that saw them go would still be busy with that when it is to end.
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

CONTAINERS, EACH = 1_000, 10
QUICK_CONTAINERS = 100
PUBLICATIONS = 50
RESTARTS = 3
MOST_RESTART_S = 2.0
_FIRST = 10000
_VISITED = 9000
_PAUSE_S = 0.005
_PATIENCE_S = 5
_FILL_S = 300
_NAMES = f"gw-{os.getpid()}-crowd"


def with_many_containers(turn: Turn) -> dict[str, Outcome]:
    """One more port published, with many containers and with none; and the time in which the daemon starts anew.

    The turn's own host is the empty one.
    """
    count = QUICK_CONTAINERS if turn.quick else CONTAINERS
    with _namespaces(count) as names, turn.setup.contender.set_up() as other:
        laden, empty = daemon_setup(other), daemon_setup(turn.setup)
        _fill(laden, names)
        times = [(publication_s(laden), publication_s(empty)) for _ in range(PUBLICATIONS)]
        turn.load.serve(laden)
        return {"scale-one-more": medians(times), "scale-restart": _restart(laden, 1 + count * EACH)}


def _fill(setup: DaemonSetup, names: Sequence[str]) -> None:
    deadline_s = time.monotonic() + _FILL_S
    for number, name in enumerate(names):
        if time.monotonic() > deadline_s:
            raise CannotCarry(f"has attached and published {number} of {len(names)} containers after {_FILL_S} s")
        first = _FIRST + number * EACH
        setup.request("/endpoints", {"container": name, "network": setup.network})
        ports = [mapping(port) for port in range(first, first + EACH)]
        setup.request("/mappings", {"container": name, "ports": ports})


def mapping(port: int) -> str:
    """A port of the host as after `-p`; which port of the container it is does not matter."""
    return f"0.0.0.0:{port}:{ECHO}/tcp"


def publication_s(setup: DaemonSetup) -> float:
    """The time to publish one more port, which is withdrawn again."""
    one = [mapping(_FIRST - 1)]
    start_s = time.perf_counter()
    setup.request_ports("/mappings", one)
    elapsed_s = time.perf_counter() - start_s
    setup.request_ports("/mappings/withdraw", one)
    return elapsed_s


def _restart(setup: DaemonSetup, mappings: int) -> Outcome:
    """From the signal that ends the daemon until the next one serves; a client of each road must not notice."""
    setup.request_ports("/mappings", [mapping(_VISITED)])
    try:
        with _visited(setup.client.space, setup.address), _visited(setup.host, "127.0.0.1"):
            restart_s = median(_restart_s(setup) for _ in range(RESTARTS))
    except (CannotCarry, CommandFailed, AssertionError) as error:
        return CannotCarry(str(error))
    found = len(setup.gangway.json("ls"))
    return (restart_s, MOST_RESTART_S) if found == mappings else CannotCarry(f"{found} of {mappings} mappings are left")


def _restart_s(setup: DaemonSetup) -> float:
    start_s = time.perf_counter()
    setup.gangway.stop()
    setup.gangway.start()  # which does not listen before it has looked at everything
    return time.perf_counter() - start_s


@contextmanager
def _visited(space: Namespace, address: str) -> Iterator[None]:
    """Somebody connects all the time.  CannotCarry: not every time it is served."""
    over, failures = Event(), list[str]()

    def visit() -> None:
        with space.entered():
            while not over.wait(_PAUSE_S):
                try:
                    _connect(address)
                except OSError as error:
                    failures.append(str(error))

    visitor = Thread(target=visit)
    visitor.start()
    try:
        yield
    finally:
        over.set()
        visitor.join()
    if failures:
        raise CannotCarry(f"{len(failures)} connections to {address} failed meanwhile: {failures[0]}")


def _connect(address: str) -> None:
    with socket.create_connection((address, _VISITED), _PATIENCE_S) as client:
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
    """Many commands of `ip` in one process; one that fails does not keep it from the others."""
    words = ["ip", "-force", "-batch", "-"]
    done = subprocess.run(words, input="\n".join(lines), text=True, capture_output=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"ip: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
