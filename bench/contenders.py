"""The contenders: how each one is told to publish ports.

What this file knows: command lines.  What it must not know: what is measured.

Each one is run as its users run it: gangway and docker-proxy as dockerd starts them, one for each port; socat forking,
one for each port; one haproxy for all ports, in tcp mode.  `direct` is no program: the client asks the container's
own address, which is the ceiling for everything that carries bytes from one socket to another.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.processes import Group

_HAPROXY = """\
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
"""


class Port(NamedTuple):
    """A port of the container, published under the same number; or under another one."""

    protocol: str
    container: int
    host: int


class Contender(ABC):
    """Something that carries traffic from the host to the container."""

    def __init__(self, name: str) -> None:
        self.name = name

    def address(self, container: str) -> str:
        """Where the client finds the published ports."""
        return "127.0.0.1"

    @abstractmethod
    def publish(self, group: Group, container: str, ports: Sequence[Port], scratch: Path) -> None:
        """Publishes ports of a container's address, and returns when they are served."""


class Direct(Contender):
    def address(self, container: str) -> str:
        return container

    def publish(self, group: Group, container: str, ports: Sequence[Port], scratch: Path) -> None:
        pass


class DockerProxy(Contender):
    """docker-proxy, and whatever takes its command line."""

    def __init__(self, name: str, program: Path) -> None:
        super().__init__(name)
        self.program = program

    def publish(self, group: Group, container: str, ports: Sequence[Port], scratch: Path) -> None:
        for port in ports:
            group.serve(self.command(container, port))

    def command(self, container: str, port: Port) -> list[str]:
        return [
            *(str(self.program), "-proto", port.protocol, "-host-ip", "0.0.0.0", "-host-port", str(port.host)),
            *("-container-ip", container, "-container-port", str(port.container)),
        ]


class Socat(Contender):
    def publish(self, group: Group, container: str, ports: Sequence[Port], scratch: Path) -> None:
        for port in ports:
            kind = f"{port.protocol.upper()}4"
            listen = f"{kind}-LISTEN:{port.host},fork,reuseaddr"
            group.start([_found("socat"), listen, f"{kind}:{container}:{port.container}"])
        _await(group, ports)


class Haproxy(Contender):
    def publish(self, group: Group, container: str, ports: Sequence[Port], scratch: Path) -> None:
        configuration = scratch / "haproxy.cfg"
        listeners = (
            f"listen port{port.host}\n    bind 0.0.0.0:{port.host}\n    server container {container}:{port.container}\n"
            for port in ports
        )
        configuration.write_text(_HAPROXY + "".join(listeners))
        group.start([_found("haproxy"), "-db", "-f", str(configuration)])
        _await(group, ports)


def contenders(gangway: Path, docker_proxy: Path) -> dict[str, Contender]:
    """All of them, by name."""
    programs = DockerProxy("gangway", gangway), DockerProxy("docker-proxy", docker_proxy)
    everyone = (*programs, Socat("socat"), Haproxy("haproxy"), Direct("direct"))
    return {contender.name: contender for contender in everyone}


def _found(program: str) -> str:
    return shutil.which(program, path="/usr/bin:/usr/sbin") or f"/usr/bin/{program}"


def _await(group: Group, ports: Sequence[Port]) -> None:
    for protocol in {port.protocol for port in ports}:
        group.await_listening(protocol, {port.host for port in ports if port.protocol == protocol})
