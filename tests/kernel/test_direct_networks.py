"""Networks of Docker's in the gateway mode `routed`: who reaches a container's own address, and by which source."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest

from gangway.model import Endpoint, Network, PortMapping, PortRange, Protocol, Source
from gangway.state.adopted import Adopted, AdoptedContainer
from lab import echo_server
from lab.netns import Host, Namespace, Neighbour
from lab.waiting import wait_until
from tests.kernel.host_ports import PROTOCOLS
from tests.kernel.mortal import Ground

PUBLISHED, OTHER = 80, 81  # ports of the container with a server
FAR4, FAR6 = "172.31.0.2", "fd31::2"
WEB = Network(
    "docker:web",
    "br0",
    (ip_network("172.30.0.0/24"), ip_network("fd30::/64")),
    (ip_address(Host.gateway4), ip_address(Host.gateway6)),
    source=Source.DOCKER,
    routed=frozenset({4, 6}),
)
BACK = Network(
    "docker:back",
    "br1",
    (ip_network("172.31.0.0/24"), ip_network("fd31::/64")),
    (ip_address("172.31.0.1"), ip_address("fd31::1")),
    source=Source.DOCKER,
)
_BACK = """\
ip link add br1 type bridge; ip address add 172.31.0.1/24 dev br1; ip address add fd31::1/64 dev br1 nodad
ip link add port type veth peer name eth0 netns {0}; ip link set port master br1 up; ip link set br1 up
ip -n {0} address add 172.31.0.2/24 dev eth0; ip -n {0} address add fd31::2/64 dev eth0 nodad
ip -n {0} link set eth0 up; ip -n {0} route add default via 172.31.0.1; ip -n {0} route add default via fd31::1
"""


class Routed:
    """A host with a routed network and another one, a machine elsewhere, and gangway in this process."""

    def __init__(self, stack: ExitStack, folder: Path, firewall: str) -> None:
        self.host = stack.enter_context(Host())
        self.neighbour = stack.enter_context(Neighbour(self.host))
        self.box, self.near = self.host.container(), self.host.container()
        self.far = stack.enter_context(Namespace("far"))
        self.host.run("sh", "-ec", _BACK.format(self.far.name))
        echo_server.serve(self.box.popen, PUBLISHED, OTHER)
        echo_server.serve(self.neighbour.popen, PUBLISHED)
        # Until then the host does not resolve the next hop of what it forwards (net/ipv6/ndisc.c, ndisc_send_ns).
        wait_until(lambda: "tentative" not in self.host.ip("-6", "address"), "the host's link-local addresses")
        stack.enter_context(self.host.entered())
        self.daemon = Ground(self.host, [self.box], folder, firewall)
        stack.callback(self.daemon.close)
        self.daemon.start()
        stack.callback(lambda: self.daemon._parts._adoption.adopt(Adopted()))
        self.clients: dict[str, Namespace] = {"neighbour": self.neighbour, "far": self.far, "near": self.near}
        self.own = {
            "neighbour": {Neighbour.address4, Neighbour.address6},
            "far": {FAR4, FAR6},
            "near": {self.near.address4, self.near.address6},
        }

    def adopt(self, *mappings: PortMapping, network: Network = WEB) -> None:
        """Have gangway serve what Docker has: both networks, and these ports of a container."""
        addresses = ip_address(self.box.address4), ip_address(self.box.address6)
        endpoint = Endpoint("docker:box", network.name, addresses)
        container = AdoptedContainer("1", endpoint, f"/run/netns/{self.box.name}", mappings)
        self.daemon._parts._adoption.adopt(Adopted((network, BACK), (container,)))

    def ports(self, *families: int, admitted: tuple[IPv4Network | IPv6Network, ...] = ()) -> list[PortMapping]:
        """Return the port that is published at the container's own addresses."""
        at = {4: self.box.address4, 6: self.box.address6}
        numbers = PortRange(PUBLISHED, PUBLISHED)
        return [
            PortMapping(
                "docker:box",
                Protocol(protocol),
                ip_address(at[family]),
                numbers,
                numbers,
                Source.DOCKER,
                admitted=admitted,
                is_routed=True,
            )
            for family in families or (4, 6)
            for protocol in PROTOCOLS
        ]

    def seen(self, port: int, *addresses: str) -> dict[str, list[str]]:
        """Return the source address of each client whose request is answered, by TCP and UDP at each address."""
        addresses = addresses or (self.box.address4, self.box.address6)
        asked = [(name, protocol, at) for name in self.clients for at in addresses for protocol in PROTOCOLS]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda one: _peer(self.clients[one[0]], one[1], one[2], port), asked))
        found: dict[str, list[str]] = {}
        for (name, _, _), peer in zip(asked, answers, strict=True):
            found.setdefault(name, []).extend([peer] if peer else [])
        return found

    def reached(self, port: int, *addresses: str) -> set[str]:
        """Return the clients that are answered by both protocols at each address, with their own address as source.

        The others are not answered at all.
        """
        found = self.seen(port, *addresses)
        for name, peers in found.items():
            assert set(peers) <= self.own[name], f"{name} was seen as another client"
            assert len(peers) in (0, len(PROTOCOLS) * (len(addresses) or 2)), f"{name} is answered sometimes"
        return {name for name, peers in found.items() if peers}


def _peer(client: Namespace, protocol: str, address: str, port: int) -> str:
    with client.entered(), suppress(echo_server.NoAnswer):
        return echo_server.request_here(protocol, address, port, patience_s=echo_server.BRIEF_S).peer
    return ""


def _is_answering(client: Namespace, address: str) -> bool:
    """True if an address answers an echo request (RFC 792, RFC 4443)."""
    kind, request = (socket.IPPROTO_ICMPV6, b"\x80") if ":" in address else (socket.IPPROTO_ICMP, b"\x08\0\xf7\xff")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with client.entered(), socket.socket(family, socket.SOCK_RAW, kind) as sock:
        sock.settimeout(echo_server.BRIEF_S)
        sock.connect((address, 0))  # only this address is received from
        sock.send(request.ljust(8, b"\0"))
        with suppress(TimeoutError):
            return bool(sock.recv(100))
    return False


@pytest.fixture(scope="module", params=["nftables", pytest.param("iptables", marks=pytest.mark.any_kernel)])
def routed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    with ExitStack() as stack:
        yield Routed(stack, tmp_path_factory.mktemp("gangway"), request.param)


def test_published_ports_are_open_at_the_containers_address_also_by_a_later_daemon(routed: Routed) -> None:
    routed.adopt()
    assert routed.reached(PUBLISHED) == {"near"}
    routed.adopt(*routed.ports())
    assert routed.reached(PUBLISHED) == {"neighbour", "far", "near"}
    assert routed.reached(OTHER) == {"near"}
    routed.daemon._parts.close()
    routed.daemon.start()
    routed.daemon._parts._controller.reconcile()
    assert routed.reached(PUBLISHED) == {"neighbour", "far", "near"}
    with routed.host.entered():
        assert echo_server.request_here("tcp", routed.box.address4, PUBLISHED).peer == Host.gateway4


def test_containers_can_be_pinged_and_leave_with_their_own_address(routed: Routed) -> None:
    routed.adopt()
    box, outside = routed.box, {Neighbour.address4: routed.box.address4, Neighbour.address6: routed.box.address6}
    clients = routed.neighbour, routed.far
    assert all(_is_answering(client, address) for client in clients for address in (box.address4, box.address6))
    assert not _is_answering(routed.neighbour, FAR4), "a network that is not routed"
    for address, own in outside.items():
        assert {_peer(box, protocol, address, PUBLISHED) for protocol in PROTOCOLS} == {own}


def test_only_admitted_clients_reach_the_containers_address(routed: Routed) -> None:
    routed.adopt(*routed.ports(admitted=BACK.subnets))
    assert routed.reached(PUBLISHED) == {"far", "near"}
    routed.adopt(*routed.ports(admitted=(ip_network("10.77.0.0/24"),)))
    assert routed.reached(PUBLISHED, routed.box.address4) == {"neighbour", "near"}
    assert routed.reached(PUBLISHED, routed.box.address6) == {"near"}


def test_one_ip_version_is_routed_and_the_other_translated(routed: Routed) -> None:
    """A port that is published at the host does not open the container's own."""
    half, to = replace(WEB, routed=frozenset({6})), PortRange(OTHER, OTHER)
    published = partial(PortMapping, "docker:box", host_ports=PortRange(8000, 8000), container_ports=to)
    at_host = [
        published(protocol=Protocol(one), host_address=ip_address(at), source=Source.DOCKER)
        for one in PROTOCOLS
        for at in ("0.0.0.0", "::")
    ]
    routed.adopt(*routed.ports(6), *at_host, network=half)
    assert routed.reached(PUBLISHED, routed.box.address6) == {"neighbour", "far", "near"}
    assert routed.reached(OTHER) == routed.reached(PUBLISHED, routed.box.address4) == {"near"}
    at = routed.seen(8000, Neighbour.host4, Neighbour.host6)
    assert (set(at["neighbour"]), len(at["neighbour"])) == (routed.own["neighbour"], 4)


def test_containers_that_are_isolated_stay_so(routed: Routed) -> None:
    routed.adopt(*routed.ports(), network=replace(WEB, icc=False))
    try:
        assert routed.reached(PUBLISHED) == {"neighbour", "far"}
    finally:
        routed.adopt()
