"""The contenders without Docker, with a client on another machine.

The other machine is a neighbour that is connected directly to the host, which routes between it and the container's
bridge. It has several addresses, as with one address it would run out of local ports when it connects often.

    gangway     a daemon with nftables: it creates the bridge, attaches the container and enables forwarding
    iptables    what an administrator types: forwarding, masquerading for the containers, and a DNAT rule per port;
                nothing is filtered. It is the iptables that is the machine's default
    direct      forwarding only: the neighbour connects to the container's own address
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.daemon import Daemon
from bench.errors import CannotCarry
from bench.setup import Client, Contender, Port, Setup
from lab.netns import Host, Namespace, Neighbour

_MORE_ADDRESSES = ("10.77.0.3", "10.77.0.4", "10.77.0.5")
_MORE_ADDRESSES6 = ("fd77::3", "fd77::4", "fd77::5")


class Routed(Contender):
    """Forwarding only."""

    @contextmanager
    def client_of(self, host: Namespace) -> Iterator[Client]:
        host.sysctl("net.ipv4.ip_forward", 1)
        with neighbour_of(host) as client:
            yield client

    def address(self, container: str) -> str:
        return container

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        pass


class Iptables(Routed):
    """An iptables rule for each port."""

    def address(self, container: str) -> str:
        return Neighbour.host4

    def publish(self, setup: Setup, ports: Sequence[Port]) -> None:
        _nat(setup.host, f"POSTROUTING -s {Host.gateway4}/24 ! -o br0 -j MASQUERADE")
        for port in ports:
            match = f"-d {Neighbour.host4} -p {port.protocol} --dport {port.host}"
            _nat(setup.host, f"PREROUTING {match} -j DNAT --to-destination {setup.container_address}:{port.container}")


class Remote(Daemon):
    """gangway's daemon."""

    @contextmanager
    def client_of(self, host: Namespace) -> Iterator[Client]:
        with neighbour_of(host) as client:
            yield client

    def address(self, container: str) -> str:
        return Neighbour.host4


def without_docker() -> dict[str, Contender]:
    """Return the contenders, by name."""
    return {contender.name: contender for contender in (Remote("gangway"), Iptables("iptables"), Routed("direct"))}


@contextmanager
def neighbour_of(host: Namespace, ipv6: bool = False) -> Iterator[Client]:
    """Create another machine that is connected to a host, and yield it as the client; `ipv6`: it connects by IPv6."""
    first, more, length = Neighbour.address4, _MORE_ADDRESSES, 24
    if ipv6:
        first, more, length = Neighbour.address6, _MORE_ADDRESSES6, 64
    with Neighbour(host) as neighbour:
        for address in more:
            neighbour.ip("address", "add", f"{address}/{length}", "dev", "eth0", *(["nodad"] if ipv6 else []))
        yield Client(neighbour, (first, *more), own_core=True)


def _nat(host: Namespace, rule: str) -> None:
    done = host.run("iptables", "-t", "nat", "-A", *rule.split(), check=False)
    if done.returncode:
        raise CannotCarry(f"iptables: {(done.stderr.strip().splitlines() or ['failed'])[0]}")
