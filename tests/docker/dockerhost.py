"""The setup of the tests with a real dockerd: a host with dockerd, its containers, and another machine.

The proxy is gangway's; `DOCKER_PROXY=/usr/sbin/docker-proxy` runs the same tests with the reference. It fails two of
them, because it answers UDP clients from another address than the one they sent to (127.1.2.3; a container that sends
to 172.30.0.1).

dockerd is this machine's. Tests whose outcome may depend on its release use `engine_site`, which is also the dockerd of
another Debian release; `DOCKER_ENGINE=sid` runs all tests with the dockerd of that release.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from lab import echo_server
from lab.dockerd import Dockerd
from lab.engines import engine_root
from lab.netns import Host

PROXY = Path(os.environ.get("DOCKER_PROXY", Path(__file__).parents[2] / ".venv/bin/gangway-docker-proxy"))
ENGINES = [os.environ["DOCKER_ENGINE"]] if "DOCKER_ENGINE" in os.environ else ["", "trixie"]
"""The Debian releases of the dockerds that are tested; empty: this machine's own dockerd."""
ENGINE_PARAMETERS = [pytest.param(name, id=name or "machine", marks=pytest.mark.timeout(600)) for name in ENGINES]
"""The same for a fixture's `params`; the time limit allows for building a root."""
WITHOUT_RULES = ("--iptables=false", "--ip6tables=false", "--userland-proxy=false")
"""The flags of a dockerd that leaves networks and ports to gangway."""
_WITHOUT_PORTS = {"dockerd", "containerd", "containerd-shim-runc-v2", "runc", "exe"}
_numbers = count(1)


class Site:
    """A host with dockerd, and another machine (the neighbour) on the host's network."""

    def __init__(self, host: Host, docker: Dockerd) -> None:
        self.host = host
        self.docker = docker
        self.neighbour = host.container()

    def container(self, *flags: str, serving: tuple[int, ...] = ()) -> str:
        """Run a container with an echo server on the ports `serving`, and return its name."""
        name = f"box{next(_numbers)}"
        self.docker.run("run", "-d", "--init", "--name", name, *flags, self.docker.image, "sleep", "1h")
        self.serve(name, *serving)
        return name

    def serve(self, name: str, *ports: int) -> None:
        """Start the echo server in a container; needed again after the container was restarted."""
        if ports:
            echo_server.serve(partial(self.docker.popen_in, name), *ports)

    def remove(self, *names: str) -> None:
        """Remove containers, running or not."""
        self.docker.run("rm", "-f", *names)

    def request(self, port: int, address: str = "127.0.0.1", protocol: str = "tcp") -> str:
        """Send a request from the host, and return the client address that the server saw."""
        with self.host.entered():
            return echo_server.request_here(protocol, address, port).peer

    def bound(self, port: int, family: socket.AddressFamily = socket.AF_INET) -> closing[socket.socket]:
        """Listen on a port of the host, for a `with` block. OSError: the port is in use."""
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
        """True if a server could listen on a port of the host, with both IPv4 and IPv6."""
        try:
            with self.bound(port), self.bound(port, socket.AF_INET6):
                return True
        except OSError:
            return False

    def proxies(self) -> list[str]:
        """Return the command lines of the proxies, gangway's daemon and relay: all that run only because of ports."""
        lines = self.docker.processes().values()
        return [" ".join(words) for words in lines if words and Path(words[0]).name not in _WITHOUT_PORTS]


@contextmanager
def site(*flags: str, engine: str = ENGINES[0]) -> Iterator[Site]:
    """Create a site with its own dockerd, which is that of the Debian release `engine`."""
    with Host() as host, Dockerd(host, PROXY, *flags, engine=engine_root(engine) if engine else None) as docker:
        yield Site(host, docker)
