"""What a holder's message asks for, and what becomes of the descriptors that come with it."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.log import Log
from gangway.relay.core.datagram import Datagrams
from gangway.relay.core.loop import Loop
from gangway.relay.core.shared import SharedSockets
from gangway.relay.core.stream import Streams
from gangway.relay.kept import MOST_HELD, Published
from gangway.relay.lease import Leases, parse
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend

NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}
# Text that comes near to a message: its words, in any number, order and spelling.
WORDS = st.sampled_from(["lease", "tcp", "udp", "sctp", "10.0.0.1", "::1", "80", "0", "65536", "-1", "\0", "\u0661"])
NEARLY = st.lists(WORDS | st.text(max_size=5), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("message", "backend"),
    [
        ("lease tcp 172.17.0.2 80", Backend(socket.IPPROTO_TCP, socket.AF_INET, "172.17.0.2", 80)),
        ("lease udp fd00::2 53", Backend(socket.IPPROTO_UDP, socket.AF_INET6, "fd00::2", 53)),
        ("lease sctp 10.0.0.1 65535", Backend(socket.IPPROTO_SCTP, socket.AF_INET, "10.0.0.1", 65535)),
    ],
)
def test_a_good_message(message: str, backend: Backend) -> None:
    assert parse(message) == backend


@pytest.mark.parametrize(
    "message",
    [
        "",
        "lease",
        "lease tcp 10.0.0.1",
        "lease tcp 10.0.0.1 80 more",
        "release tcp 10.0.0.1 80",
        "lease TCP 10.0.0.1 80",
        "lease dccp 10.0.0.1 80",
        "lease tcp 10.0.0 80",
        "lease tcp 10.0.0.256 80",
        "lease tcp localhost 80",
        "lease tcp :::1 80",
        "lease tcp fe80::1%lo 80",
        "lease tcp 10.0.0.1 0",
        "lease tcp 10.0.0.1 -1",
        "lease tcp 10.0.0.1 65536",
        "lease tcp 10.0.0.1 http",
        "lease tcp 10.0.0.1 8.0",
        "lease tcp 10.0.0.1\0 80",
        "lease tcp 10.0.0.1 " + "9" * 5000,
    ],
)
def test_a_bad_message_is_shown_as_it_came(message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(message)
    assert repr(message) in str(refusal.value)


@given(
    st.sampled_from(sorted(NUMBERS)),
    st.ip_addresses(),
    st.integers(1, 65535),
)
def test_what_was_asked_is_what_is_understood(protocol: str, address: IPv4Address | IPv6Address, port: int) -> None:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    backend = parse(f"lease {protocol} {address} {port}")
    assert backend == Backend(NUMBERS[protocol], family, str(address), port)


@given(st.text() | NEARLY | NEARLY.map("lease {}".format))
def test_any_text_is_a_lease_or_is_refused(message: str) -> None:
    try:
        backend = parse(message)
    except InvalidRequest:
        return
    socket.inet_pton(backend.family, backend.address)
    assert backend.protocol in NUMBERS.values()
    assert 0 < backend.port < 65536


class Office:
    """Leases in this process, and sockets whose other ends were handed over."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.ports: list[socket.socket] = []
        self.trouble: Exception | None = None
        self._holders: list[socket.socket] = []
        self._stack = stack
        self._path = str(path)
        self._loop = Loop()
        stack.callback(self._loop.close)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(self._path)
        listener.listen()
        log = Log(lambda _level, _line: None)
        settings, keys = Settings(), count(1)
        streams, datagrams = Streams(self._loop, settings, log), Datagrams(self._loop, settings, log)
        shared = SharedSockets(streams, datagrams, partial(next, keys))
        self.leases = Leases(self._loop, listener, log, self._publish, self._withdraw, lambda: None, shared)
        stack.callback(self.leases.kept.let_go)

    def holder(self) -> socket.socket:
        """One more, that was accepted."""
        made = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self._holders.append(made)
        made.connect(self._path)
        self.turn()
        return made

    def say(self, holder: socket.socket, message: str, *ours: socket.socket) -> str:
        """What is answered; nothing if the relay has ended the connection.  `ours` go with it, and are closed here."""
        socket.send_fds(holder, [message.encode()], [sock.fileno() for sock in ours])
        for sock in ours:
            sock.close()
        self.turn()
        return holder.recv(1000, socket.MSG_DONTWAIT).decode()

    def close(self) -> None:
        """All holders go."""
        for holder in self._holders:
            holder.close()
        self.turn()

    def turn(self) -> None:
        """One round that waits for nothing."""
        self._loop.call_soon(lambda _events: None, 0)
        self._loop.turn()

    def ends(self, count: int) -> tuple[list[socket.socket], list[socket.socket]]:
        """Sockets that tell, and as many to hand over."""
        pairs = [socket.socketpair() for _ in range(count)]
        for pair in pairs:
            for sock in pair:
                self._stack.enter_context(sock)
        return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]

    def _publish(self, _backend: Backend, sock: socket.socket) -> socket.socket:
        if self.trouble is not None:
            sock.close()
            raise self.trouble
        self.ports.append(self._stack.enter_context(sock))
        return sock

    def _withdraw(self, port: Published, then: Callable[[], None]) -> None:
        port.close()
        then()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with ExitStack() as stack:
        made = Office(tmp_path / "relay", stack)
        yield made
        made.close()


def open_ones(mine: list[socket.socket]) -> int:
    """How many have an other end that somebody has open."""
    found = 0
    for sock in mine:
        with suppress(BlockingIOError):
            assert sock.recv(1, socket.MSG_DONTWAIT) == b""
            continue
        found += 1
    return found


LEASE = "lease tcp 172.17.0.2 80"


@pytest.mark.parametrize("count", [1, 2, MOST_HELD, MOST_HELD + 1])
def test_of_several_descriptors_one_is_the_leases(office: Office, count: int) -> None:
    mine, theirs = office.ends(count)
    holder = office.holder()
    assert office.say(holder, LEASE, *theirs) == "ok"
    assert (open_ones(mine), len(office.ports)) == (1, 1)
    holder.close()
    office.turn()
    assert (open_ones(mine), len(office.leases)) == (0, 0)


@pytest.mark.parametrize("message", ["nonsense", "lease tcp 172.17.0.2", f"{LEASE} more", "KEEP 1", "released"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_comes_with_no_lease_is_closed(office: Office, message: str, count: int) -> None:
    mine, theirs = office.ends(count)
    holder = office.holder()
    assert office.say(holder, message, *theirs).startswith("error not a lease")
    assert holder.recv(1, socket.MSG_DONTWAIT) == b"", "and the holder is sent away"
    assert (open_ones(mine), office.ports, len(office.leases)) == (0, [], 0)


@pytest.mark.parametrize("count", [1, 3])
def test_what_comes_with_nothing_at_all_is_closed(office: Office, count: int) -> None:
    mine, theirs = office.ends(count)
    assert office.say(office.holder(), " ", *theirs) == ""
    assert (open_ones(mine), len(office.leases)) == (0, 0)


@pytest.mark.parametrize("trouble", [InvalidRequest("not a listening socket"), OSError(24, "too many")])
def test_of_a_lease_that_cannot_be_served_nothing_is_left(office: Office, trouble: Exception) -> None:
    office.trouble = trouble
    mine, theirs = office.ends(2)
    assert office.say(office.holder(), LEASE, *theirs) == f"error {trouble}"
    assert (open_ones(mine), len(office.leases)) == (0, 0)


@pytest.mark.parametrize("message", [LEASE, "hold some 2", "held some", "share udp 4 2", "nonsense"])
def test_who_has_a_lease_may_say_no_more(office: Office, message: str) -> None:
    (first, *others), theirs = office.ends(3)
    holder = office.holder()
    office.say(holder, LEASE, theirs[0])
    assert office.say(holder, message, *theirs[1:]) == ""
    assert (open_ones([first, *others]), len(office.leases)) == (0, 0), "the lease has ended"


def test_a_lease_of_something_that_is_no_socket_leaves_nothing_open(office: Office) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    holder = office.holder()
    socket.send_fds(holder, [LEASE.encode()], [writer])
    os.close(writer)
    office.turn()
    assert holder.recv(1000, socket.MSG_DONTWAIT).startswith(b"error ")
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"", "somebody has the other end open"


def test_what_one_holds_another_can_have(office: Office) -> None:
    """The daemon's connection ends, and the next daemon comes."""
    mine, theirs = office.ends(2)
    daemon = office.holder()
    assert office.say(daemon, "hold some 2", *theirs) == "ok"
    daemon.close()
    office.turn()
    assert (open_ones(mine), len(office.leases)) == (2, 0), "what is held keeps no relay alive"
    successor = office.holder()
    successor.send(b"held some")
    office.turn()
    answer, fds, _, _ = socket.recv_fds(successor, 1000, MOST_HELD)
    assert answer == b"ok"
    for fd, sock, name in zip(fds, mine, (b"first", b"second"), strict=True):
        with socket.socket(fileno=fd) as same:
            same.send(name)
        assert sock.recv(1000, socket.MSG_DONTWAIT) == name
    assert open_ones(mine) == 2
    assert office.say(successor, "hold some 0") == "ok"
    assert open_ones(mine) == 0


def test_a_range_of_the_daemons_outlives_its_connection(office: Office) -> None:
    daemon = office.holder()
    assert office.say(daemon, "keep tcp 0.0.0.0 8000 8010 172.17.0.2 80 shared") == "ok"
    daemon.close()
    office.turn()
    assert len(office.leases) == 1
    successor = office.holder()
    assert office.say(successor, "kept 0") == "ok\ntcp 0.0.0.0 8000 8010 172.17.0.2 80 shared"
    assert office.say(successor, "drop tcp 0.0.0.0 8000 8010") == "ok"
    successor.close()
    office.turn()
    assert (len(office.leases), office.ports) == (0, [])


@pytest.mark.parametrize("count", [1, 2])
def test_a_socket_that_cannot_be_shared_is_closed(office: Office, count: int) -> None:
    """UDP's comes with a map, and these are no maps."""
    mine, theirs = office.ends(count)
    daemon = office.holder()
    assert office.say(daemon, f"share udp 4 {count}", *theirs).startswith("error ")
    assert open_ones(mine) == 0
    assert office.say(daemon, "shared") == "ok 0"
