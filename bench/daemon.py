"""gangway's daemon as a contender: it creates the bridge, attaches the container and enables forwarding."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.errors import CannotCarry
from bench.setup import Contender, Port, Setup, process_group
from gangway.cli.client import NoDaemon, Refused, ask_running
from lab.gangwayd import GANGWAY, CommandFailed, Gangway
from lab.netns import Namespace

_NETWORK = "bench"
_SUBNETS = ("--subnet", "172.30.0.0/16", "--subnet", "fd30::/64")


@dataclass(frozen=True)
class DaemonSetup(Setup):
    """A setup with a gangway daemon on the host."""

    gangway: Gangway
    redirects: bool
    """Whether the redirect for loopback addresses is enabled."""
    network: str = _NETWORK
    """The network that the container is on."""

    def request_ports(self, target: str, ports: Sequence[str]) -> Any:
        """Send a request about the container's ports to the daemon's API; `ports` are written as after `-p`."""
        return self.request(target, {"container": self.container.name, "ports": list(ports)})

    def request(self, target: str, body: Any) -> Any:
        """Send a request to the daemon's API, and return the answer. CannotCarry: it was refused."""
        try:
            return ask_running(str(self.gangway.socket), "POST", target, body)
        except (NoDaemon, Refused) as error:
            raise CannotCarry(f"{target}: {str(error) or 'the daemon has exited'}") from None

    def command_s(self, command: str, *words: str) -> float:
        """Run a gangway command, and return the seconds that it took."""
        return self.group.run_s([str(GANGWAY), command, *words])


class Daemon(Contender):
    """gangway's daemon, with the client on the host unless a subclass puts it elsewhere."""

    def __init__(self, name: str, own_core: bool = False, redirects: bool = True) -> None:
        super().__init__(name, own_core)
        self.redirects = redirects

    @contextmanager
    def set_up(self) -> Iterator[DaemonSetup]:
        try:
            with (
                Namespace("host") as host,
                self.client_of(host) as client,
                _settings(self.redirects) as settings,
                Gangway(host, "--firewall", "nftables", "--config", settings) as gangway,
                Namespace("c1") as box,
                process_group(host) as (group, scratch),
            ):
                gangway("network", "create", _NETWORK, *_SUBNETS)
                container, _ = gangway("attach", box.name, "--network", _NETWORK).split()
                address = self.address(container)
                yield DaemonSetup(self, host, box, container, client, address, group, scratch, gangway, self.redirects)
        except CommandFailed as error:
            raise CannotCarry((str(error).splitlines() or ["the daemon did not start"])[-1]) from None

    def address(self, container: str) -> str:
        return "127.0.0.1"

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        assert isinstance(setup, DaemonSetup)
        setup.request_ports("/mappings", [f"{port.host}:{port.container}/{port.protocol}" for port in ports])


@contextmanager
def _settings(redirects: bool) -> Iterator[str]:
    """Write the daemon's settings file, and yield its path."""
    with tempfile.NamedTemporaryFile("w", prefix="gangway-bench-") as file:
        file.write("" if redirects else "[relay]\nredirect = false\n")
        file.flush()
        yield file.name
