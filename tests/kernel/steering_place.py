"""Steering in a network namespace without daemon and relay: fixtures, and what other programs and clients see."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from gangway.ebpf import libbpf
from gangway.ebpf.keys import KINDS, PortBlock, SteeringState, blocks
from gangway.ebpf.steering import Steering
from lab.holder import Holder
from lab.netns import Namespace

Ports = tuple[str, str, int, int]
RESERVED, SERVED, HELD = SteeringState
RANGE: Ports = ("tcp", "0.0.0.0", 8000, 8010)
SIX: Ports = ("udp", "::", 8000, 8010)
TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
LOOPBACKS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
REJECTED = "this kernel rejects the programs of steering.bpf.o: Invalid argument"


class Place:
    """A namespace, which the test is in: a double of the relay, and the steering of one daemon after the other."""

    def __init__(self, host: Namespace, stack: ExitStack) -> None:
        self.host = host
        self.relay = Holder()
        self._stack = stack

    def steering(self) -> Steering:
        """Return a daemon's steering, which takes over from the one before."""
        made = Steering(self.relay)
        self._stack.callback(made.close)
        return made

    def link_ids(self) -> set[int]:
        """Return the IDs of the links that the relay holds."""
        return {libbpf.fdinfo(fd, "link_id") for fd in self.relay.fds["steering"]}

    def held_sockets(self) -> list[int]:
        """Return the inodes of the sockets that the relay holds."""
        return [os.fstat(fd).st_ino for fd in self.relay.fds["sockets"]]

    def shared_sockets(self) -> list[int]:
        """Return the inodes of the sockets that the relay serves, in the order of KINDS."""
        return [os.fstat(self.relay.shared[kind][0]).st_ino for kind in KINDS if kind in self.relay.shared]

    def shared_socket(self, protocol: str, family: int) -> socket.socket:
        """Return one of the sockets that the relay serves; the caller closes it."""
        made = socket.socket(fileno=os.dup(self.relay.shared[protocol, family][0]))
        made.settimeout(5)
        return made


@pytest.fixture
def place() -> Iterator[Place]:
    with Namespace("host") as host, host.entered(), ExitStack() as stack:
        made = Place(host, stack)
        stack.callback(made.relay.stop)
        yield made


@pytest.fixture
def steering(place: Place) -> Steering:
    made = place.steering()
    assert made.unavailable == ""
    return made


def publish(steering: Steering, ports: Ports) -> None:
    steering.reserve(*ports)
    steering.add(entries(ports, SERVED))


def entries(ports: Ports, state: SteeringState) -> dict[PortBlock, SteeringState]:
    return dict.fromkeys(blocks(*ports), state)


def can_bind(protocol: str, address: str, port: int) -> bool:
    """True if another program can bind a port."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, TYPES[protocol]) as sock:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind((address, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def bindable(ports: Ports) -> list[int]:
    """Return the ports of a range, and those beside it, that another program can bind."""
    protocol, address, first, last = ports
    return [port for port in range(first - 1, last + 2) if can_bind(protocol, address, port)]


def is_served(place: Place, protocol: str, address: str, port: int) -> bool:
    """True if a client reaches the relay's socket, which sees the port that the client connected to."""
    family = 6 if ":" in address else 4
    with place.shared_socket(protocol, family) as server, socket.socket(server.family, TYPES[protocol]) as client:
        client.settimeout(5)
        try:
            client.connect((address, port))
            client.send(b"hello")
        except ConnectionRefusedError:
            return False
        if protocol == "udp":
            server.settimeout(0.3)
            with suppress(TimeoutError):
                return server.recv(100) == b"hello"
            return False
        with server.accept()[0] as connection:
            return bool(connection.getsockname()[1] == port)
