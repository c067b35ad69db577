"""The contenders in dockerd's service: how each one is told to publish ports.

What this file knows: command lines.  What it must not know: what is measured.

Each one is run as its users run it: gangway and docker-proxy as dockerd starts them, one for each port; socat forking,
one for each port; one haproxy for all ports, in tcp mode.  `direct` is no program: the client asks the container's
own address, which is the ceiling for everything that carries bytes from one socket to another.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.processes import Group
from bench.stage import Contender, Port, Stage

_HAPROXY = """\
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
"""


class Direct(Contender):
    def address(self, container: str) -> str:
        return container

    def publish(self, stage: Stage, ports: Sequence[Port]) -> None:
        pass


class Proxy(Contender):
    """A program that listens on the host."""

    def address(self, container: str) -> str:
        return "127.0.0.1"


class DockerProxy(Proxy):
    """docker-proxy, and whatever takes its command line."""

    def __init__(self, name: str, program: Path) -> None:
        super().__init__(name)
        self.program = program

    def publish(self, stage: Stage, ports: Sequence[Port]) -> None:
        for port in ports:
            stage.group.serve(self.command(stage.container, port))

    def command(self, container: str, port: Port) -> list[str]:
        return [
            *(str(self.program), "-proto", port.protocol, "-host-ip", "0.0.0.0", "-host-port", str(port.host)),
            *("-container-ip", container, "-container-port", str(port.container)),
        ]


class Socat(Proxy):
    def publish(self, stage: Stage, ports: Sequence[Port]) -> None:
        for port in ports:
            kind = f"{port.protocol.upper()}4"
            listen = f"{kind}-LISTEN:{port.host},fork,reuseaddr"
            stage.group.start([_found("socat"), listen, f"{kind}:{stage.container}:{port.container}"])
        _await(stage.group, ports)


class Haproxy(Proxy):
    def publish(self, stage: Stage, ports: Sequence[Port]) -> None:
        configuration = stage.scratch / "haproxy.cfg"
        listeners = (
            f"listen port{port.host}\n"
            f"    bind 0.0.0.0:{port.host}\n"
            f"    server container {stage.container}:{port.container}\n"
            for port in ports
        )
        configuration.write_text(_HAPROXY + "".join(listeners))
        stage.group.start([_found("haproxy"), "-db", "-f", str(configuration)])
        _await(stage.group, ports)


def in_docker(gangway: Path, docker_proxy: Path) -> dict[str, Contender]:
    """All of them, by name."""
    programs = DockerProxy("gangway", gangway), DockerProxy("docker-proxy", docker_proxy)
    everyone = (*programs, Socat("socat"), Haproxy("haproxy"), Direct("direct"))
    return {contender.name: contender for contender in everyone}


def _found(program: str) -> str:
    return shutil.which(program, path="/usr/bin:/usr/sbin") or f"/usr/bin/{program}"


def _await(group: Group, ports: Sequence[Port]) -> None:
    for protocol in {port.protocol for port in ports}:
        group.await_listening(protocol, {port.host for port in ports if port.protocol == protocol})
