"""The load generator load.c: compiling it, and running its server in the container and its client."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import CannotCarry, CannotMeasure
from bench.setup import Port, Setup
from lab.netns import Namespace, end

ECHO = 7000  # the discard port and the source port follow it; see load.c
STREAMS = tuple(Port("tcp", port, port) for port in range(ECHO, ECHO + 3))
DATAGRAMS = (Port("udp", ECHO, ECHO),)
NEEDED = {
    "rr": STREAMS[0],
    "rr16k": STREAMS[0],
    "crr": STREAMS[0],
    "up": STREAMS[1],
    "down": STREAMS[2],
    "udp": DATAGRAMS[0],
}
"""By mode, the port that is needed."""
_UNPUBLISHED_PORT = 1
_PATIENCE_S = 60
_PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "text": True,
}
_SOURCES = [Path(__file__).with_name(name) for name in ("load.c", "load_connect.c", "load_server.c", "load.h")]


@dataclass(frozen=True)
class LoadResult:
    """What a client did: operations (or bytes) per second, in total, failures, and per whole second (crr only).

    99 % of the answers took at most `p99_s` seconds (rr and udp; else 0).
    """

    rate: float
    done: int
    failed: int
    p99_s: float
    each_second: list[int]


class Load:
    """The compiled load generator."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    def built(cls, directory: Path) -> "Load":
        """Compile the generator, unless the program is newer than its sources."""
        program = directory / "load"
        if program.exists() and program.stat().st_mtime >= max(one.stat().st_mtime for one in _SOURCES):
            return cls(program)
        directory.mkdir(exist_ok=True)
        made = directory / f"load.{os.getpid()}"
        command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(made), *map(str, _SOURCES[:-1])]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        if done.returncode:
            raise CannotMeasure(f"compiling load.c failed: {done.stderr.strip()}")
        made.replace(program)
        return cls(program)

    def serve(self, setup: Setup, echo: int = ECHO) -> None:
        """Start the server in the container; it ends with the setup."""
        words = [*_pinned(setup, -1), str(self._program), "serve", str(echo)]
        server = setup.container.popen(*words, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        if server.stdout.readline() != "ready\n":
            raise CannotMeasure("the load server did not start")

    def run(self, setup: Setup, mode: str, clients: int, seconds: float, echo: int = ECHO) -> LoadResult:
        """Run a client, and return its result. CannotCarry: it failed."""
        words = [*_pinned(setup, 0), str(self._program), mode, setup.address, str(echo), str(clients), f"{seconds:g}"]
        if mode == "crr":
            words += setup.client.sources
        try:
            done = setup.client.space.run(*words, check=False, timeout=seconds + _PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise CannotCarry(f"{mode} with {clients} clients timed out") from None
        if done.returncode:
            raise CannotCarry(f"{mode} with {clients} clients: {done.stderr.strip().removeprefix('load: ')}")
        *before, last = done.stdout.splitlines()
        rate, operations, failed, p99_s = last.split()
        return LoadResult(float(rate), int(operations), int(failed), float(p99_s), [int(line) for line in before])

    @contextmanager
    def idle(self, setup: Setup, clients: int, port: int) -> Iterator[None]:
        """Open connections to a port, exchange a byte on each, and keep them open during the block.

        CannotCarry: not all of them were answered.
        """
        words = [*_pinned(setup, 0), str(self._program), "idle", setup.address, str(port), str(clients), "0"]
        client = setup.client.space.popen(*words, **_PIPES)
        assert client.stdout is not None
        assert client.stderr is not None
        try:
            if client.stdout.readline() != "ready\n":
                problem = client.stderr.read().strip().removeprefix("load: ")
                raise CannotCarry(f"{clients} idle connections: {problem}")
            yield
        finally:
            end(client)

    @contextmanager
    def connecting(self, host: Namespace, mode: str, seconds: float) -> Iterator[Callable[[], float]]:
        """Start a client that connects to a port of 127.0.0.1, and yield a function that measures its connect().

        Each call makes it connect for `seconds`, and returns the median seconds of one connect(). With the mode
        "refused" no server listens on the port, with "served" the client itself does.
        """
        words = [*_core(-1), str(self._program), mode, "127.0.0.1", str(_UNPUBLISHED_PORT), f"{seconds:g}"]
        client = host.popen(*words, **_PIPES)
        requests, answers, errors = client.stdin, client.stdout, client.stderr
        assert requests is not None
        assert answers is not None
        assert errors is not None

        def connect_s() -> float:
            requests.write("\n")
            requests.flush()
            if not (line := answers.readline()):
                raise CannotMeasure(f"connections were not {mode}: {errors.read().strip()}")
            return float(line)

        try:
            yield connect_s
        finally:
            end(client)


def _pinned(setup: Setup, which: int) -> list[str]:
    """Return the words before a command that pin it to a core, if each has its own.

    Two processes that share a core never wait for another core to wake up.
    """
    return _core(which) if setup.client.own_core else []


def _core(which: int) -> list[str]:
    return ["taskset", "--cpu-list", str(sorted(os.sched_getaffinity(0))[which])]
