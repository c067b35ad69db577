"""What the tests with a real dockerd stand on: a host with dockerd, its containers, and a neighbour.

The proxy is gangway's; `DOCKER_PROXY=/usr/sbin/docker-proxy` holds the reference to the same tests.  That one fails
two of them: it answers a UDP client from another address than the client asked (127.1.2.3; a container that asks
172.30.0.1).
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from lab import echo_server
from lab.dockerd import Dockerd
from lab.netns import Host

PROXY = Path(os.environ.get("DOCKER_PROXY", Path(__file__).parents[2] / ".venv/bin/gangway-docker-proxy"))
_DOCKERS_OWN = {"dockerd", "containerd", "containerd-shim-runc-v2", "runc", "exe"}
_numbers = count(1)


class Site:
    """A host with dockerd on it, and a neighbour of it on the same network."""

    def __init__(self, host: Host, docker: Dockerd) -> None:
        self.host = host
        self.docker = docker
        self.neighbour = host.container()

    def container(self, *flags: str, serving: tuple[int, ...] = ()) -> str:
        """Runs a container whose ports `serving` answer; gives its name."""
        name = f"box{next(_numbers)}"
        self.docker.run("run", "-d", "--init", "--name", name, *flags, self.docker.image, "sleep", "1h")
        self.serve(name, *serving)
        return name

    def serve(self, name: str, *ports: int) -> None:
        """Starts the server in a container (again)."""
        if ports:
            echo_server.serve(partial(self.docker.popen_in, name), *ports)

    def remove(self, *names: str) -> None:
        """Removes containers that may run."""
        self.docker.run("rm", "-f", *names)

    def ask(self, port: int, address: str = "127.0.0.1", protocol: str = "tcp") -> str:
        """Asks from the host; gives the address that the server saw."""
        with self.host.entered():
            return echo_server.request_here(protocol, address, port).peer

    def bound(self, port: int, family: socket.AddressFamily = socket.AF_INET) -> closing[socket.socket]:
        """Binds a port of the host as a server would, for a `with` block; OSError if it is taken."""
        with self.host.entered():
            server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind(("", port))
            server.listen()
        except BaseException:
            server.close()
            raise
        return closing(server)

    def is_free(self, port: int) -> bool:
        """Whether somebody else could bind a port of the host, of either family."""
        try:
            with self.bound(port), self.bound(port, socket.AF_INET6):
                return True
        except OSError:
            return False

    def proxies(self) -> list[str]:
        """The command lines of the proxy's processes: of all that dockerd has started, but not its own."""
        lines = self.docker.processes().values()
        return [" ".join(words) for words in lines if words and Path(words[0]).name not in _DOCKERS_OWN]


@contextmanager
def site(*flags: str) -> Iterator[Site]:
    """A site with a dockerd of its own."""
    with Host() as host, Dockerd(host, PROXY, *flags) as docker:
        yield Site(host, docker)
