"""A test bed for all origins: a host with three networks and four containers, one with IPv4 only, and a neighbour.

    neighbour 10.77.0.2, fd77::2 ── 10.77.0.1, fd77::1 host ─┬─ web    172.30.0.0/24, fd30::/64: server, near
                                                              ├─ other  172.31.0.0/24, fd31::/64: far
                                                              └─ old    172.29.0.0/24: four

Every container runs an echo server on port 80; the neighbour and the containers have default routes to the host.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from lab import echo_server
from lab.gangwayd import Gangway
from lab.netns import Namespace, Neighbour
from lab.roads import observe_road

HOST4, HOST6 = Neighbour.host4, Neighbour.host6
NEIGHBOUR4, NEIGHBOUR6 = Neighbour.address4, Neighbour.address6
PORT = 80


class Box(NamedTuple):
    """A container and its addresses."""

    space: Namespace
    address4: str
    address6: str

    @property
    def name(self) -> str:
        """The container's name in gangway."""
        return self.space.name


class Street:
    """The test bed, with a daemon that is started with these flags."""

    def __init__(
        self,
        *flags: str,
        environment: dict[str, str] | None = None,
        within: tuple[str, ...] = (),
        prepare: str = "",
    ) -> None:
        self._flags = flags
        self._environment = environment
        self._within = within
        self._prepare = prepare
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.host = stack.enter_context(Namespace("host"))
            self.neighbour = stack.enter_context(Neighbour(self.host))
            self.arrange(stack)
            self.gangway = stack.enter_context(
                Gangway(self.host, *self._flags, environment=self._environment, within=self._within)
            )
            self.gangway("network", "create", "web", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
            self.gangway("network", "create", "other", "--subnet", "172.31.0.0/24", "--subnet", "fd31::/64")
            self.gangway("network", "create", "old", "--subnet", "172.29.0.0/24")
            self._containers = stack
            self.server = self.container("srv", "web")
            self.near = self.container("near", "web")
            self.far = self.container("far", "other")
            self.four = self.container("four", "old")
            self._stack = self._containers = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def arrange(self, stack: ExitStack) -> None:
        """Prepare the host before the daemon starts; `stack` cleans up after the daemon has ended."""
        if self._prepare:
            self.host.run("sh", "-ec", self._prepare)

    def leave(self) -> None:
        """Remove all of gangway's networks; the daemon goes on running."""
        for network in self.gangway.json("network", "ls"):
            for endpoint in network["endpoints"]:
                self.gangway("detach", "--if-exists", endpoint["container"])
            self.gangway("network", "rm", network["name"])

    def container(self, role: str, network: str) -> Box:
        """Create a container, attach it, and start an echo server in it."""
        space = self._containers.enter_context(Namespace(role))
        addresses = self.gangway("attach", space.name, "--network", network).split()
        echo_server.serve(space.popen, PORT)
        return Box(space, addresses[0], addresses[1] if len(addresses) > 1 else "")

    def publish(self, box: Box, *ports: str) -> list[int]:
        """Publish ports, each in the syntax of -p; return the first host port of each."""
        words = [word for port in ports for word in ("-p", port)]
        lines = self.gangway("publish", box.name, *words).splitlines()
        return [int(line.split(" -> ")[0].rpartition(":")[2].partition("-")[0]) for line in lines]

    @contextmanager
    def published(self, box: Box, *ports: str) -> Iterator[int]:
        """Publish ports for a `with` block; yield the first host port."""
        found = self.publish(box, *ports)
        try:
            yield found[0]
        finally:
            self.gangway("unpublish", box.name)

    def road(self, space: Namespace, protocol: str, address: str, port: int) -> tuple[str, str]:
        """Return the road that a client in `space` really takes, and the source address that the container sees.

        They come from the kernel's records, not from gangway.  echo_server.NoAnswer: nothing answers.
        """
        return observe_road(self.host, space, protocol, address, port)

    def reaches(self, space: Namespace, protocol: str, address: str, port: int) -> bool:
        """True if anything answers a client in `space`."""
        with space.entered():
            return echo_server.is_answered(protocol, address, port)


def without_redirect(directory: Path) -> tuple[str, str]:
    """Return the flags of a daemon that redirects no sockets; its configuration is a file in `directory`."""
    config = directory / "without-redirect.toml"
    config.write_text("[relay]\nredirect = false\n")
    return "--config", str(config)
