"""Ports that the relay keeps: what a message does, what it is answered, and that no descriptor is left over."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.errors import InvalidRequest
from gangway.relay.kept import MOST_HELD, PAGE, Kept
from gangway.relay.stream import Backend

# Text that comes near to a message: its words, in any number, order and spelling.
WORDS = st.sampled_from(
    [
        "keep",
        "drop",
        "kept",
        "hold",
        "held",
        "tcp",
        "udp",
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
NEARLY = st.lists(WORDS | st.text(max_size=5), max_size=7).map(" ".join)
WEB = "tcp 0.0.0.0 80"
BACKEND = Backend(socket.IPPROTO_TCP, socket.AF_INET, "172.17.0.2", 8000)


class Port:
    """A port that a relay serves."""

    def __init__(self, backend: Backend, sock: socket.socket) -> None:
        self.backend = backend
        self.sock = sock

    def close(self) -> None:
        self.sock.close()


class Desk:
    """A relay's kept ports, and what was said about them."""

    def __init__(self) -> None:
        self.ports: list[Port] = []
        self.leaving: list[Callable[[], None]] = []
        self.said: list[str] = []
        self.given: list[list[int]] = []
        """The descriptors that went with each answer."""
        self.trouble: Exception | None = None
        self.kept = Kept(self._publish, self._withdraw)

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

    def held(self) -> list[int]:
        """What it says that it holds."""
        assert self.say("held") == ["ok"]
        return self.given[-1]

    def close(self) -> None:
        self.kept.let_go()
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
        assert port in self.ports
        assert isinstance(port, Port)
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
    assert desk.say(f"keep {WEB} 172.17.0.2 8000", fd) == ["ok"]
    assert [(port.backend, port.sock.fileno()) for port in desk.ports] == [(BACKEND, fd)]
    assert (len(desk.kept), is_open(fd)) == (1, True)


def test_a_port_is_let_go_when_nothing_of_it_is_left(desk: Desk) -> None:
    fd = one_socket()
    desk.say(f"keep {WEB} 172.17.0.2 8000", fd)
    assert desk.say(f"drop {WEB}") == []
    assert (len(desk.kept), is_open(fd)) == (0, False)
    desk.leaving[0]()
    assert desk.said == ["ok", "ok"]
    assert desk.lines(0) == []


def test_a_port_that_was_let_go_may_come_again(desk: Desk) -> None:
    for _ in range(2):
        assert desk.say(f"keep {WEB} 172.17.0.2 8000", one_socket()) == ["ok"]
        desk.say(f"drop {WEB}")
    assert len(desk.leaving) == 2


def test_a_port_is_kept_once(desk: Desk) -> None:
    first, second = one_socket(), one_socket()
    desk.say(f"keep {WEB} 172.17.0.2 8000", first)
    assert desk.say(f"keep {WEB} 172.17.0.3 8000", second) == [f"error {WEB} is kept already"]
    assert (len(desk.kept), is_open(first), is_open(second)) == (1, True, False)
    assert desk.lines(0) == [f"{WEB} 172.17.0.2 8000"]


def test_ports_are_told_apart_by_protocol_address_and_number(desk: Desk) -> None:
    keys = ["tcp 0.0.0.0 80", "udp 0.0.0.0 80", "tcp 127.0.0.1 80", "tcp 0.0.0.0 81", "tcp :: 80"]
    assert [desk.say(f"keep {key} 172.17.0.2 8000", one_socket()) for key in keys] == [["ok"]] * 5
    desk.say("drop udp 0.0.0.0 80")
    assert desk.lines(0) == [f"{key} 172.17.0.2 8000" for key in keys if not key.startswith("udp")]


def test_a_port_that_is_not_kept_cannot_be_let_go(desk: Desk) -> None:
    assert desk.say(f"drop {WEB}") == [f"error {WEB} is not kept"]
    assert desk.leaving == []


@pytest.mark.parametrize("trouble", [InvalidRequest("not a listening socket"), OSError(24, "too many")])
def test_a_port_that_cannot_be_served_is_not_kept(desk: Desk, trouble: Exception) -> None:
    desk.trouble = trouble
    fd = one_socket()
    assert desk.say(f"keep {WEB} 172.17.0.2 8000", fd) == [f"error {trouble}"]
    assert (len(desk.kept), is_open(fd)) == (0, False)
    desk.trouble = None
    assert desk.say(f"keep {WEB} 172.17.0.2 8000", one_socket()) == ["ok"]


@pytest.mark.parametrize("count", [0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3])
def test_what_is_kept_is_told_by_the_page(desk: Desk, count: int) -> None:
    for port in range(1, count + 1):
        desk.say(f"keep tcp 0.0.0.0 {port} fd00::2 {port}", one_socket())
    pages: list[list[str]] = []
    while lines := desk.lines(sum(len(page) for page in pages)):
        pages.append(lines)
    assert all(len(page) == PAGE for page in pages[:-1])
    assert [line for page in pages for line in page] == [
        f"tcp 0.0.0.0 {port} fd00::2 {port}" for port in range(1, count + 1)
    ]


@pytest.mark.parametrize(
    "message",
    [
        "keep",
        "keep tcp 0.0.0.0 80",
        "keep tcp 0.0.0.0 80 172.17.0.2",
        "keep tcp 0.0.0.0 80 172.17.0.2 8000 more",
        "keep TCP 0.0.0.0 80 172.17.0.2 8000",
        "keep icmp 0.0.0.0 80 172.17.0.2 8000",
        "keep tcp 0.0.0.0 80 172.17.0 8000",
        "keep tcp 0.0.0.0 80 localhost 8000",
        "keep tcp 0.0.0.0 80 172.17.0.2\0 8000",
        "keep tcp 0.0.0.0 80 172.17.0.2 0",
        "keep tcp 0.0.0.0 80 172.17.0.2 65536",
        "keep tcp 0.0.0.0 80 172.17.0.2 http",
        "kept",
        "kept -1",
        "kept one",
        "kept 99999999999999999999",
        "kept 0 1",
        "KEPT 0",
        "hold",
        "hold one",
        "hold 1 1",
        "HOLD 1",
        "held 0",
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
    (answer,) = desk.say(f"keep {WEB} 172.17.0.2 8000")
    assert answer.startswith("error no socket came with the port")


def test_what_is_told_comes_with_a_socket_in_vain(desk: Desk) -> None:
    fd = one_socket()
    assert desk.say("kept 0", fd) == ["ok"]
    assert not is_open(fd)


def test_what_does_not_become_a_port_is_closed(desk: Desk) -> None:
    (fd,) = some(1)
    (answer,) = desk.say(f"keep {WEB} 172.17.0.2 8000", fd)
    assert answer.startswith("error ")
    assert (len(desk.kept), is_open(fd)) == (0, False)


def test_of_several_descriptors_one_is_the_ports(desk: Desk) -> None:
    fds = [one_socket(), one_socket()]
    assert desk.say(f"keep {WEB} 172.17.0.2 8000", *fds) == ["ok"]
    assert sorted(map(is_open, fds)) == [False, True]


@pytest.mark.parametrize("count", [1, 13, MOST_HELD])
def test_what_is_held_stays_open_and_can_be_had_again(desk: Desk, count: int) -> None:
    fds = some(count)
    assert desk.say(f"hold {count}", *fds) == ["ok"]
    assert desk.held() == desk.held() == fds, "in the order in which they came"
    assert are_open(fds) == {True}
    assert len(desk.kept) == 0, "nothing is published by it"


def test_at_first_nothing_is_held(desk: Desk) -> None:
    assert desk.held() == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_is_held_takes_the_place_of_what_was(desk: Desk, count: int) -> None:
    before, after = some(2), some(count)
    desk.say("hold 2", *before)
    assert desk.say(f"hold {count}", *after) == ["ok"]
    assert desk.held() == after
    assert are_open(before) == {False}
    assert are_open(after) <= {True}


@pytest.mark.parametrize("said", [0, 1, 3, 33, -2])
def test_if_not_all_came_what_was_held_before_stays(desk: Desk, said: int) -> None:
    """The kernel drops what there is no descriptor for."""
    before, came = some(2), some(2)
    desk.say("hold 2", *before)
    (answer,) = desk.say(f"hold {said}", *came)
    assert answer.startswith("error not all of them came")
    assert desk.held() == before
    assert (are_open(before), are_open(came)) == ({True}, {False})


def test_a_worker_lets_go_of_what_is_held(desk: Desk) -> None:
    fds = some(3)
    desk.say("hold 3", *fds)
    desk.kept.let_go()
    assert are_open(fds) == {False}
    assert desk.held() == []
    desk.kept.let_go()


def test_who_asks_what_is_held_gives_nothing(desk: Desk) -> None:
    held, given = some(1), some(1)
    desk.say("hold 1", *held)
    assert desk.say("held", *given) == ["ok"]
    assert desk.given[-1] == held
    assert are_open(given) == {False}


def test_what_is_held_goes_with_no_other_answer(desk: Desk) -> None:
    desk.say("hold 1", *some(1))
    for message in ("kept 0", f"drop {WEB}", "nonsense", f"keep {WEB} 172.17.0.2 8000"):
        desk.say(message)
        assert desk.given[-1] == []


def test_a_port_comes_and_goes_beside_what_is_held(desk: Desk) -> None:
    held, sock = some(2), one_socket()
    desk.say("hold 2", *held)
    desk.say(f"keep {WEB} 172.17.0.2 8000", sock)
    assert desk.held() == held
    desk.say(f"drop {WEB}")
    assert (are_open(held), is_open(sock)) == ({True}, False)


@given(st.text() | NEARLY | NEARLY.map("keep tcp 0.0.0.0 {}".format) | NEARLY.map("hold {}".format), st.integers(0, 3))
@example("hold 1", 1)
@example("hold \u0661", 1)
@example("hold 0", 0)
def test_any_message_is_answered_once_and_leaves_no_descriptor(message: str, count: int) -> None:
    """But a port's, or what it holds: and then all of it."""
    desk, before, fds = Desk(), some(1), [one_socket() for _ in range(count)]
    desk.say("hold 1", *before)
    assert len(desk.say(message, *fds)) == 1
    held = desk.held()
    left = [fd for fd in before + fds if is_open(fd)]
    assert left == held + [port.sock.fileno() for port in desk.ports]
    assert held in (before, fds)
    desk.close()
    assert are_open(before + fds) == {False}
