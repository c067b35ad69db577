"""Steering by itself, in a namespace: reserved and served ports, the sockets, takeover, reattachment, and failures."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from threading import Thread

import pytest

from gangway.ebpf import libbpf
from gangway.ebpf.keys import AUTO_BOUND_BYTES, KINDS, PortBlock, blocks, unpack_auto_bound
from gangway.ebpf.steering import Steering
from gangway.errors import Conflict, HostRefused, PortInUse, Unsupported
from gangway.host import sockets
from lab.holder import Holder
from lab.netns import Namespace
from lab.redirect import detach_link, link_exists
from lab.waiting import wait_until
from tests.kernel.libbpf_calls import Calls, calls

__all__ = ["calls"]

Ports = tuple[str, str, int, int]
RANGE: Ports = ("tcp", "0.0.0.0", 8000, 8010)
SIX: Ports = ("udp", "::", 8000, 8010)
TYPES = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
LOOPBACKS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
REJECTED = "this kernel rejects the programs of steering.bpf.o: Invalid argument"


class Place:
    """A namespace, the relay's place in it, and the daemons' steering, one after the other.  The test is in it."""

    def __init__(self, host: Namespace, stack: ExitStack) -> None:
        self.host = host
        self.relay = Holder()
        self._stack = stack

    def steering(self) -> Steering:
        """A daemon's steering, which takes over from the one before."""
        made = Steering(self.relay)
        self._stack.callback(made.close)
        return made

    def link_ids(self) -> set[int]:
        """The IDs of the links that the relay holds."""
        return {libbpf.fdinfo(fd, "link_id") for fd in self.relay.fds["steering"]}

    def held_sockets(self) -> list[int]:
        """The sockets that the relay holds, by inode."""
        return [os.fstat(fd).st_ino for fd in self.relay.fds["sockets"]]

    def shared_sockets(self) -> list[int]:
        """The sockets that the relay serves, by inode, in the order of KINDS."""
        return [os.fstat(self.relay.shared[kind][0]).st_ino for kind in KINDS if kind in self.relay.shared]

    def shared_socket(self, protocol: str, family: int) -> socket.socket:
        """One of them."""
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
    steering.add(blocks(*ports))


def entries(ports: Ports, served: bool) -> dict[PortBlock, bool]:
    return dict.fromkeys(blocks(*ports), served)


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
    """The ports of a range, and of those beside it, that another program can bind."""
    protocol, address, first, last = ports
    return [port for port in range(first - 1, last + 2) if can_bind(protocol, address, port)]


def is_served(place: Place, protocol: str, address: str, port: int) -> bool:
    """True if a client of a port reaches the relay's socket, which sees the port that it requested."""
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


# The sockets


def test_each_protocol_and_family_has_a_socket_at_an_address_without_packets(place: Place, steering: Steering) -> None:
    made = [socket.socket(fileno=os.dup(fd)) for fd in place.relay.fds["sockets"]]
    try:
        assert [sock.getsockname()[0] for sock in made] == ["192.0.0.8", "192.0.0.8", "100::1", "100::1"]
        assert [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in made] == [1, 0, 1, 0]
    finally:
        for sock in made:
            sock.close()


def test_the_relay_gets_the_sockets_with_the_first_served_port(place: Place, steering: Steering) -> None:
    """The relay has to know the port before: it would reset clients that are waiting in the queue."""
    steering.reserve(*RANGE)
    steering.reserve(*SIX)
    assert place.relay.shared == {}
    steering.add(blocks(*RANGE))
    assert place.shared_sockets() == place.held_sockets()
    assert {kind: len(fds) for kind, fds in place.relay.shared.items()} == {
        ("tcp", 4): 1,
        ("udp", 4): 2,
        ("tcp", 6): 1,
        ("udp", 6): 2,
    }


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "::1"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_clients_of_served_ports_reach_the_relays_socket(
    place: Place, steering: Steering, protocol: str, address: str
) -> None:
    publish(steering, (protocol, address, 8001, 8006))
    at = LOOPBACKS.get(address, address)
    assert [port for port in range(8000, 8008) if is_served(place, protocol, at, port)] == [*range(8001, 8007)]
    steering.remove(blocks(protocol, address, 8001, 8006))
    assert not any(is_served(place, protocol, at, port) for port in (8001, 8006))


def test_ports_are_only_reserved_while_the_relay_lacks_the_sockets(place: Place, steering: Steering) -> None:
    steering.reserve(*RANGE)
    assert steering.entries() == entries(RANGE, False)
    steering.add(blocks(*RANGE))
    assert steering.entries() == entries(RANGE, True)
    place.relay.stop()
    assert steering.entries() == entries(RANGE, False)
    with socket.create_connection(("127.0.0.1", 8005), 5) as waiting:
        assert waiting.getpeername() == ("127.0.0.1", 8005), "clients wait for the next relay"


def test_the_next_relay_gets_the_same_sockets(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    before = place.shared_sockets()
    place.relay.stop()
    place.relay.running = True
    publish(steering, RANGE)
    assert (place.shared_sockets(), steering.entries()) == (before, entries(RANGE, True))
    assert is_served(place, "tcp", "127.0.0.1", 8005)


def test_without_a_relay_no_port_is_served(place: Place, steering: Steering) -> None:
    steering.reserve(*RANGE)
    place.relay.stop()
    with pytest.raises(HostRefused, match="the relay is stopped"):
        steering.add(blocks(*RANGE))
    assert bindable(RANGE) == [7999, 8011], "they stay reserved"


def test_sockets_that_the_relay_refused_are_given_to_it_again(
    place: Place, steering: Steering, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering.reserve(*RANGE)
    share = place.relay.share

    def refuse(protocol: str, family: int, fds: list[int]) -> None:
        if (protocol, family) == KINDS[1]:
            raise HostRefused("the relay has no file descriptor left")
        share(protocol, family, fds)

    with monkeypatch.context() as patch:
        patch.setattr(place.relay, "share", refuse)
        with pytest.raises(HostRefused, match="no file descriptor left"):
            steering.add(blocks(*RANGE))
    assert steering.entries() == entries(RANGE, False)
    steering.add(blocks(*RANGE))
    assert (steering.entries(), place.shared_sockets()) == (entries(RANGE, True), place.held_sockets())


# Takeover


def test_a_successor_takes_over_entries_and_sockets(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    sockets_before, links_before = place.shared_sockets(), place.link_ids()
    steering.close()
    assert bindable(RANGE) == [7999, 8011], "the relay keeps it attached"
    successor = place.steering()
    assert (successor.unavailable, successor.entries()) == ("", entries(RANGE, True))
    assert place.shared_sockets() == place.held_sockets() == sockets_before
    assert is_served(place, "tcp", "127.0.0.1", 8005)
    wait_until(lambda: not any(map(link_exists, links_before)), "the end of the former links")
    successor.remove(blocks(*RANGE))
    assert len(bindable(RANGE)) == 13, "the counts were taken over, too"


def test_a_successor_leaves_no_descriptor_open(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    steering.close()
    counts = []
    for _ in range(3):
        place.steering().close()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert len(set(counts)) == 1


def test_without_a_relay_a_successor_starts_from_nothing(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    before = place.link_ids()
    place.relay.stop()
    steering.close()
    wait_until(lambda: not any(map(link_exists, before)), "the end of the links")
    place.relay.running = True
    assert place.steering().entries() == {}
    assert len(bindable(RANGE)) == 13


def test_a_relay_with_sockets_of_a_lost_steering_gets_new_ones(place: Place, steering: Steering) -> None:
    """An earlier daemon that could not reattach leaves such a relay."""
    publish(steering, RANGE)
    before = place.shared_sockets()
    place.relay.hold("steering", ())
    place.relay.hold("sockets", ())
    steering.close()
    place.steering()
    assert place.shared_sockets() == place.held_sockets()
    assert not {*before} & {*place.shared_sockets()}


# Where it is unavailable


def test_unavailable_steering_says_why(place: Place, calls: Calls) -> None:
    calls.rejects_programs = True
    steering = place.steering()
    assert steering.unavailable == REJECTED
    refused: list[Callable[[], object]] = [lambda: steering.reserve(*RANGE), lambda: steering.add(blocks(*RANGE))]
    for call in refused:
        with pytest.raises(Unsupported, match=f"steering is unavailable: {REJECTED}"):
            call()
    with pytest.raises(Unsupported, match="rejects"):
        steering.reserve(*SIX)
    steering.release(*RANGE)
    steering.remove(blocks(*RANGE))
    steering.reattach()
    steering.reclaim_auto_bound()
    assert (steering.entries(), steering.is_attached()) == ({}, True)
    assert (place.relay.fds["steering"], place.relay.fds["sockets"]) == ([], [])


def test_a_successor_that_is_unavailable_ends_the_former_steering(
    place: Place, steering: Steering, calls: Calls
) -> None:
    publish(steering, RANGE)
    before = place.link_ids()
    steering.close()
    calls.rejects_programs = True
    assert place.steering().unavailable == REJECTED
    assert (place.relay.fds["steering"], place.relay.fds["sockets"]) == ([], [])
    wait_until(lambda: not any(map(link_exists, before)), "the end of the links")


@pytest.mark.parametrize("kind", KINDS)
def test_without_one_of_the_sockets_it_is_unavailable(
    place: Place, kind: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = sockets.bind_unreachable

    def refuse(protocol: str, family: int) -> socket.socket:
        if (protocol, family) == kind:
            raise HostRefused("no socket can be bound")
        return nowhere(protocol, family)

    monkeypatch.setattr(sockets, "bind_unreachable", refuse)
    before = len(os.listdir("/proc/self/fd"))
    steering = place.steering()
    assert steering.unavailable == "no socket can be bound"
    assert len(os.listdir("/proc/self/fd")) == before, "nothing stays attached"
    with pytest.raises(Unsupported, match="no socket can be bound"):
        steering.reserve(*RANGE)


def test_a_kernel_without_ipv6_steers_ipv4(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sockets, "has_sockets", lambda _protocol, family: family == 4)
        steering = place.steering()
        assert (steering.unavailable, len(place.held_sockets())) == ("", 2)
        with pytest.raises(Unsupported, match="this kernel has no IPv6 sockets"):
            steering.reserve(*SIX)
        publish(steering, RANGE)
        assert (steering.entries(), len(place.shared_sockets())) == (entries(RANGE, True), 2)
        steering.close()
        steering = place.steering()
        assert (steering.entries(), len(place.shared_sockets())) == (entries(RANGE, True), 2)
        steering.close()
    successor = place.steering()  # the module was loaded meanwhile
    assert (successor.unavailable, len(place.shared_sockets())) == ("", 4)
    successor.reserve(*SIX)


# The ports


@pytest.mark.parametrize("ports", [RANGE, SIX, ("udp", "127.0.0.1", 8003, 8003), ("tcp", "::1", 8000, 8001)])
def test_reserved_ports_cannot_be_bound_until_they_are_released(steering: Steering, ports: Ports) -> None:
    reservation = steering.reserve(*ports)
    assert steering.entries() == entries(ports, False)
    assert bindable(ports) == [ports[2] - 1, ports[3] + 1]
    reservation.close()
    assert steering.entries() == {}
    assert len(bindable(ports)) == ports[3] - ports[2] + 3


def test_every_port_can_be_reserved(steering: Steering) -> None:
    reservation = steering.reserve("udp", "127.0.0.1", 1, 65535)
    assert not any(can_bind("udp", "127.0.0.1", port) for port in (1, 2, 80, 32768, 65535))
    reservation.close()
    assert can_bind("udp", "127.0.0.1", 65535)


def test_ports_are_reserved_before_they_are_checked(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, found = sockets.first_port_in_use, []

    def look(*ports: object) -> int | None:
        found.append(bindable(RANGE))
        return taken(*RANGE)

    monkeypatch.setattr(sockets, "first_port_in_use", look)
    steering.reserve(*RANGE)
    assert found == [[7999, 8011]]


def test_a_range_with_a_port_in_use_is_not_reserved(steering: Steering) -> None:
    with socket.create_server(("0.0.0.0", 8003)), pytest.raises(PortInUse, match="8003"):
        steering.reserve(*RANGE)
    assert steering.entries() == {}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_single_port_that_is_bound_is_not_reserved(steering: Steering, protocol: str, address: str) -> None:
    """It is in use even if no socket listens there yet."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, TYPES[protocol]) as other:
        other.bind((address, 8000))
        with pytest.raises(PortInUse, match=f"8000/{protocol}"):
            steering.reserve(protocol, address, 8000, 8000)
        assert steering.entries() == {}
    steering.reserve(protocol, address, 8000, 8000)
    assert not can_bind(protocol, address, 8000)


def test_a_single_port_is_held_by_a_socket_while_it_is_reserved(place: Place, calls: Calls) -> None:
    steering, found = place.steering(), []
    calls.before_update = lambda: found.append(can_bind("tcp", "127.0.0.1", 8000))
    steering.reserve("tcp", "127.0.0.1", 8000, 8000)
    assert found == [False]


@pytest.mark.parametrize("last", [8000, 8010])
def test_ports_of_an_address_that_is_not_the_hosts_are_not_reserved(steering: Steering, last: int) -> None:
    with pytest.raises(Conflict, match=r"192\.0\.2\.77"):
        steering.reserve("tcp", "192.0.2.77", 8000, last)
    assert steering.entries() == {}


@pytest.mark.parametrize("failing", range(3))
def test_a_failed_reservation_leaves_what_was_there(place: Place, calls: Calls, failing: int) -> None:
    steering = place.steering()
    steering.reserve(*SIX)
    calls.failing_update = failing
    with pytest.raises(HostRefused, match="cannot add an entry to the eBPF map published: No space left on device"):
        steering.reserve(*RANGE)
    assert steering.entries() == entries(SIX, False)
    assert (len(bindable(RANGE)), bindable(SIX)) == (13, [7999, 8011])


def test_served_ports_are_reserved_again_without_a_check(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted relay gets them."""
    publish(steering, RANGE)
    monkeypatch.setattr(sockets, "first_port_in_use", lambda *_: pytest.fail("checked"))
    steering.reserve(*RANGE).close()
    assert steering.entries() == entries(RANGE, True)


def test_only_reserved_ports_are_released(steering: Steering) -> None:
    publish(steering, RANGE)
    steering.reserve(*SIX)
    for ports in (RANGE, SIX):
        steering.release(*ports)
    assert steering.entries() == entries(RANGE, True)
    for _ in range(2):
        steering.remove(blocks(*RANGE))
    assert steering.entries() == {}


@pytest.mark.parametrize("failing", range(3))
def test_a_failed_add_leaves_what_was_there(place: Place, calls: Calls, failing: int) -> None:
    steering = place.steering()
    publish(steering, SIX)
    steering.reserve(*RANGE)
    calls.failing_update = failing
    with pytest.raises(HostRefused, match="cannot add an entry"):
        steering.add(blocks(*RANGE))
    assert steering.entries() == entries(SIX, True) | entries(RANGE, False)
    assert bindable(RANGE) == [7999, 8011]


def test_two_threads_leave_the_right_ports_reserved(place: Place, steering: Steering) -> None:
    def work(first: int) -> None:
        with place.host.entered():
            for _ in range(20):
                steering.reserve("tcp", "0.0.0.0", first, first).close()
                steering.reserve("tcp", "0.0.0.0", first + 1, first + 1)
                steering.add(blocks("tcp", "0.0.0.0", first + 1, first + 1))
                steering.entries()

    threads = [Thread(target=work, args=(first,)) for first in (8000, 8002)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(block.first for block in steering.entries()) == [8001, 8003]
    assert [port for port in range(8000, 8004) if can_bind("tcp", "0.0.0.0", port)] == [8000, 8002]


# Auto-bound ports


def _auto_bound(steering: Steering) -> list[tuple[str, int]]:
    """Return the auto-bound ports that the kernel has recorded."""
    assert steering._map is not None
    return [unpack_auto_bound(key) for key in steering._map.loaded.keys("auto_bound", AUTO_BOUND_BYTES)]


def test_an_auto_bound_port_is_reclaimed_when_no_socket_has_it(place: Place, steering: Steering) -> None:
    place.host.sysctl("net.ipv4.ip_local_port_range", "8000 8001")
    publish(steering, ("udp", "0.0.0.0", 8000, 8001))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        port = client.getsockname()[1]
        place.host.sysctl("net.ipv4.ip_local_port_range", "40000 50000")  # for the clients that ask below
        for _ in range(3):
            steering.reclaim_auto_bound()
        assert (_auto_bound(steering), is_served(place, "udp", "127.0.0.1", port)) == ([("udp", port)], False)
        client.recv(100)
    assert is_served(place, "udp", "127.0.0.1", port)
    for _ in range(2):
        assert ("udp", port) in _auto_bound(steering)
        steering.reclaim_auto_bound()
    assert ("udp", port) not in _auto_bound(steering)


# Detached by another program


def test_detached_steering_is_reattached(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    links, before = place.link_ids(), place.shared_sockets()
    steering.reattach()
    assert place.link_ids() == links, "it was attached"
    for link in links:
        detach_link(link)
    assert (steering.is_attached(), len(bindable(RANGE))) == (False, 13)
    steering.reattach()
    assert (steering.is_attached(), bindable(RANGE)) == (True, [7999, 8011])
    assert steering.entries() == entries(RANGE, True)
    assert place.shared_sockets() == place.held_sockets() == before
    assert not place.link_ids() & links
    assert is_served(place, "tcp", "127.0.0.1", 8005)


def test_steering_that_cannot_be_reattached_is_unavailable(place: Place, calls: Calls) -> None:
    steering = place.steering()
    publish(steering, RANGE)
    detach_link(min(place.link_ids()))
    calls.rejects_programs = True
    with pytest.raises(Unsupported, match=REJECTED):
        steering.reattach()
    assert (steering.unavailable, steering.is_attached()) == (REJECTED, True)
    assert steering.entries() == {}
    assert (place.relay.fds["steering"], place.relay.fds["sockets"]) == ([], [])
    steering.reattach()
    steering.close()
    calls.rejects_programs = False
    successor = place.steering()
    assert (successor.unavailable, successor.entries()) == ("", {})
    publish(successor, SIX)
    assert place.shared_sockets() == place.held_sockets()
