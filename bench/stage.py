"""A host and a container, made for one contender's turn.

What this file knows: in which order they come up and go.  What it must not know: what happens on them.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.contenders import Contender, Port
from bench.processes import Group
from lab.netns import Container, Host


@dataclass(frozen=True)
class Stage:
    """The host, a container behind its bridge, and the contender's processes on the host."""

    contender: Contender
    host: Host
    box: Container
    group: Group
    scratch: Path

    @property
    def address(self) -> str:
        """Where the host's clients find what is published."""
        return self.contender.address(self.box.address4)

    def publish(self, *ports: Port) -> None:
        self.contender.publish(self.group, self.box.address4, ports, self.scratch)


@contextmanager
def staged(contender: Contender) -> Iterator[Stage]:
    """The stage for one turn.  First the contender ends, then the container's server, then the namespaces."""
    with tempfile.TemporaryDirectory(prefix="gangway-bench-") as directory, Host() as host:
        scratch = Path(directory)
        group = Group(host, scratch / "log")
        try:
            yield Stage(contender, host, host.container(), group, scratch)
        finally:
            group.end()
