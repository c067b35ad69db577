"""Ports that dockerd holds by sockets of its own are served beside these sockets, which come and go as they like."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from unittest.mock import Mock

import pytest

from gangway.model import Endpoint, Network, PortMapping, PortRange, Protocol, Source
from gangway.state.adopted import Adopted, AdoptedContainer
from lab import echo_server
from lab.netns import Container, Host, Neighbour
from lab.roads import observe_road
from lab.waiting import wait_until
from tests.kernel.host_ports import FAMILIES, KINDS, PROTOCOLS, bound
from tests.kernel.mortal import Ground

NETWORK = Network(
    "docker:bridge", "br0", (ip_network("172.30.0.0/24"),), (ip_address(Host.gateway4),), source=Source.DOCKER
)
FIRST, MANY = 8000, 2000
ADDRESSES = {"0.0.0.0": Neighbour.host4, "::": Neighbour.host6}


class Docked:
    """A host whose dockerd has a container with IPv4 only, a client elsewhere, and gangway in this process."""

    def __init__(self, stack: ExitStack, folder: Path, firewall: str) -> None:
        self.firewall = firewall
        self.host = stack.enter_context(Host())
        self.neighbour = stack.enter_context(Neighbour(self.host))
        self.box: Container = self.host.container()
        echo_server.serve(self.box.popen, FIRST, FIRST + MANY - 1)
        stack.enter_context(self.host.entered())
        self.daemon = Ground(self.host, [self.box], folder, firewall)
        stack.callback(self.daemon.close)
        self.daemon.start()
        stack.callback(lambda: self.daemon._parts._adoption.adopt(Adopted()))

    def adopt(self, *ports: tuple[str, str], count: int = 1) -> None:
        """Have gangway serve what dockerd has: ports of these protocols and host addresses."""
        numbers = PortRange(FIRST, FIRST + count - 1)
        name = "docker:web"
        mappings = tuple(
            PortMapping(name, Protocol(protocol), ip_address(at), numbers, numbers, Source.DOCKER, is_held=True)
            for protocol, at in ports
        )
        endpoint = Endpoint(name, NETWORK.name, (ip_address(self.box.address4),))
        container = AdoptedContainer("1", endpoint, f"/run/netns/{self.box.name}", mappings)
        self.daemon._parts._adoption.adopt(Adopted((NETWORK,), (container,)))

    @contextmanager
    def adopted(self, *ports: tuple[str, str], count: int = 1) -> Iterator[None]:
        self.adopt(*ports, count=count)
        try:
            yield
        finally:
            self.adopt()

    def road(self, protocol: str, at: str, port: int = FIRST) -> str:
        """Return the road of a client elsewhere, whom something has to answer."""
        return observe_road(self.host, self.neighbour, protocol, ADDRESSES[at], port).road

    def expected_road(self, at: str) -> str:
        """The container has no IPv6 address, so no rule leads there from IPv6."""
        return "nat" if self.firewall == "nftables" and at == "0.0.0.0" else "relay"


@pytest.fixture(scope="module", params=["none", "nftables"])
def docked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docked]:
    with ExitStack() as stack:
        yield Docked(stack, tmp_path_factory.mktemp("gangway"), request.param)


@contextmanager
def holding(
    docked: Docked, protocol: str, address: str, port: int = FIRST, v6only: bool = True
) -> Iterator[socket.socket]:
    """Hold a port as dockerd does: by a socket that nobody accepts from."""
    with docked.host.entered(), socket.socket(FAMILIES[6 if ":" in address else 4], KINDS[protocol]) as sock:
        if protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for UDP only some releases set it
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind((address, port))
        if protocol == "tcp":
            sock.listen(0)
        yield sock


@pytest.mark.parametrize("at", ADDRESSES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_clients_are_served_past_the_holders_socket(docked: Docked, protocol: str, at: str) -> None:
    with holding(docked, protocol, at) as holder:
        with docked.adopted((protocol, at)):
            for _ in range(3):
                assert docked.road(protocol, at) == docked.expected_road(at)
            loopback = "::1" if at == "::" else "127.0.0.1"
            with docked.host.entered(), bound(docked.host, protocol, loopback, 0) as client:  # it is not redirected
                client.settimeout(5)
                client.connect((loopback, FIRST))
                assert echo_server.request_over(client).text == "hello"
        holder.settimeout(5)
        with docked.neighbour.entered(), socket.socket(holder.family, holder.type) as client:
            client.connect((ADDRESSES[at], FIRST))
            client.sendall(b"hello")
            if protocol == "udp":
                assert holder.recv(100) == b"hello"
            else:
                holder.accept()[0].close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_holder_binds_its_socket_again_at_any_time(docked: Docked, protocol: str) -> None:
    """While the relay has clients of the port, too: `docker restart` comes before gangway is notified."""
    with docked.adopted((protocol, "0.0.0.0"), (protocol, "::")), bound(docked.neighbour, protocol, "::", 0) as client:
        client.settimeout(5)
        client.connect((Neighbour.host6, FIRST))
        assert echo_server.request_over(client).text == "hello"
        for address in ("0.0.0.0", "127.0.0.1", "::", Neighbour.host6):
            for _ in range(2):
                with holding(docked, protocol, address):
                    assert docked.road(protocol, "::") == "relay"
        with holding(docked, protocol, "::", v6only=False):  # of both families, as dockerd 20.10 binds it
            assert docked.road(protocol, "0.0.0.0") == docked.expected_road("0.0.0.0")


@pytest.mark.parametrize("at", ADDRESSES)
def test_datagrams_of_any_size_are_answered(docked: Docked, at: str) -> None:
    """Also those that the kernel has to split into fragments."""
    with holding(docked, "udp", at), docked.adopted(("udp", at)), bound(docked.neighbour, "udp", at, 0) as client:
        client.settimeout(5)
        client.connect((ADDRESSES[at], FIRST))
        for size in (0, 1, 1451, 1452, 8000):
            client.send(b"x" * size)
            assert client.recv(20_000).partition(b" ")[2] == b"x" * size


def test_a_later_relay_and_a_later_daemon_serve_held_ports(docked: Docked) -> None:
    kinds = [(protocol, at) for protocol in PROTOCOLS for at in ADDRESSES]

    def are_served() -> bool:
        return [docked.road(*kind) for kind in kinds] == [docked.expected_road(at) for _, at in kinds]

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(holding(docked, *kind))
        stack.enter_context(docked.adopted(*kinds))
        before = docked.daemon._parts.dataplane.found()
        pid = docked.daemon._parts.dataplane.relay.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not docked.daemon._parts.dataplane.relay.is_running(), "the end of the relay")
        docked.daemon._parts._controller.check()
        assert are_served()
        docked.daemon._parts.close()
        assert are_served(), "the relay goes on"
        docked.daemon.start()
        docked.daemon._parts._controller.reconcile()
        assert are_served()
        assert docked.daemon._parts.dataplane.found() == before


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_range_is_served_at_once(docked: Docked, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataplane = docked.daemon._parts.dataplane
    add = Mock(wraps=dataplane.steering.add)
    monkeypatch.setattr(dataplane.steering, "add", add)
    with docked.adopted((protocol, "::"), count=MANY):
        assert (add.call_count, len(dataplane.relay.served())) == (1, 1)
        for port in (FIRST, FIRST + MANY - 1):
            with holding(docked, protocol, "::", port):
                assert docked.road(protocol, "::", port) == "relay"


@pytest.mark.parametrize("at", [*ADDRESSES, *ADDRESSES.values()])
def test_connections_to_an_excluded_address_are_refused(docked: Docked, at: str) -> None:
    """Instead of waiting at the holder's socket."""
    address = ADDRESSES.get(at, at)
    if docked.firewall == "nftables" and ":" not in address:
        pytest.skip("a rule would lead clients to the container: it depends on more than is excluded here")
    dataplane = docked.daemon._parts.dataplane
    with holding(docked, "tcp", at), docked.adopted(("tcp", at)):
        dataplane.exclude([ip_address(address)])
        try:
            for client in (docked.neighbour, docked.host):
                with client.entered(), pytest.raises(ConnectionRefusedError):
                    socket.create_connection((address, FIRST), timeout=5)
        finally:
            dataplane.exclude([])
        with docked.neighbour.entered():
            assert echo_server.request_here("tcp", address, FIRST).text == "hello"


def test_program_that_shares_a_udp_port_at_an_excluded_address_is_left_alone(docked: Docked) -> None:
    with ExitStack() as stack:
        sharing = [stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)) for _ in range(2)]
        for sock, address in zip(sharing, ("::", Neighbour.host6), strict=True):
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, FIRST))
        stack.enter_context(docked.adopted(("udp", "::")))
        docked.daemon._parts.dataplane.exclude([ip_address(Neighbour.host6)])
        stack.callback(docked.daemon._parts.dataplane.exclude, [])
        with docked.neighbour.entered(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.sendto(b"hello", (Neighbour.host6, FIRST))
        sharing[1].settimeout(5)
        assert sharing[1].recv(100) == b"hello"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_port_of_another_address_stays_reserved(docked: Docked, protocol: str) -> None:
    """The holder of one address can bind no socket at all of them, as another mapping has the port at another one."""
    steering = docked.daemon._parts.dataplane.steering
    with docked.adopted((protocol, Neighbour.host4)), steering.reserve(protocol, "127.0.0.1", FIRST, FIRST):
        with holding(docked, protocol, Neighbour.host4):
            assert docked.road(protocol, "0.0.0.0") == docked.expected_road("0.0.0.0")
        with pytest.raises(OSError, match="Address already in use"), holding(docked, protocol, "0.0.0.0"):
            pass
