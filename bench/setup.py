"""The host, the container and the client of one contender's turn."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.processes import ProcessGroup
from lab.netns import Host, Namespace


class Port(NamedTuple):
    """A port of the container, and the host port that it is published as."""

    protocol: str
    container: int
    host: int


class Client(NamedTuple):
    """The client: where it runs, and how."""

    space: Namespace
    sources: tuple[str, ...] = ()
    """The addresses that it connects from, if it has several."""
    own_core: bool = False
    """Whether the client and the container's server each have a processor core of their own."""


class Contender(ABC):
    """A program, or nothing but routing, by which a client reaches a container."""

    def __init__(self, name: str, own_core: bool = False) -> None:
        self.name = name
        self.own_core = own_core
        self.is_remote = False  # the client is another machine
        self.is_ipv6 = False  # the client uses IPv6; the container's address is of IPv4

    @contextmanager
    def set_up(self) -> Iterator["Setup"]:
        """Create the setup for one turn. After it the contender ends first, then the server, then the namespaces."""
        with Host() as host, self.client_of(host) as client, process_group(host) as (group, scratch):
            box = host.container()
            yield Setup(self, host, box, box.address4, client, self.address(box.address4), group, scratch)

    def client_of(self, host: Namespace) -> AbstractContextManager[Client]:
        """Create a client: on the host itself, unless a contender puts it elsewhere."""
        return nullcontext(Client(host, own_core=self.own_core))

    @abstractmethod
    def address(self, container: str) -> str:
        """Return the address that the client connects to, given the container's address."""

    @abstractmethod
    def publish(self, setup: "Setup", ports: Sequence[Port]) -> None:
        """Publish ports of the container, and return when they are served."""


@dataclass(frozen=True)
class Setup:
    """The host, a container behind its bridge, a client, and the contender's processes on the host."""

    contender: Contender
    host: Namespace
    container: Namespace
    container_address: str
    """The container's address."""
    client: Client
    address: str
    """The address that the client connects to."""
    group: ProcessGroup
    scratch: Path

    def publish(self, *ports: Port) -> None:
        """Publish ports with the contender."""
        self.contender.publish(self, ports)


@contextmanager
def process_group(host: Namespace) -> Iterator[tuple[ProcessGroup, Path]]:
    """Provide a group for the contender's processes and a directory for its files; both end with the block."""
    with tempfile.TemporaryDirectory(prefix="gangway-bench-") as directory:
        scratch = Path(directory)
        group = ProcessGroup(host, scratch / "log")
        try:
            yield group, scratch
        finally:
            group.end()
