"""Steering by itself, in a namespace: the sockets, takeover, reattachment, and failures."""

import os
import socket
from collections.abc import Callable

import pytest

from gangway.ebpf.keys import KINDS, blocks
from gangway.ebpf.steering import Steering
from gangway.errors import HostRefused, Unsupported
from gangway.host import sockets
from lab.redirect import detach_link, link_exists
from lab.waiting import wait_until
from tests.kernel.libbpf_calls import Calls, calls
from tests.kernel.steering_place import (
    LOOPBACKS,
    RANGE,
    REJECTED,
    RESERVED,
    SERVED,
    SIX,
    Place,
    bindable,
    entries,
    is_served,
    place,
    publish,
    steering,
)

__all__ = ["calls", "place", "steering"]


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
    """It has to know the port before: clients may be waiting, and it would reset them."""
    steering.reserve(*RANGE)
    steering.reserve(*SIX)
    assert place.relay.shared == {}
    steering.add(entries(RANGE, SERVED))
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
    assert steering.entries() == entries(RANGE, RESERVED)
    steering.add(entries(RANGE, SERVED))
    assert steering.entries() == entries(RANGE, SERVED)
    place.relay.stop()
    assert steering.entries() == entries(RANGE, RESERVED)
    with socket.create_connection(("127.0.0.1", 8005), 5) as waiting:
        assert waiting.getpeername() == ("127.0.0.1", 8005), "clients wait for the next relay"


def test_the_next_relay_gets_the_same_sockets(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    before = place.shared_sockets()
    place.relay.stop()
    place.relay.running = True
    publish(steering, RANGE)
    assert (place.shared_sockets(), steering.entries()) == (before, entries(RANGE, SERVED))
    assert is_served(place, "tcp", "127.0.0.1", 8005)


def test_without_a_relay_no_port_is_served(place: Place, steering: Steering) -> None:
    steering.reserve(*RANGE)
    place.relay.stop()
    with pytest.raises(HostRefused, match="the relay is stopped"):
        steering.add(entries(RANGE, SERVED))
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
            steering.add(entries(RANGE, SERVED))
    assert steering.entries() == entries(RANGE, RESERVED)
    steering.add(entries(RANGE, SERVED))
    assert (steering.entries(), place.shared_sockets()) == (entries(RANGE, SERVED), place.held_sockets())


# Takeover


def test_a_successor_takes_over_entries_and_sockets(place: Place, steering: Steering) -> None:
    publish(steering, RANGE)
    sockets_before, links_before = place.shared_sockets(), place.link_ids()
    steering.close()
    assert bindable(RANGE) == [7999, 8011], "the relay keeps it attached"
    successor = place.steering()
    assert (successor.unavailable, successor.entries()) == ("", entries(RANGE, SERVED))
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
    """As after a daemon that could not reattach."""
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
    refused: list[Callable[[], object]] = [
        lambda: steering.reserve(*RANGE),
        lambda: steering.add(entries(RANGE, SERVED)),
    ]
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
        assert (steering.entries(), len(place.shared_sockets())) == (entries(RANGE, SERVED), 2)
        steering.close()
        steering = place.steering()
        assert (steering.entries(), len(place.shared_sockets())) == (entries(RANGE, SERVED), 2)
        steering.close()
    successor = place.steering()  # the module was loaded meanwhile
    assert (successor.unavailable, len(place.shared_sockets())) == ("", 4)
    successor.reserve(*SIX)


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
    assert steering.entries() == entries(RANGE, SERVED)
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
