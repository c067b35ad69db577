"""Ports that the relay keeps: what a message does, what it is answered, and that no descriptor is left over."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.relay.kept import MOST_HELD, PAGE, Kept, Range, parse_range
from gangway.relay.sockets import Backend
from tests.unit.pretend_relay import Pool, Port, Ports

# Text that comes near to a message: its words, in any number, order and spelling.
WORDS = st.sampled_from(
    [
        "keep",
        "drop",
        "kept",
        "share",
        "shared",
        "own",
        "hold",
        "held",
        "tcp",
        "udp",
        "4",
        "10.0.0.1",
        "::1",
        "80",
        "0",
        "1",
        "65536",
        "-1",
        "\0",
        "\u0661",
    ]
)
NEARLY = st.lists(WORDS | st.text(max_size=5), max_size=9).map(" ".join)
WEB = "tcp 0.0.0.0 80 80"
TO = "172.17.0.2 8000 own"
BACKEND = Backend(socket.IPPROTO_TCP, socket.AF_INET, "172.17.0.2", 8000)


class Desk:
    """A relay's kept ports, and what was said about them."""

    def __init__(self) -> None:
        self.ports: list[Port] = []
        self.leaving: list[Callable[[], None]] = []
        self.said: list[str] = []
        self.given: list[list[int]] = []
        """The descriptors that went with each answer."""
        self.trouble: Exception | None = None
        self.pool = Pool()
        self.kept = Kept(self._publish, self._withdraw, self.pool)

    def say(self, message: str, *fds: int) -> list[str]:
        """What is answered at once."""
        before = len(self.said)
        self.kept.hear(message, list(fds), self._answer)
        return self.said[before:]

    def lines(self, offset: int) -> list[str]:
        """What is told of the ports that are kept."""
        ok, *lines = self.say(f"kept {offset}")[0].splitlines()
        assert ok == "ok"
        return lines

    def held(self, name: str = "some") -> list[int]:
        """What it says that it holds under a name."""
        assert self.say(f"held {name}") == ["ok"]
        return self.given[-1]

    def close(self) -> None:
        self.kept.let_go()
        self.pool.close()
        for port in self.ports:
            port.close()

    def _answer(self, text: str, fds: Sequence[int]) -> None:
        assert all(map(is_open, fds))
        self.said.append(text)
        self.given.append(list(fds))

    def _publish(self, backend: Backend, sock: socket.socket) -> Port:
        if self.trouble is not None:
            sock.close()
            raise self.trouble
        self.ports.append(Port(backend, sock))
        return self.ports[-1]

    def _withdraw(self, port: object, then: Callable[[], None]) -> None:
        assert port in self.ports or port in self.pool.served
        assert isinstance(port, Port | Ports)
        port.close()
        self.leaving.append(then)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def one_socket() -> int:
    """A descriptor of a socket, as it comes with a message."""
    here, there = socket.socketpair()
    there.close()
    return here.detach()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def some(count: int) -> list[int]:
    """Descriptors of something that is no socket, as what is held is."""
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


def are_open(fds: Iterable[int]) -> set[bool]:
    return set(map(is_open, fds))


def test_a_port_is_kept_with_its_socket(desk: Desk) -> None:
    fd = one_socket()
    assert desk.say(f"keep {WEB} {TO}", fd) == ["ok"]
    assert [(port.backend, port.sock.fileno()) for port in desk.ports] == [(BACKEND, fd)]
    assert (len(desk.kept), is_open(fd)) == (1, True)


def test_a_port_is_let_go_when_nothing_of_it_is_left(desk: Desk) -> None:
    fd = one_socket()
    desk.say(f"keep {WEB} {TO}", fd)
    assert desk.say(f"drop {WEB}") == []
    assert (len(desk.kept), is_open(fd)) == (0, False)
    desk.leaving[0]()
    assert desk.said == ["ok", "ok"]
    assert desk.lines(0) == []


def test_a_port_that_was_let_go_may_come_again(desk: Desk) -> None:
    for _ in range(2):
        assert desk.say(f"keep {WEB} {TO}", one_socket()) == ["ok"]
        desk.say(f"drop {WEB}")
    assert len(desk.leaving) == 2


def test_a_port_is_kept_once(desk: Desk) -> None:
    first, second = one_socket(), one_socket()
    desk.say(f"keep {WEB} {TO}", first)
    assert desk.say(f"keep {WEB} 172.17.0.3 8000 own", second) == [f"error {WEB} is kept already"]
    assert (len(desk.kept), is_open(first), is_open(second)) == (1, True, False)
    assert desk.lines(0) == [f"{WEB} {TO}"]


def test_ports_are_told_apart_by_protocol_address_and_number(desk: Desk) -> None:
    keys = ["tcp 0.0.0.0 80 80", "udp 0.0.0.0 80 80", "tcp 127.0.0.1 80 80", "tcp 0.0.0.0 81 81", "tcp :: 80 80"]
    assert [desk.say(f"keep {key} {TO}", one_socket()) for key in keys] == [["ok"]] * 5
    desk.say("drop udp 0.0.0.0 80 80")
    assert desk.lines(0) == [f"{key} {TO}" for key in keys if not key.startswith("udp")]


def test_a_port_that_is_not_kept_cannot_be_let_go(desk: Desk) -> None:
    assert desk.say(f"drop {WEB}") == [f"error {WEB} is not kept"]
    assert desk.leaving == []


@pytest.mark.parametrize("trouble", [InvalidRequest("not a listening socket"), OSError(24, "too many")])
def test_a_port_that_cannot_be_served_is_not_kept(desk: Desk, trouble: Exception) -> None:
    desk.trouble = trouble
    fd = one_socket()
    assert desk.say(f"keep {WEB} {TO}", fd) == [f"error {trouble}"]
    assert (len(desk.kept), is_open(fd)) == (0, False)
    desk.trouble = None
    assert desk.say(f"keep {WEB} {TO}", one_socket()) == ["ok"]


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3])
def test_what_is_kept_is_told_by_the_page(desk: Desk, count: int) -> None:
    for port in range(1, count + 1):
        desk.say(f"keep tcp 0.0.0.0 {port} {port} fd00::2 {port} own", one_socket())
    pages: list[list[str]] = []
    while lines := desk.lines(sum(len(page) for page in pages)):
        pages.append(lines)
    assert all(len(page) == PAGE for page in pages[:-1])
    assert [line for page in pages for line in page] == [
        f"tcp 0.0.0.0 {port} {port} fd00::2 {port} own" for port in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    "message",
    [
        "keep",
        "keep tcp 0.0.0.0 80 80",
        "keep tcp 0.0.0.0 80 172.17.0.2 8000",
        "keep tcp 0.0.0.0 80 80 172.17.0.2",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 8000",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 8000 own more",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 8000 OWN",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 8000 ours",
        "keep TCP 0.0.0.0 80 80 172.17.0.2 8000 own",
        "keep icmp 0.0.0.0 80 80 172.17.0.2 8000 shared",
        "keep tcp 0.0.0 80 80 172.17.0.2 8000 own",
        "keep tcp localhost 80 80 172.17.0.2 8000 shared",
        "keep tcp 0.0.0.0 0 80 172.17.0.2 8000 shared",
        "keep tcp 0.0.0.0 80 65536 172.17.0.2 8000 shared",
        "keep tcp 0.0.0.0 81 80 172.17.0.2 8000 shared",
        "keep tcp 0.0.0.0 80 http 172.17.0.2 8000 shared",
        "keep tcp 0.0.0.0 80 80 172.17.0 8000 own",
        "keep tcp 0.0.0.0 80 80 localhost 8000 own",
        "keep tcp 0.0.0.0 80 80 172.17.0.2\0 8000 own",
        "keep tcp 0.0.0.0 80 80 fe80::2%eth0 8000 own",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 0 own",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 65536 own",
        "keep tcp 0.0.0.0 80 80 172.17.0.2 http own",
        "keep tcp 0.0.0.0 80 81 172.17.0.2 8000 own",
        "keep tcp 0.0.0.0 1 65535 172.17.0.2 1 own",
        "keep tcp 0.0.0.0 80 81 172.17.0.2 65535 shared",
        "keep tcp 0.0.0.0 1 65535 172.17.0.2 2 shared",
        "kept",
        "kept -1",
        "kept one",
        "kept 99999999999999999999",
        "kept 0 1",
        "KEPT 0",
        "share",
        "share tcp",
        "share tcp 4",
        "share tcp 4 one",
        "share tcp 4 1 more",
        "share tcp 5 1",
        "share TCP 4 1",
        "SHARE tcp 4 1",
        "shared 1",
        "hold",
        "hold some",
        "hold some one",
        "hold some 1 1",
        "HOLD some 1",
        "held",
        "held some 0",
        "lease tcp 172.17.0.2 8000",
        "",
    ],
)
def test_a_message_that_is_not_understood_is_shown_as_it_came(desk: Desk, message: str) -> None:
    fd = one_socket()
    assert desk.say(message, fd) == [f"error not understood: {message!r}"]
    assert (len(desk.kept), is_open(fd)) == (0, False)


def test_a_port_without_a_socket_is_refused(desk: Desk) -> None:
    """The kernel drops what there is no descriptor for."""
    (answer,) = desk.say(f"keep {WEB} {TO}")
    assert answer.startswith("error no socket came with the port")


def test_what_is_told_comes_with_a_socket_in_vain(desk: Desk) -> None:
    fd = one_socket()
    assert desk.say("kept 0", fd) == ["ok"]
    assert not is_open(fd)


def test_what_does_not_become_a_port_is_closed(desk: Desk) -> None:
    (fd,) = some(1)
    (answer,) = desk.say(f"keep {WEB} {TO}", fd)
    assert answer.startswith("error ")
    assert (len(desk.kept), is_open(fd)) == (0, False)


def test_of_several_descriptors_one_is_the_ports(desk: Desk) -> None:
    fds = [one_socket(), one_socket()]
    assert desk.say(f"keep {WEB} {TO}", *fds) == ["ok"]
    assert sorted(map(is_open, fds)) == [False, True]


@pytest.mark.parametrize("count", [1, 13, MOST_HELD])
def test_what_is_held_stays_open_and_can_be_had_again(desk: Desk, count: int) -> None:
    fds = some(count)
    assert desk.say(f"hold some {count}", *fds) == ["ok"]
    assert desk.held() == desk.held() == fds, "in the order in which they came"
    assert are_open(fds) == {True}
    assert len(desk.kept) == 0, "nothing is published by it"


def test_at_first_nothing_is_held(desk: Desk) -> None:
    assert desk.held() == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_held_takes_the_place_of_what_was(desk: Desk, count: int) -> None:
    before, after = some(2), some(count)
    desk.say("hold some 2", *before)
    assert desk.say(f"hold some {count}", *after) == ["ok"]
    assert desk.held() == after
    assert are_open(before) == {False}
    assert are_open(after) <= {True}


@pytest.mark.parametrize("said", [0, 1, 3, 33, -2])
def test_if_not_all_came_what_was_held_before_stays(desk: Desk, said: int) -> None:
    """The kernel drops what there is no descriptor for."""
    before, came = some(2), some(2)
    desk.say("hold some 2", *before)
    (answer,) = desk.say(f"hold some {said}", *came)
    assert answer.startswith("error not all of them came")
    assert desk.held() == before
    assert (are_open(before), are_open(came)) == ({True}, {False})


def test_a_worker_lets_go_of_what_is_held(desk: Desk) -> None:
    fds = some(3)
    desk.say("hold some 3", *fds)
    desk.kept.let_go()
    assert are_open(fds) == {False}
    assert desk.held() == []
    desk.kept.let_go()


def test_who_asks_what_is_held_gives_nothing(desk: Desk) -> None:
    held, given = some(1), some(1)
    desk.say("hold some 1", *held)
    assert desk.say("held some", *given) == ["ok"]
    assert desk.given[-1] == held
    assert are_open(given) == {False}


def test_what_is_held_goes_with_no_other_answer(desk: Desk) -> None:
    desk.say("hold some 1", *some(1))
    for message in ("kept 0", f"drop {WEB}", "nonsense", f"keep {WEB} {TO}"):
        desk.say(message)
        assert desk.given[-1] == []


def test_a_port_comes_and_goes_beside_what_is_held(desk: Desk) -> None:
    held, sock = some(2), one_socket()
    desk.say("hold some 2", *held)
    desk.say(f"keep {WEB} {TO}", sock)
    assert desk.held() == held
    desk.say(f"drop {WEB}")
    assert (are_open(held), is_open(sock)) == ({True}, False)


def test_what_is_held_has_a_name(desk: Desk) -> None:
    one, other, third = some(2), some(1), some(1)
    desk.say("hold one 2", *one)
    desk.say("hold other 1", *other)
    assert (desk.held("one"), desk.held("other"), desk.held("third")) == (one, other, [])
    desk.say("hold other 1", *third)
    assert (desk.held("one"), desk.held("other"), are_open(other)) == (one, third, {False})
    desk.say("hold one 0")
    assert (desk.held("one"), desk.held("other"), are_open(one)) == ([], third, {False})
    desk.kept.let_go()
    assert are_open(third) == {False}


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("tcp 0.0.0.0 80 80", Range(socket.IPPROTO_TCP, socket.AF_INET, "0.0.0.0", 80, 80)),
        ("udp 192.0.2.5 1 65535", Range(socket.IPPROTO_UDP, socket.AF_INET, "192.0.2.5", 1, 65535)),
        ("sctp ::1 65535 65535", Range(socket.IPPROTO_SCTP, socket.AF_INET6, "::1", 65535, 65535)),
        ("tcp 2001:DB8:0:0::0:5 8000 8010", Range(socket.IPPROTO_TCP, socket.AF_INET6, "2001:db8::5", 8000, 8010)),
        ("tcp ::ffff:c000:205 80 80", Range(socket.IPPROTO_TCP, socket.AF_INET6, "::ffff:192.0.2.5", 80, 80)),
        ("tcp fe80::0:5%eth0 80 80", Range(socket.IPPROTO_TCP, socket.AF_INET6, "fe80::5%eth0", 80, 80)),
    ],
)
def test_an_address_is_known_as_the_kernel_writes_it(text: str, ports: Range) -> None:
    assert parse_range(*text.split()) == ports


@pytest.mark.parametrize(
    ("ports", "first", "last", "backend"),
    [
        ("tcp 0.0.0.0 8000 8010", 8000, 8010, "172.17.0.2 80"),
        ("udp 0.0.0.0 8000 8000", 8000, 8000, "172.17.0.2 65535"),
        ("tcp 0.0.0.0 1 65535", 1, 65535, "172.17.0.2 1"),
        ("tcp 0.0.0.0 65000 65535", 65000, 65535, "172.17.0.2 65000"),
    ],
)
def test_a_range_shares_a_socket(desk: Desk, ports: str, first: int, last: int, backend: str) -> None:
    fd = one_socket()
    assert desk.say(f"keep {ports} {backend} shared", fd) == ["ok"]
    (served,) = desk.pool.served
    protocol = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}[ports.split()[0]]
    assert served.ports == Range(protocol, socket.AF_INET, "0.0.0.0", first, last)
    address, port = backend.split()
    assert served.backend == Backend(protocol, socket.AF_INET, address, int(port))
    assert (len(desk.kept), desk.ports, is_open(fd)) == (1, [], False), "it needs no socket of its own"
    assert desk.lines(0) == [f"{ports} {backend} shared"]
    assert desk.say(f"drop {ports}") == []
    assert (served.is_closed, len(desk.kept)) == (True, 0)
    desk.leaving[0]()
    assert desk.said[-1] == "ok"


def test_a_port_that_shares_a_socket_comes_without_one(desk: Desk) -> None:
    assert desk.say(f"keep {WEB} 172.17.0.2 8000 shared") == ["ok"]
    assert desk.lines(0) == [f"{WEB} 172.17.0.2 8000 shared"]


@pytest.mark.parametrize(("how", "again"), [("own", "shared"), ("shared", "own"), ("shared", "shared")])
def test_a_port_is_kept_once_however_it_is_served(desk: Desk, how: str, again: str) -> None:
    desk.say(f"keep {WEB} 172.17.0.2 8000 {how}", one_socket())
    fd = one_socket()
    assert desk.say(f"keep {WEB} 172.17.0.2 8000 {again}", fd) == [f"error {WEB} is kept already"]
    assert (desk.lines(0), is_open(fd)) == ([f"{WEB} 172.17.0.2 8000 {how}"], False)


def test_a_part_of_a_range_is_not_kept(desk: Desk) -> None:
    desk.say("keep tcp 0.0.0.0 8000 8010 172.17.0.2 8000 shared")
    for part in ("8000 8000", "8000 8009", "8001 8010"):
        assert desk.say(f"drop tcp 0.0.0.0 {part}") == [f"error tcp 0.0.0.0 {part} is not kept"]
    assert len(desk.kept) == 1


def test_a_range_that_cannot_be_served_is_not_kept(desk: Desk) -> None:
    desk.pool.trouble = InvalidRequest("there is no room")
    assert desk.say(f"keep {WEB} 172.17.0.2 8000 shared") == ["error there is no room"]
    desk.pool.trouble = None
    assert desk.say(f"keep {WEB} 172.17.0.2 8000 shared") == ["ok"]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("family", "number"), [("4", socket.AF_INET), ("6", socket.AF_INET6)])
def test_a_socket_is_shared_by_a_protocol_and_family(desk: Desk, protocol: str, family: str, number: int) -> None:
    assert desk.say("shared") == ["ok 0"]
    first, second = one_socket(), one_socket()
    assert desk.say(f"share {protocol} {family} 1", first) == ["ok"]
    ((kind, sock),) = desk.pool.socks.items()
    assert kind == ({"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}[protocol], number)
    assert (sock.fileno(), is_open(first), desk.pool.bindings) == (first, True, {})
    assert desk.say(f"share {protocol} {family} 1", second) == ["ok"]
    assert (desk.pool.socks[kind].fileno(), is_open(first), desk.say("shared")) == (second, False, ["ok 1"])


def test_with_a_socket_comes_the_map_in_which_to_say_what_is_bound(desk: Desk) -> None:
    """It is for who serves the ports to keep what is behind it."""
    sock, (binding,) = one_socket(), some(1)
    number = os.fstat(binding).st_ino
    assert desk.say("share udp 6 2", sock, binding) == ["ok"]
    assert (desk.pool.bindings, is_open(sock), is_open(binding)) == ({socket.AF_INET6: number}, True, False)


def test_without_a_socket_nothing_is_shared(desk: Desk) -> None:
    assert desk.say("share tcp 4 0") == ["error not understood: 'share tcp 4 0'"]
    (answer,) = desk.say("share tcp 4 1")
    assert answer.startswith("error not all of them came")
    assert desk.say("shared") == ["ok 0"]


@pytest.mark.parametrize("said", [0, 1, 3, -2])
def test_if_not_all_came_the_socket_that_was_shared_before_stays(desk: Desk, said: int) -> None:
    before, came = one_socket(), [one_socket(), *some(1)]
    desk.say("share udp 4 1", before)
    (answer,) = desk.say(f"share udp 4 {said}", *came)
    assert answer.startswith("error not all of them came")
    assert [sock.fileno() for sock in desk.pool.socks.values()] == [before]
    assert (is_open(before), are_open(came)) == (True, {False})


def test_what_is_no_socket_is_not_shared(desk: Desk) -> None:
    fds = some(2)
    (answer,) = desk.say("share udp 4 2", *fds)
    assert answer.startswith("error ")
    assert (desk.say("shared"), are_open(fds)) == (["ok 0"], {False})


def test_a_socket_that_cannot_be_used_leaves_nothing_open(desk: Desk) -> None:
    desk.pool.trouble = InvalidRequest("no map came with the socket")
    fds = [one_socket(), *some(1)]
    assert desk.say("share udp 4 2", *fds) == ["error no map came with the socket"]
    assert are_open(fds) == {False}


@given(
    st.text()
    | NEARLY
    | NEARLY.map("keep tcp 0.0.0.0 {}".format)
    | NEARLY.map("keep tcp 0.0.0.0 80 80 ::1 {}".format)
    | NEARLY.map("share udp {}".format)
    | NEARLY.map("hold {}".format)
    | NEARLY.map("hold some {}".format),
    st.integers(0, 3),
)
@example("hold some 1", 1)
@example("hold other 2", 2)
@example("hold some \u0661", 1)
@example("hold some 0", 0)
@example("share tcp 4 2", 2)
@example(f"keep {WEB} {TO}", 2)
@example("keep tcp :: 1 80 ::1 1 shared", 1)
def test_any_message_is_answered_once_and_leaves_no_descriptor(message: str, count: int) -> None:
    """But a port's, one that is shared, or what it holds: and then all of it."""
    desk, before, fds = Desk(), some(1), [one_socket() for _ in range(count)]
    desk.say("hold some 1", *before)
    assert len(desk.say(message, *fds)) == 1
    held = {name: desk.held(name) for name in {"some", *message.split()}}
    socks = [port.sock for port in desk.ports] + list(desk.pool.socks.values())
    left = [fd for fd in before + fds if is_open(fd)]
    assert sorted(left) == sorted([fd for each in held.values() for fd in each] + [sock.fileno() for sock in socks])
    assert held["some"] in (before, fds)
    assert all(each in ([], fds) for name, each in held.items() if name != "some")
    desk.close()
    assert are_open(before + fds) == {False}
