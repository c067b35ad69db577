"""Host ports for a `-p`: all of them are reserved, by a socket or by steering, or none."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from gangway.ebpf.steering import Steering
from gangway.errors import Conflict, PortInUse, Unsupported
from gangway.facts import HostFacts
from gangway.host import sockets
from gangway.model import parse_port
from gangway.relay.protocol import HostPorts
from gangway.state.allocate import Allocation
from gangway.state.port_index import PortIndex
from tests.unit.samples import NFTABLES, NO_STEERING, mapping, planned

IPV4, IPV6 = HostPorts("tcp", "0.0.0.0", 8000, 8010), HostPorts("tcp", "::", 8000, 8010)
needs_sctp = pytest.mark.skipif(not sockets.has_sockets("sctp"), reason="the kernel has no SCTP")

pytestmark = pytest.mark.usefixtures("own_namespace")


class FakeSteering(Steering):
    """Reserves any ports, except those in `refused`."""

    def __init__(self) -> None:
        self.reserved: set[HostPorts] = set()
        self.refused: dict[HostPorts, Exception] = {}

    def reserve(self, protocol: str, address: str, first: int, last: int) -> ExitStack:
        ports = HostPorts(protocol, address, first, last)
        if ports in self.refused:
            raise self.refused[ports]
        self.reserved.add(ports)
        reservation = ExitStack()
        reservation.callback(self.release, *ports)
        return reservation

    def release(self, protocol: str, address: str, first: int, last: int) -> None:
        self.reserved.discard(HostPorts(protocol, address, first, last))


class Scene:
    """An index, steering, and the sockets of the test's network namespace."""

    def __init__(self) -> None:
        self.steering = FakeSteering()
        self.index = PortIndex()

    def allocation(self, facts: HostFacts = NFTABLES) -> Allocation:
        return Allocation(self.index, self.steering, partial(planned, facts=facts))

    def allocate(self, text: str, facts: HostFacts = NFTABLES) -> None:
        """Allocate ports, which has to fail: nothing is freed afterwards."""
        self.allocation(facts).allocate("box", parse_port(text))

    @contextmanager
    def allocated(self, text: str, facts: HostFacts = NFTABLES) -> Iterator[Allocation]:
        """Allocate ports, and free them at the end of the block."""
        with self.allocation(facts) as found:
            found.allocate("box", parse_port(text))
            yield found

    def is_free(self, first: int = 8000, last: int = 8010) -> bool:
        """True if none of these ports has a socket or a reservation."""
        bound = sockets.bound_ports("tcp") | sockets.bound_ports("udp")
        return not self.steering.reserved and not bound & set(range(first, last + 1))


@pytest.fixture
def scene() -> Scene:
    return Scene()


def names(allocated: Allocation) -> list[str]:
    return [str(one) for one in allocated.mappings]


def test_range_is_reserved_by_steering_at_all_its_addresses(scene: Scene) -> None:
    with scene.allocated("8000-8010:80-90") as found:
        assert names(found) == ["0.0.0.0:8000-8010:80-90/tcp", "[::]:8000-8010:80-90/tcp"]
        assert list(found.held) == [IPV4, IPV6]
        assert scene.steering.reserved == {IPV4, IPV6}
    assert scene.is_free()


@pytest.mark.parametrize(
    ("text", "facts", "protocol"),
    [
        ("127.0.0.1:8000-8002:80-82", NO_STEERING, "tcp"),
        pytest.param("127.0.0.1:8000-8002:80-82/sctp", NFTABLES, "sctp", marks=needs_sctp),
        ("127.0.0.1:8000:80/udp", NFTABLES, "udp"),
    ],
)
def test_unsteered_ports_are_reserved_by_sockets(scene: Scene, text: str, facts: HostFacts, protocol: str) -> None:
    with scene.allocated(text, facts) as found:
        assert names(found) == [text if protocol in text else f"{text}/{protocol}"]
        for ports, held in found.held.items():
            assert isinstance(held, socket.socket)
            assert (ports.protocol, *held.getsockname(), ports.last) == (protocol, *ports[1:])
        assert len(found.held) == found.mappings[0].host_ports.count
        assert not scene.steering.reserved
    assert scene.is_free()


@pytest.mark.parametrize("facts", [NFTABLES, NO_STEERING])
def test_ports_in_use_at_one_address_are_reserved_at_none(scene: Scene, facts: HostFacts) -> None:
    scene.steering.refused[IPV6] = PortInUse("port [::]:8003/tcp is in use")
    with sockets.bind_port("tcp", "::", 8003), pytest.raises(PortInUse, match=r"port \[::\]:8003/tcp is in use"):
        scene.allocate("8000-8010:80-90", facts)
    assert scene.is_free()


def test_port_in_use_is_reported_with_its_holder(scene: Scene) -> None:
    expected = r"port 127\.0\.0\.1:8000/tcp is in use: choose another port, or stop .* \(pid \d+\), which listens on it"
    with sockets.bind_port("tcp", "127.0.0.1", 8000), pytest.raises(PortInUse, match=expected):
        scene.allocate("127.0.0.1:8000:80", NO_STEERING)


@pytest.mark.parametrize("facts", [NFTABLES, NO_STEERING])
def test_next_port_of_a_choice_is_tried(scene: Scene, facts: HostFacts) -> None:
    scene.steering.refused[HostPorts("tcp", "127.0.0.1", 8000, 8000)] = PortInUse("it is in use")
    with sockets.bind_port("tcp", "127.0.0.1", 8000), scene.allocated("127.0.0.1:8000-8010:80", facts) as found:
        assert names(found) == ["127.0.0.1:8001:80/tcp"]
        assert list(found.held) == [HostPorts("tcp", "127.0.0.1", 8001, 8001)]
    assert scene.is_free()


def test_last_refusal_is_reported_if_no_port_of_a_choice_is_free(scene: Scene) -> None:
    for port in range(8000, 8011):
        scene.steering.refused[HostPorts("tcp", "127.0.0.1", port, port)] = PortInUse(f"port {port} is in use")
    expected = "none of the host ports 8000-8010 is free; the last one tried: port 8010 is in use"
    with pytest.raises(PortInUse, match=expected):
        scene.allocate("127.0.0.1:8000-8010:80")
    assert scene.is_free()


def test_kernel_chooses_one_port_for_both_families(scene: Scene) -> None:
    with scene.allocated("80", NO_STEERING) as found:
        (first, second) = found.mappings
        assert [str(one.host_address) for one in (first, second)] == ["0.0.0.0", "::"]
        assert first.host_ports == second.host_ports
        assert {first.host_ports.first} == sockets.bound_ports("tcp")


def test_published_port_is_not_reserved(scene: Scene) -> None:
    scene.index.add(mapping("0.0.0.0", "8010-8020", container="other"))
    with pytest.raises(Conflict, match=r"0\.0\.0\.0:8010-8020/tcp is already published for container other"):
        scene.allocate("8000-8010:80-90")
    assert scene.is_free()
    with scene.allocated("127.0.0.1:8009-8010:80") as found:
        assert names(found) == ["127.0.0.1:8009:80/tcp"]


@pytest.mark.parametrize(("text", "last"), [("8000-8010:80-90", 8010), ("8000:80", 8000)])
def test_without_ipv6_only_ipv4_is_allocated(scene: Scene, text: str, last: int) -> None:
    scene.steering.refused[HostPorts("tcp", "::", 8000, last)] = Unsupported("this kernel has no IPv6 sockets")
    with scene.allocated(text) as found:
        assert [one.address for one in found.held] == ["0.0.0.0"]
        assert len(found.mappings) == 1
    with pytest.raises(Unsupported, match="no IPv6 sockets"):
        scene.allocate(f"[::]:{text}")
    assert scene.is_free()


def test_allocation_frees_what_is_left_in_it(scene: Scene) -> None:
    with scene.allocation() as allocation:
        for text in ("8000:80/udp", "8001:81/udp", "8005:85"):
            allocation.allocate("box", parse_port(f"127.0.0.1:{text}"))
        reserved = allocation.reserved()
        assert [len(fds) for fds in reserved.values()] == [1, 1, 0]  # what steering reserves has no descriptors
        published, *left = allocation.mappings
        del allocation.mappings[0]
        assert sockets.bound_ports("udp") == {8000, 8001}
    assert scene.is_free()
    assert scene.index.collision(published) == published
    assert [scene.index.collision(one) for one in left] == [None, None]


def test_two_mappings_of_one_request_conflict(scene: Scene) -> None:
    with scene.allocation() as allocation:
        allocation.allocate("box", parse_port("127.0.0.1:8000:80"))
        with pytest.raises(Conflict, match="already published for container box"):
            allocation.allocate("box", parse_port("127.0.0.1:8000:81"))
    assert scene.is_free()
    assert scene.index.collision(mapping("127.0.0.1", "8000")) is None
