"""The contenders without Docker: how a neighbour of the host gets to a container.

What this file knows: the cable, iptables' command line.  What it must not know: what is measured.

The neighbour is on a cable of its own to the host, which routes between it and the container's bridge.  It has several
addresses, as a host's clients have: those of one run out of ports when they connect often.

    gangway     a daemon, with nftables; it makes the bridge, attaches the container, and switches forwarding on
    iptables    what an administrator types: forwarding, masquerading for the containers, and a DNAT rule for a port;
                nothing is filtered.  It is the iptables that the host has set up
    direct      forwarding and nothing else: the neighbour asks the container's own address
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.daemon import Daemon
from bench.errors import CannotCarry
from bench.setup import Client, Contender, Port, Setup
from lab.netns import Host, Namespace, Neighbour

_MORE = ("10.77.0.3", "10.77.0.4", "10.77.0.5")


class Routed(Contender):
    """direct."""

    @contextmanager
    def client_of(self, host: Namespace) -> Iterator[Client]:
        host.sysctl("net.ipv4.ip_forward", 1)
        with _neighbour(host) as client:
            yield client

    def address(self, container: str) -> str:
        return container

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        pass


class Iptables(Routed):
    """A rule for each port."""

    def address(self, container: str) -> str:
        return Neighbour.host4

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        _nat(setup.host, f"POSTROUTING -s {Host.gateway4}/24 ! -o br0 -j MASQUERADE")
        for port in ports:
            match = f"-d {Neighbour.host4} -p {port.protocol} --dport {port.host}"
            _nat(setup.host, f"PREROUTING {match} -j DNAT --to-destination {setup.container_address}:{port.container}")


class Remote(Daemon):
    """gangway."""

    @contextmanager
    def client_of(self, host: Namespace) -> Iterator[Client]:
        with _neighbour(host) as client:
            yield client

    def address(self, container: str) -> str:
        return Neighbour.host4


def without_docker() -> dict[str, Contender]:
    """All of them, by name."""
    return {contender.name: contender for contender in (Remote("gangway"), Iptables("iptables"), Routed("direct"))}


@contextmanager
def _neighbour(host: Namespace) -> Iterator[Client]:
    with Neighbour(host) as neighbour:
        for address in _MORE:
            neighbour.ip("address", "add", f"{address}/24", "dev", "eth0")
        yield Client(neighbour, (neighbour.address4, *_MORE), own_core=True)


def _nat(host: Namespace, rule: str) -> None:
    done = host.run("iptables", "-t", "nat", "-A", *rule.split(), check=False)
    if done.returncode:
        raise CannotCarry(f"iptables: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
