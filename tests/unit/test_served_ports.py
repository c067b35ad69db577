"""The relay's ports: what each request does, when a port ends, and that no descriptor is left over."""

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.inet import PROTOCOLS
from gangway.relay import protocol
from gangway.relay.protocol import (
    PAGE,
    Count,
    CountShared,
    Destination,
    Exclude,
    GetHeld,
    GetPort,
    GetShared,
    Hold,
    HostPorts,
    List,
    ListExcluded,
    ListHeld,
    Mode,
    Remove,
    Request,
    Retire,
    Serve,
    Share,
)
from gangway.relay.sockets import Backend, Counters, PublishedRange
from tests.unit.relay_doubles import Daemon, Launcher, Relay, close_all, fd_count, inodes, new_fds, new_socket, relay

__all__ = ["relay"]

PORT = HostPorts("tcp", "0.0.0.0", 80, 80)
OWN = Serve(PORT, Destination("172.17.0.2", 8000), Mode.OWN)
LEASED, SHARED = OWN._replace(mode=Mode.LEASED), OWN._replace(mode=Mode.SHARED)
RANGE = Serve(HostPorts("tcp", "0.0.0.0", 8000, 8010), Destination("172.17.0.2", 80), Mode.SHARED)
BACKEND = Backend(socket.IPPROTO_TCP, socket.AF_INET, "172.17.0.2", 8000)


@pytest.fixture
def daemon(relay: Relay) -> Daemon:
    return relay.daemon()


@pytest.fixture
def sock(relay: Relay) -> Iterator[socket.socket]:
    with new_socket() as made:
        yield made


@pytest.fixture
def fds(relay: Relay) -> Iterator[list[int]]:
    """Four descriptors of different files."""
    made = new_fds(4)
    yield made
    close_all(made)


@pytest.fixture
def launcher(relay: Relay) -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


def test_port_is_served_by_its_socket(relay: Relay, daemon: Daemon, sock: socket.socket) -> None:
    assert daemon.ask(OWN, sock.fileno()) == "ok"
    ((backend, served),) = [(port.backend, port.socks[0]) for port in relay.server.ports]
    assert (backend, inodes([served.fileno()])) == (BACKEND, inodes([sock.fileno()]))
    assert (len(relay.ports), daemon.served()) == (1, [OWN])


def test_remove_is_answered_when_no_connection_is_left(relay: Relay, daemon: Daemon, sock: socket.socket) -> None:
    before = fd_count()
    daemon.ask(OWN, sock.fileno())
    relay.server.has_connections = True
    assert daemon.ask(Remove(PORT)) == ""
    assert (len(relay.ports), relay.emptied, fd_count()) == (0, 0, before)
    relay.server.end_connections()
    relay.turn()
    assert (daemon.receive(), relay.emptied) == ("ok", 1)


def test_emptied_is_called_when_no_port_is_left(relay: Relay, daemon: Daemon, sock: socket.socket) -> None:
    daemon.ask(OWN, sock.fileno())
    daemon.ask(RANGE)
    daemon.ask(Remove(RANGE.ports))
    assert relay.emptied == 0
    daemon.ask(Remove(PORT))
    assert relay.emptied == 1


def test_remove_of_an_unknown_port_is_answered(relay: Relay, daemon: Daemon) -> None:
    assert daemon.ask(Remove(PORT)) == "ok"
    daemon.ask(RANGE)
    for first, last in ((8000, 8000), (8000, 8009), (8001, 8010)):
        assert daemon.ask(Remove(RANGE.ports._replace(first=first, last=last))) == "ok"
    assert (daemon.served(), relay.server.ranges[0].is_closed, relay.emptied) == ([RANGE], False, 0)


def test_removed_port_can_be_served_again(relay: Relay, daemon: Daemon, sock: socket.socket) -> None:
    for _ in range(2):
        assert daemon.ask(OWN, sock.fileno()) == "ok"
        assert daemon.ask(Remove(PORT)) == "ok"
    assert relay.emptied == 2


def test_ports_differ_by_protocol_address_and_number(relay: Relay, daemon: Daemon, sock: socket.socket) -> None:
    ports = [HostPorts(*words) for words in [PORT, ("udp", *PORT[1:]), ("tcp", "127.0.0.1", 80, 80)]]
    ports += [HostPorts("tcp", "0.0.0.0", 81, 81), HostPorts("tcp", "::", 80, 80)]
    assert [daemon.ask(OWN._replace(ports=one), sock.fileno()) for one in ports] == ["ok"] * 5
    daemon.ask(Remove(ports[1]))
    assert [one.ports for one in daemon.served()] == [ports[0], *ports[2:]]


@pytest.mark.parametrize("served", [OWN, SHARED, LEASED])
@pytest.mark.parametrize("again", [OWN, SHARED, LEASED, LEASED._replace(to=Destination("172.17.0.3", 8000))])
def test_port_is_served_once(daemon: Daemon, sock: socket.socket, served: Serve, again: Serve) -> None:
    daemon.ask(served, sock.fileno())
    if not served == again == LEASED:
        before = fd_count()
        assert daemon.ask(again, sock.fileno()) == "error tcp 0.0.0.0 80 80 is served already"
        assert (daemon.served(), fd_count()) == ([served], before)


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3])
def test_served_ports_are_listed_by_the_page(daemon: Daemon, count: int) -> None:
    ports = [RANGE._replace(ports=HostPorts("tcp", "::", port, port)) for port in range(1, count + 1)]
    for port in ports:
        daemon.ask(port)
    pages: list[list[str]] = []
    while lines := daemon.ask(List(sum(map(len, pages)))).removeprefix("ok").splitlines():
        pages.append(lines)
    assert all(len(page) == PAGE for page in pages[:-1])
    assert [protocol.parse_served(line.strip()) for page in pages for line in page] == ports


def test_counters_are_listed_by_the_page(relay: Relay, daemon: Daemon) -> None:
    for port in range(1, PAGE + 2):
        daemon.ask(RANGE._replace(ports=HostPorts("tcp", "::", port, port)))
        relay.server.ranges[-1].counted = Counters(connections=port, dropped=2**60)
    found: list[tuple[HostPorts, Counters]] = []
    while lines := daemon.ask(Count(len(found))).removeprefix("ok").splitlines():
        found += map(protocol.parse_counted, lines)
    assert [(ports.first, one.connections, one.active, one.dropped) for ports, one in found] == [
        (port, port, 0, 2**60) for port in range(1, PAGE + 2)
    ]


def test_long_lines_are_listed_by_shorter_pages(daemon: Daemon) -> None:
    clients = tuple(f"2001:db8:1111:2222:3333:4444:5555:{number:x}/128" for number in range(protocol.MOST_SUBNETS))
    ports = [RANGE._replace(ports=HostPorts("tcp", "::", port, port), admitted=clients) for port in range(1, 41)]
    for port in ports:
        daemon.ask(port)
    found: list[Serve] = []
    while lines := daemon.ask(List(len(found))).removeprefix("ok").splitlines():
        found += map(protocol.parse_served, lines)
    assert found == ports


@pytest.mark.parametrize("failure", [InvalidRequest("not a listening socket"), OSError(13, "denied")])
@pytest.mark.parametrize("served", [OWN, SHARED, LEASED])
def test_nothing_is_left_of_a_port_that_cannot_be_served(
    relay: Relay, daemon: Daemon, sock: socket.socket, launcher: Launcher, failure: Exception, served: Serve
) -> None:
    before = fd_count()
    fds = [sock.fileno(), launcher.pidfd] if served is LEASED else [sock.fileno()]
    relay.server.failure = failure
    assert daemon.ask(served, *fds) == f"error {failure}"
    assert (len(relay.ports), fd_count()) == (0, before)
    launcher.exit()
    relay.turn()
    assert (daemon.ask(served, *fds), relay.lines) == ("ok", [])


@pytest.mark.parametrize(("served", "count"), [(OWN, 0), (OWN, 2), (LEASED, 0), (LEASED, 3)])
def test_wrong_number_of_descriptors_is_refused(relay: Relay, daemon: Daemon, served: Serve, count: int) -> None:
    socks = [new_socket().detach() for _ in range(count)]
    before = fd_count()
    assert daemon.ask(served, *socks) == f"error wrong number of descriptors with tcp 0.0.0.0 80 80: {count}"
    assert (len(relay.ports), relay.server.ports, fd_count()) == (0, [], before)
    close_all(socks)


@pytest.mark.parametrize("request_", [OWN, LEASED, Share("tcp", 4), Share("udp", 4)])
def test_file_instead_of_a_socket_is_refused(daemon: Daemon, fds: list[int], request_: Request) -> None:
    before = fd_count()
    assert daemon.ask(request_, fds[0]).startswith("error ")
    assert (daemon.served(), daemon.ask(CountShared()), fd_count()) == ([], "ok 0", before)


def test_file_instead_of_a_pidfd_is_refused(relay: Relay, daemon: Daemon, sock: socket.socket, fds: list[int]) -> None:
    before = fd_count()
    assert daemon.ask(LEASED, sock.fileno(), fds[0]).startswith("error ")
    assert (daemon.served(), relay.server.open_sockets(), fd_count()) == ([], [], before)


@pytest.mark.parametrize("request_", [List(0), Count(0), CountShared(), GetHeld("redirect"), RANGE, Remove(PORT)])
def test_descriptors_of_other_requests_are_closed(daemon: Daemon, fds: list[int], request_: Request) -> None:
    before = fd_count()
    assert daemon.ask(request_, *fds).startswith("ok")
    assert fd_count() == before


# What another relay is given.


def test_descriptors_of_a_port_can_be_had_again(daemon: Daemon, sock: socket.socket, launcher: Launcher) -> None:
    fds = [sock.fileno(), launcher.pidfd]
    daemon.ask(LEASED, *fds)
    daemon.ask(RANGE)
    before = fd_count()
    assert daemon.given(GetPort(PORT)) == inodes(fds)
    assert daemon.given(GetPort(RANGE.ports)) == []
    assert fd_count() == before
    assert daemon.ask(GetPort(PORT._replace(first=81, last=81))) == "error tcp 0.0.0.0 81 81 is not served"


def test_shared_sockets_can_be_had_again(daemon: Daemon, sock: socket.socket) -> None:
    daemon.ask(Share("tcp", 4), sock.fileno())
    assert daemon.given(GetShared("tcp", 4)) == inodes([sock.fileno()])
    assert daemon.given(GetShared("tcp", 6)) == []


def test_names_and_excluded_addresses_are_listed(daemon: Daemon, fds: list[int]) -> None:
    assert (daemon.ask(ListHeld()), daemon.ask(ListExcluded())) == ("ok", "ok")
    daemon.ask(Hold("one", 1), fds[0])
    daemon.ask(Hold("other", 1), fds[1])
    daemon.ask(Exclude(0, ("192.0.2.5", "2001:db8::5")))
    assert (daemon.ask(ListHeld()), daemon.ask(ListExcluded())) == ("ok one other", "ok 192.0.2.5 2001:db8::5")


def test_retired_relay_accepts_nobody_and_removes_ports(
    relay: Relay, daemon: Daemon, sock: socket.socket, fds: list[int]
) -> None:
    daemon.ask(OWN, sock.fileno())
    daemon.ask(Hold("one", 2), *fds[:2])
    before = fd_count()
    assert [daemon.ask(Retire(limit_s)) for limit_s in (60, 90)] == ["ok", "ok"]
    assert (relay.limits_s, relay.server.is_left, relay.server.ports[0].is_left) == ([60], True, True), "once"
    assert (daemon.served(), daemon.held("one"), fd_count()) == ([OWN], [], before - 2)
    daemon.ask(Remove(PORT))
    assert relay.server.ports[0].is_closed


# Held descriptors.


@pytest.mark.parametrize("count", [0, 1, 13, protocol.MAX_DESCRIPTORS])
def test_held_descriptors_are_returned_in_order(relay: Relay, daemon: Daemon, count: int) -> None:
    files = new_fds(count)
    assert daemon.held("some") == [], "at first"
    assert daemon.ask(Hold("some", count), *files) == "ok"
    close_all(files[::2])
    expected = daemon.held("some")
    assert len(expected) == count
    assert daemon.held("some") == expected
    assert expected[1::2] == inodes(files[1::2])
    assert len(relay.ports) == 0
    close_all(files[1::2])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_held_descriptors_are_replaced_under_their_name(daemon: Daemon, fds: list[int], count: int) -> None:
    daemon.ask(Hold("other", 1), fds[3])
    before = fd_count()
    daemon.ask(Hold("some", 2), *fds[:2])
    assert daemon.ask(Hold("some", count), *fds[:count]) == "ok"
    assert (daemon.held("some"), daemon.held("other")) == (inodes(fds[:count]), inodes([fds[3]]))
    assert fd_count() == before + count


def test_excluded_addresses_are_replaced_from_an_offset_on(relay: Relay, daemon: Daemon) -> None:
    for offset, addresses, found in ((0, ["a", "b"], "ab"), (2, ["c"], "abc"), (0, [], "")):
        assert daemon.ask(Exclude(offset, tuple(f"fd00::{one}" for one in addresses))) == "ok"
        assert relay.server.excluded == [f"fd00::{one}" for one in found]


def test_log_file_is_used_and_not_held(relay: Relay, daemon: Daemon, fds: list[int]) -> None:
    before = fd_count()
    assert daemon.ask(Hold(protocol.LOG, 1), fds[0]) == "ok"
    assert (relay.log.files, daemon.held(protocol.LOG), fd_count()) == (inodes(fds[:1]), [], before)


@pytest.mark.parametrize("said", [0, 1, 3, protocol.MAX_DESCRIPTORS])
def test_refused_hold_leaves_what_was_held(daemon: Daemon, fds: list[int], said: int) -> None:
    daemon.ask(Hold("some", 2), *fds[:2])
    before = fd_count()
    assert daemon.ask(Hold("some", said), *fds[2:]) == f"error wrong number of descriptors with some: 2, not {said}"
    assert (daemon.held("some"), fd_count()) == (inodes(fds[:2]), before)


def test_held_descriptors_and_ports_outlive_the_daemon(
    relay: Relay, daemon: Daemon, sock: socket.socket, fds: list[int]
) -> None:
    daemon.ask(Hold("some", 4), *fds)
    daemon.ask(OWN, sock.fileno())
    daemon.ask(RANGE)
    daemon.close()
    successor = relay.daemon()
    assert (successor.held("some"), successor.served()) == (inodes(fds), [OWN, RANGE])


def test_relay_that_is_about_to_end_serves_no_shared_sockets(
    relay: Relay, daemon: Daemon, sock: socket.socket, fds: list[int]
) -> None:
    """The next relay has them, too: this one would reset its clients."""
    with new_socket() as other:
        daemon.ask(Share("tcp", 4), sock.fileno())
        daemon.ask(Share("udp", 6), other.fileno(), fds[0])
    daemon.ask(RANGE)
    daemon.close()
    relay.turn()
    assert relay.server.shared_count == 2, "it serves ports"
    successor = relay.daemon()
    successor.ask(Remove(RANGE.ports))
    assert relay.server.shared_count == 2, "it may get others"
    successor.close()
    relay.turn()
    assert relay.server.shared_count == 0


# Ports that share a socket.


@pytest.mark.parametrize(
    ("ports", "reached"),
    [
        (("tcp", "0.0.0.0", 8000, 8010), ("0.0.0.0", 8000, 8010)),
        (("udp", "192.0.2.5", 1, 65535), ("192.0.2.5", 1, 65535)),
        (("tcp", "2001:DB8:0:0::0:5", 80, 80), ("2001:db8::5", 80, 80)),
        (("udp", "fe80::0:5%eth0", 65535, 65535), ("fe80::5%eth0", 65535, 65535)),
    ],
)
def test_range_is_served_by_a_shared_socket(
    relay: Relay, daemon: Daemon, ports: tuple[str, str, int, int], reached: tuple[str, int, int]
) -> None:
    served = Serve(HostPorts(*ports), Destination("172.17.0.2", 1), Mode.SHARED)
    number, family = PROTOCOLS[ports[0]], socket.AF_INET6 if ":" in ports[1] else socket.AF_INET
    assert daemon.ask(served) == "ok"
    (published,) = relay.server.ranges
    assert published.at == PublishedRange(number, family, *reached)
    assert published.backend == Backend(number, socket.AF_INET, "172.17.0.2", 1)
    assert daemon.served() == [served], "as it was written"
    assert daemon.ask(Remove(served.ports)) == "ok"
    assert (published.is_closed, relay.emptied) == (True, 1)


@pytest.mark.parametrize(("protocol", "needed"), [("tcp", 0), ("udp", 1)])
def test_held_range_comes_with_a_raw_socket_for_udp(
    relay: Relay, daemon: Daemon, fds: list[int], protocol: str, needed: int
) -> None:
    held = Serve(HostPorts(protocol, "0.0.0.0", 8000, 8010), Destination("172.17.0.2", 1), Mode.HELD)
    if needed:
        refusal = "error wrong number of descriptors with " + " ".join(map(str, held.ports))
        assert [daemon.ask(held), daemon.ask(held, *fds[:2])] == [f"{refusal}: 0", f"{refusal}: 2"]
        assert daemon.served() == []
    with new_socket() as raw:
        assert daemon.ask(held, *[raw.fileno()][:needed]) == "ok"
        (published,) = relay.server.ranges
        assert inodes([one.fileno() for one in published.socks]) == inodes([raw.fileno()][:needed])
    assert daemon.served() == [held]
    assert daemon.ask(Remove(held.ports)) == "ok"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("family", "number"), [(4, socket.AF_INET), (6, socket.AF_INET6)])
def test_shared_socket_replaces_the_one_before(
    relay: Relay, daemon: Daemon, sock: socket.socket, fds: list[int], protocol: str, family: int, number: int
) -> None:
    before = fd_count()
    assert daemon.ask(CountShared()) == "ok 0"
    with new_socket() as first:
        daemon.ask(Share(protocol, family), first.fileno(), fds[0])
    assert daemon.ask(Share(protocol, family), sock.fileno(), fds[1]) == "ok"
    ((key, shared),) = relay.server.socks.items()
    assert (key, inodes([shared.fileno()])) == ((PROTOCOLS[protocol], number), inodes([sock.fileno()]))
    assert relay.server.bindings == {number: os.fstat(fds[1]).st_ino}
    assert (daemon.ask(CountShared()), fd_count()) == ("ok 1", before + 1)


@pytest.mark.parametrize("failure", [None, InvalidRequest("no map"), ValueError("too small")])
def test_nothing_is_left_of_a_socket_that_cannot_be_shared(
    relay: Relay, daemon: Daemon, sock: socket.socket, fds: list[int], failure: Exception | None
) -> None:
    before, relay.server.failure = fd_count(), failure
    answer = daemon.ask(Share("udp", 4), *([sock.fileno(), fds[0]] if failure else []))
    assert answer == f"error {failure or 'no socket came with the request'}"
    assert (daemon.ask(CountShared()), fd_count()) == ("ok 0", before)


REQUESTS: st.SearchStrategy[Request] = st.sampled_from(
    [OWN, LEASED, SHARED, RANGE, Remove(PORT), Share("udp", 4), Hold("some", 1), Hold("some", 2), GetHeld("some")]
)


@given(st.lists(st.tuples(REQUESTS, st.integers(0, 3), st.booleans()), max_size=8))
@example([(LEASED, 2, False), (LEASED, 2, False), (Remove(PORT), 0, False)])
def test_every_descriptor_is_used_or_closed(requests: list[tuple[Request, int, bool]]) -> None:
    before_all, relay, held, owners = fd_count(), Relay(), 0, 0
    daemon = relay.daemon()
    socks = [new_socket().detach() for _ in range(3)]
    before = fd_count()
    for request, count, fails in requests:
        relay.server.failure = OSError(24, "too many") if fails else None
        done = daemon.ask(request, *socks[:count]).startswith("ok")
        if done and isinstance(request, Hold):
            held = count
        if done and isinstance(request, Serve | Remove):
            owners = count - 1 if request == LEASED else owners if request == RANGE else 0
        assert fd_count() == before + len(relay.server.open_sockets()) + held + owners
    close_all(socks)
    relay.close()
    assert fd_count() == before_all
