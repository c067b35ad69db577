"""Hosts with a dockerd: one as it comes, and one whose ports gangway serves instead of dockerd's rules and proxies.

The second one's dockerd writes no rules and starts no proxies; gangway's daemon reads dockerd's API (its Docker front).
Another machine is connected to each host. A container runs busybox's nc, which echoes on its last published port: a
container counts as started when that port answers the other machine, and as removed when the port is refused.
"""

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.contenders import Direct
from bench.curve import Cost
from bench.errors import CannotCarry
from bench.remote import neighbour_of
from bench.rows import SUBJECT
from bench.setup import Client, Contender, Setup
from lab.dockerd import Dockerd, DockerFailed
from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Namespace, Neighbour
from lab.processes import pss_kib

FIRST = 10000
"""The first of a container's ports, and the host port that it is published as."""
_WITHOUT_RULES = ("--iptables=false", "--ip6tables=false", "--userland-proxy=false")
_NAME = "bench"
_ATTEMPT_S = 0.005  # dockerd's own socket accepts one connection that nobody answers, and ignores the next
_PAUSE_S = 0.0005
_PATIENCE_S = 30


class DockerEngine(Direct):
    """A host on which nothing runs: each measurement starts the dockerds that it compares."""

    def __init__(self, name: str, engine: Path | None) -> None:
        """`engine` is the root that dockerd runs from; None: this machine's own."""
        super().__init__(name)
        self.engine = engine


@dataclass(frozen=True)
class DockerHost:
    """A host with a dockerd, and another machine. `gangway` is the daemon that serves the ports; None: dockerd does."""

    host: Namespace
    client: Client
    docker: Dockerd
    gangway: Gangway | None

    def start_s(self, ports: int) -> float:
        """Start a container with some ports, and return the seconds until the last one answers."""
        return sum(self.start_and_answer_s(ports))

    def start_and_answer_s(self, ports: int) -> tuple[float, float]:
        """Start a container; return the seconds that `docker run` took, and those from then to the first answer."""
        last = FIRST + ports - 1
        published = ["-p", f"{FIRST}-{last}:{FIRST}-{last}"] if ports else []
        start_s = time.perf_counter()
        self.run_container(_NAME, *published, port=last)
        returned_s = time.perf_counter()
        if ports:
            self.wait_for(last, "answered")
        return returned_s - start_s, time.perf_counter() - returned_s

    def remove_s(self, ports: int) -> float:
        """Remove that container, and return the seconds until its last port is refused."""
        start_s = time.perf_counter()
        self.docker.run("rm", "-f", _NAME)
        if ports:
            self.wait_for(FIRST + ports - 1, "refused")
        return time.perf_counter() - start_s

    def run_container(self, name: str, *flags: str, port: int) -> None:
        """Start a container whose only process echoes on a port."""
        self.docker.run("run", "-d", "--name", name, *flags, self.docker.image, *f"nc -ll -p {port} -e cat".split())

    def wait_for(self, port: int, wanted: str) -> None:
        """Wait until a connection of the other machine to a port is "answered" or "refused". CannotCarry: none is."""
        deadline_s = time.monotonic() + _PATIENCE_S
        with self.client.space.entered():
            while (found := _connection(port)) != wanted:
                if time.monotonic() > deadline_s:
                    raise CannotCarry(f"port {port} was not {wanted} within {_PATIENCE_S} s: {found}")
                time.sleep(_PAUSE_S)

    def cost(self, ports: int) -> Cost:
        """Return the seconds to start and to remove a container with some ports, and the memory for them."""
        before = self.dockerd_bytes()
        started_s = self.start_s(ports)
        memory_bytes = self.memory_bytes() - before
        return Cost(started_s, self.remove_s(ports), memory_bytes)

    def dockerd_bytes(self) -> int:
        """Return the memory (PSS) of dockerd itself."""
        return pss_kib([self.docker.pid]) * 1024

    def memory_bytes(self) -> int:
        """Return the memory (PSS) of dockerd and of what serves the ports: proxies, or gangway's daemon and relay."""
        serving = [pid for pid, words in self.docker.processes().items() if words and words[0].endswith("docker-proxy")]
        if self.gangway:
            assert self.gangway.daemon is not None
            serving += [self.gangway.daemon.pid, *self.gangway.relays()]
        return self.dockerd_bytes() + pss_kib(serving) * 1024

    def traffic_setup(self, base: Setup, from_host: bool) -> Setup:
        """Return the setup for traffic to the container, from the host by 127.0.0.1 or from the other machine."""
        return replace(
            base,
            host=self.host,
            container=_ContainerNamespace(self.docker, _NAME),
            container_address=self.docker.address_of(_NAME),
            client=Client(self.host, own_core=True) if from_host else self.client,
            address="127.0.0.1" if from_host else Neighbour.host4,
        )


class _ContainerNamespace(Namespace):
    """The namespace of a Docker container; programs that are started in it end with the container."""

    def __init__(self, docker: Dockerd, name: str) -> None:
        super().__init__(name)
        self.path = f"/proc/{docker.pid_of(name)}/ns/net"
        self._docker, self._container = docker, name

    def popen(self, *words: str, **options: Any) -> Any:
        return self._docker.popen_in(self._container, *words, **options)


def in_docker_front(engine: Path | None) -> dict[str, Contender]:
    """Return the only contender of the measurements, by name."""
    return {SUBJECT: DockerEngine(SUBJECT, engine)}


@contextmanager
def docker_hosts(base: Setup) -> Iterator[tuple[DockerHost, DockerHost]]:
    """Create both hosts: that of gangway, and the one whose dockerd is as it comes."""
    assert isinstance(base.contender, DockerEngine)
    engine = base.contender.engine
    try:
        with _with_front(engine) as front, _stock(engine) as stock:
            yield front, stock
    except (DockerFailed, CommandFailed) as error:
        raise CannotCarry((str(error).splitlines() or ["gangway's daemon did not start"])[-1]) from None


@contextmanager
def _stock(engine: Path | None) -> Iterator[DockerHost]:
    with Namespace("host") as host, neighbour_of(host) as client, Dockerd(host, engine=engine) as docker:
        yield DockerHost(host, client, docker, None)


@contextmanager
def _with_front(engine: Path | None) -> Iterator[DockerHost]:
    with (
        Namespace("host") as host,
        neighbour_of(host) as client,
        Dockerd(host, None, *_WITHOUT_RULES, engine=engine) as docker,
        tempfile.NamedTemporaryFile("w", prefix="gangway-bench-") as settings,
    ):
        settings.write(f'[docker]\nenabled = true\nsocket = "{docker.socket}"\n')
        settings.flush()
        with Gangway(host, "--firewall", "nftables", "--config", settings.name) as gangway:
            yield DockerHost(host, client, docker, gangway)
            docker.remove_containers()


def _connection(port: int) -> str:
    """Connect to the host from the other machine; return what became of the connection."""
    is_accepted = False
    with socket.socket() as client, suppress(OSError):
        client.settimeout(_ATTEMPT_S)
        try:
            client.connect((Neighbour.host4, port))
        except ConnectionRefusedError:
            return "refused"
        is_accepted = True
        client.sendall(b"x")
        if client.recv(1) == b"x":
            return "answered"
    return "accepted, without an answer" if is_accepted else "timed out"
