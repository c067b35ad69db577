"""The ports that steering reserves and serves, and those that the kernel has chosen for sockets."""

import socket
from threading import Thread

import pytest

from gangway.ebpf.keys import AUTO_BOUND_BYTES, SteeringState, blocks, unpack_auto_bound
from gangway.ebpf.steering import Steering
from gangway.errors import Conflict, HostRefused, PortInUse
from gangway.host import sockets
from tests.kernel.libbpf_calls import Calls, calls
from tests.kernel.steering_place import (
    HELD,
    LOOPBACKS,
    RANGE,
    RESERVED,
    SERVED,
    SIX,
    TYPES,
    Place,
    Ports,
    bindable,
    can_bind,
    entries,
    is_served,
    place,
    publish,
    steering,
)

__all__ = ["calls", "place", "steering"]


@pytest.mark.parametrize("ports", [RANGE, SIX, ("udp", "127.0.0.1", 8003, 8003), ("tcp", "::1", 8000, 8001)])
def test_reserved_ports_cannot_be_bound_until_they_are_released(steering: Steering, ports: Ports) -> None:
    reservation = steering.reserve(*ports)
    assert steering.entries() == entries(ports, RESERVED)
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
    """Also if nothing listens there yet."""
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
    assert steering.entries() == entries(SIX, RESERVED)
    assert (len(bindable(RANGE)), bindable(SIX)) == (13, [7999, 8011])


def test_served_ports_are_reserved_again_without_a_check(steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that was started anew is to have them."""
    publish(steering, RANGE)
    monkeypatch.setattr(sockets, "first_port_in_use", lambda *_: pytest.fail("checked"))
    steering.reserve(*RANGE).close()
    assert steering.entries() == entries(RANGE, SERVED)


def test_only_reserved_ports_are_released(steering: Steering) -> None:
    publish(steering, RANGE)
    steering.reserve(*SIX)
    for ports in (RANGE, SIX):
        steering.release(*ports)
    assert steering.entries() == entries(RANGE, SERVED)
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
        steering.add(entries(RANGE, SERVED))
    assert steering.entries() == entries(SIX, SERVED) | entries(RANGE, RESERVED)
    assert bindable(RANGE) == [7999, 8011]


def test_two_threads_leave_the_right_ports_reserved(place: Place, steering: Steering) -> None:
    def work(first: int) -> None:
        with place.host.entered():
            for _ in range(20):
                steering.reserve("tcp", "0.0.0.0", first, first).close()
                steering.reserve("tcp", "0.0.0.0", first + 1, first + 1)
                steering.add(entries(("tcp", "0.0.0.0", first + 1, first + 1), SERVED))
                steering.entries()

    threads = [Thread(target=work, args=(first,)) for first in (8000, 8002)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(block.first for block in steering.entries()) == [8001, 8003]
    assert [port for port in range(8000, 8004) if can_bind("tcp", "0.0.0.0", port)] == [8000, 8002]


# Held ports


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "::1"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_held_ports_are_served_and_can_be_bound(place: Place, steering: Steering, protocol: str, address: str) -> None:
    held: Ports = (protocol, address, 8000, 8010)
    at = LOOPBACKS.get(address, address)
    with sockets.bind_port(protocol, address, 8003):
        steering.add(entries(held, HELD))
        assert [port for port in (7999, 8003, 8004) if is_served(place, protocol, at, port)] == [8003, 8004]
    assert steering.entries() == entries(held, HELD)
    assert len(bindable(held)) == len(bindable((protocol, "::" if ":" in at else "0.0.0.0", 8000, 8010))) == 13
    with sockets.bind_port(protocol, address, 8003) as holder:
        assert is_served(place, protocol, at, 8003)
        steering.remove(blocks(*held))
        holder.settimeout(5)
        with socket.socket(holder.family, TYPES[protocol]) as client:
            client.connect((at, 8003))
            client.send(b"hello")
            if protocol == "udp":
                assert holder.recv(100) == b"hello", "it gets the port's packets again"
            else:
                holder.accept()[0].close()


def test_a_held_port_leaves_what_others_have_reserved(steering: Steering) -> None:
    steering.add(entries(("tcp", "127.0.0.1", 8000, 8010), HELD))
    steering.reserve("tcp", "127.0.0.2", 8004, 8004)
    assert bindable(("tcp", "127.0.0.2", 8003, 8005)) == [8002, 8003, 8005, 8006]
    assert bindable(("tcp", "0.0.0.0", 8003, 8005)) == [8002, 8003, 8005, 8006]
    assert can_bind("tcp", "127.0.0.1", 8004)
    assert can_bind("tcp", "::", 8004)


@pytest.mark.parametrize(("before", "after"), [(RESERVED, HELD), (SERVED, HELD), (HELD, SERVED)])
def test_ports_change_their_state_in_place(
    place: Place, steering: Steering, before: SteeringState, after: SteeringState
) -> None:
    steering.add(entries(RANGE, before))
    steering.add(entries(RANGE, after))
    assert steering.entries() == entries(RANGE, after)
    assert len(bindable(RANGE)) == (13 if after is HELD else 2)
    steering.close()
    successor = place.steering()
    assert len(bindable(RANGE)) == (13 if after is HELD else 2), "it counts the same ports"
    successor.remove(blocks(*RANGE))
    assert len(bindable(RANGE)) == 13


def test_held_ports_are_reserved_only_if_they_are_free(steering: Steering) -> None:
    """An entry may be left of a daemon that was killed."""
    steering.add(entries(RANGE, HELD))
    with sockets.bind_port("tcp", "0.0.0.0", 8003), pytest.raises(PortInUse, match="8003"):
        steering.reserve(*RANGE)
    steering.reserve(*RANGE)
    assert steering.entries() == entries(RANGE, RESERVED)
    assert bindable(RANGE) == [7999, 8011]


# Auto-bound ports


def _auto_bound(steering: Steering) -> list[tuple[str, int]]:
    """Return the ports that the kernel has recorded."""
    assert steering._map is not None
    return [unpack_auto_bound(key) for key in steering._map.loaded.keys("auto_bound", AUTO_BOUND_BYTES)]


def test_an_auto_bound_port_is_reclaimed_when_no_socket_has_it(place: Place, steering: Steering) -> None:
    place.host.sysctl("net.ipv4.ip_local_port_range", "8000 8001")
    publish(steering, ("udp", "0.0.0.0", 8000, 8001))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        port = client.getsockname()[1]
        place.host.sysctl("net.ipv4.ip_local_port_range", "40000 50000")  # for the clients below
        for _ in range(3):
            steering.reclaim_auto_bound()
        assert (_auto_bound(steering), is_served(place, "udp", "127.0.0.1", port)) == ([("udp", port)], False)
        client.recv(100)
    assert is_served(place, "udp", "127.0.0.1", port)
    for _ in range(2):
        assert ("udp", port) in _auto_bound(steering)
        steering.reclaim_auto_bound()
    assert ("udp", port) not in _auto_bound(steering)
