"""The contenders under dockerd: how each of them publishes ports.

Each one runs as its users run it: gangway and docker-proxy as dockerd starts them, one process per port; socat forking,
one per port; one haproxy for all ports, in tcp mode. Where traffic is measured, gangway's redirect is off, because its
relay is what is measured. `direct` is no program: the client connects to the container's own address, which is the
upper limit for everything that copies bytes from one socket to another.
"""

import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from bench.daemon import Daemon
from bench.processes import ProcessGroup
from bench.remote import Remote, neighbour_of
from bench.rows import DOCKER_PROXY, DOCKERD_300, HAPROXY, LOOPBACK, RELAY, REMOTE, SUBJECT
from bench.setup import Client, Contender, Port, Setup
from lab.netns import Namespace, Neighbour

_HAPROXY = """\
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
"""

# Runs a program with the directory $0 mounted over /etc, for this program and those that it starts.
_WITH_ETC = 'mount -t overlay -o lowerdir="$0:/etc" overlay /etc && exec "$@"'


class Direct(Contender):
    """No program: clients connect to the container's own address."""

    def client_of(self, host: Namespace) -> AbstractContextManager[Client]:
        host.sysctl("net.ipv4.ip_forward", int(self.is_remote))
        return _client_of(self, host)

    def address(self, container: str) -> str:
        return container

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        pass


class Proxy(Contender):
    """A program that listens on the host, and forwards to the container."""

    def client_of(self, host: Namespace) -> AbstractContextManager[Client]:
        return _client_of(self, host)

    def address(self, container: str) -> str:
        if self.is_remote:
            return Neighbour.host6 if self.is_ipv6 else Neighbour.host4
        return "127.0.0.1"

    @property
    def host_address(self) -> str:
        """The address that ports are published at."""
        return "::" if self.is_ipv6 else "0.0.0.0"


class DockerProxy(Proxy):
    """docker-proxy, and programs with the same command line."""

    def __init__(self, name: str, program: Path, own_core: bool = False) -> None:
        super().__init__(name, own_core)
        self.program = program

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        for port in ports:
            setup.group.start_launcher(self.command(setup.container_address, port))

    def command(self, container: str, port: Port) -> list[str]:
        return [
            *(str(self.program), "-proto", port.protocol, "-host-ip", self.host_address, "-host-port", str(port.host)),
            *("-container-ip", container, "-container-port", str(port.container)),
        ]


class Relay(DockerProxy):
    """gangway without its redirect, so that the relay carries everything."""

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        etc = setup.scratch / "etc"
        settings = etc / "gangway/gangway.toml"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("[relay]\nredirect = false\n")
        with_etc = [_program("unshare"), "--mount", "sh", "-c", _WITH_ETC, str(etc)]
        for port in ports:
            setup.group.start_launcher([*with_etc, *self.command(setup.container_address, port)])


class Socat(Proxy):
    """A socat for each port, which forks for each client."""

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        for port in ports:
            kind = f"{port.protocol.upper()}4"
            listen = f"{kind}-LISTEN:{port.host},fork,reuseaddr"
            setup.group.start([_program("socat"), listen, f"{kind}:{setup.container_address}:{port.container}"])
        _wait_for_ports(setup.group, ports)


class Haproxy(Proxy):
    """One haproxy for all ports."""

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        configuration = setup.scratch / "haproxy.cfg"
        listeners = (
            f"listen port{port.host}\n"
            f"    bind {self.host_address}:{port.host}\n"
            f"    server container {setup.container_address}:{port.container}\n"
            for port in ports
        )
        configuration.write_text(_HAPROXY + "".join(listeners))
        setup.group.start([_program("haproxy"), "-db", "-f", str(configuration)])
        _wait_for_ports(setup.group, ports)


def relayed(gangway: Path, docker_proxy: Path) -> dict[str, Contender]:
    """Return the contenders that carry traffic, by name."""
    programs = Relay("gangway", gangway), DockerProxy("docker-proxy", docker_proxy)
    return _by_name(*programs, Socat("socat"), Haproxy("haproxy"), Direct("direct"))


def relayed_from_afar(gangway: Path, docker_proxy: Path) -> dict[str, Contender]:
    """Return the same with a client on another machine."""
    contenders = relayed(gangway, docker_proxy)
    for contender in contenders.values():
        contender.is_remote = True
    return contenders


def relayed_ipv6(gangway: Path, docker_proxy: Path) -> dict[str, Contender]:
    """Return those of the same that copy from IPv6 to IPv4."""
    contenders = relayed_from_afar(gangway, docker_proxy)
    for contender in contenders.values():
        contender.is_ipv6 = True
    return {name: contenders[name] for name in (SUBJECT, DOCKER_PROXY, HAPROXY)}


def in_docker(gangway: Path, docker_proxy: Path) -> dict[str, Contender]:
    """Return the contenders that publish a port, configured as their users have them, by name."""
    programs = DockerProxy("gangway", gangway), DockerProxy("docker-proxy", docker_proxy)
    return _by_name(*programs, Socat("socat"), Haproxy("haproxy"))


def redirected(docker_proxy: Path) -> dict[str, Contender]:
    """Return the contenders for clients on the host that connect to 127.0.0.1, by name."""
    return _by_name(Daemon("gangway", own_core=True), DockerProxy("docker-proxy", docker_proxy, own_core=True))


def published_at_once(docker_proxy: Path) -> dict[str, Contender]:
    """Return gangway's daemon, by the road of its clients, and a dockerd with docker-proxy."""
    loopback, relay = Daemon(LOOPBACK, own_core=True), Daemon(RELAY, own_core=True, redirects=False)
    return _by_name(Remote(REMOTE), loopback, relay, DockerProxy(DOCKERD_300, docker_proxy))


def unrelated_connections() -> dict[str, Contender]:
    """Return a host on which nothing runs: the measurement attaches the programs itself."""
    return _by_name(Direct("gangway"))


def _client_of(contender: Contender, host: Namespace) -> AbstractContextManager[Client]:
    if contender.is_remote:
        return neighbour_of(host, contender.is_ipv6)
    return nullcontext(Client(host, own_core=contender.own_core))


def _by_name(*contenders: Contender) -> dict[str, Contender]:
    return {contender.name: contender for contender in contenders}


def _program(program: str) -> str:
    return shutil.which(program, path="/usr/bin:/usr/sbin") or f"/usr/bin/{program}"


def _wait_for_ports(group: ProcessGroup, ports: Sequence[Port]) -> None:
    for protocol in {port.protocol for port in ports}:
        group.wait_for_ports(protocol, {port.host for port in ports if port.protocol == protocol})
