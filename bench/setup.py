"""A host, a container and a client, made for one contender's turn.

What this file knows: in which order they come up and go, and what is asked of a contender.  What it must not know:
what happens on them.
"""

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
    """A port of the container, published under the same number; or under another one."""

    protocol: str
    container: int
    host: int


class Client(NamedTuple):
    """Who asks."""

    space: Namespace
    sources: tuple[str, ...] = ()
    """The addresses it may connect from, if it has several."""
    own_core: bool = False
    """It has a core of its own, and so has the container's server."""


class Contender(ABC):
    """Something by which a client gets to a container."""

    def __init__(self, name: str, own_core: bool = False) -> None:
        self.name = name
        self.own_core = own_core

    @contextmanager
    def set_up(self) -> Iterator["Setup"]:
        """The setup for one turn.  First the contender ends, then the container's server, then the namespaces."""
        with Host() as host, self.client_of(host) as client, process_group(host) as (group, scratch):
            box = host.container()
            yield Setup(self, host, box, box.address4, client, self.address(box.address4), group, scratch)

    def client_of(self, host: Namespace) -> AbstractContextManager[Client]:
        """A client; on the host itself, unless a contender has it elsewhere."""
        return nullcontext(Client(host, own_core=self.own_core))

    @abstractmethod
    def address(self, container: str) -> str:
        """Where the client finds the published ports."""

    @abstractmethod
    def publish(self, setup: "Setup", ports: Sequence[Port]) -> None:
        """Publishes ports of the container, and returns when they are served."""


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
    """Where the client finds what is published."""
    group: ProcessGroup
    scratch: Path

    def publish(self, *ports: Port) -> None:
        """Has the contender publish them."""
        self.contender.publish(self, ports)


@contextmanager
def process_group(host: Namespace) -> Iterator[tuple[ProcessGroup, Path]]:
    """The contender's processes on a host, and a directory for its files; both end with the block."""
    with tempfile.TemporaryDirectory(prefix="gangway-bench-") as directory:
        scratch = Path(directory)
        group = ProcessGroup(host, scratch / "log")
        try:
            yield group, scratch
        finally:
            group.end()
