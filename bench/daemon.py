"""gangway's own daemon as a contender: it makes the bridge, attaches the container, switches forwarding on.

What this file knows: gangway's commands and its daemon's API.  What it must not know: where the client is, what is
measured.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.errors import CannotCarry
from bench.stage import Contender, Port, Stage, backed
from gangway.cli.client import NoDaemon, Refused, ask_running
from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Namespace


@dataclass(frozen=True)
class WithDaemon(Stage):
    """A stage with gangway's daemon on the host."""

    gangway: Gangway

    def ask(self, target: str, ports: Sequence[str]) -> Any:
        """Asks the daemon's API for something about the container's ports, each as after `-p`."""
        try:
            return ask_running(
                str(self.gangway.socket), "POST", target, {"container": self.box.name, "ports": list(ports)}
            )
        except (NoDaemon, Refused) as error:
            raise CannotCarry(f"{target}: {str(error) or 'the daemon has ended'}") from None


class Daemon(Contender):
    """gangway; the client is on the host, unless somebody has it elsewhere."""

    @contextmanager
    def staged(self) -> Iterator[WithDaemon]:
        try:
            with (
                Namespace("host") as host,
                self.client_of(host) as client,
                Gangway(host, "--firewall", "nftables") as gangway,
                Namespace("c1") as box,
                backed(host) as (group, scratch),
            ):
                gangway("network", "create", "bench", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
                container, _ = gangway("attach", box.name, "--network", "bench").split()
                address = self.address(container)
                yield WithDaemon(self, host, box, container, client, address, group, scratch, gangway)
        except CommandFailed as error:
            raise CannotCarry((str(error).splitlines() or ["the daemon does not start"])[-1]) from None

    def address(self, container: str) -> str:
        return "127.0.0.1"

    def publish(self, stage: Stage, ports: Sequence[Port]) -> None:
        assert isinstance(stage, WithDaemon)
        stage.ask("/mappings", [f"{port.host}:{port.container}/{port.protocol}" for port in ports])
