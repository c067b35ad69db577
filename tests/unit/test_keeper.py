"""What the relay says to its keeper, and what it waits for."""

import socket
from collections.abc import Iterator

import pytest

from gangway.relay.core.loop import Loop
from gangway.relay.keeper import Keeper
from gangway.relay.sockets import Backend

BACKEND = Backend(socket.IPPROTO_TCP, socket.AF_INET, "172.17.0.2", 8000)


class Port:
    """A port that the relay serves."""

    def close(self) -> None:
        """Nothing to close."""


class Pair:
    """The relay's end, and the keeper's."""

    def __init__(self) -> None:
        self.loop = Loop()
        relays_end, self.channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        relays_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.channel.settimeout(5)
        self.keeper = Keeper(self.loop, relays_end)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.ended: list[str] = []

    def hear(self) -> str:
        """The next message; the descriptor that came with it must be the port's socket."""
        message, fds, _flags, _address = socket.recv_fds(self.channel, 100, 1)
        for fd in fds:
            with socket.socket(fileno=fd) as sock:
                assert sock.getsockname() == self.listener.getsockname()
        return f"{message.decode()} +{len(fds)}"

    def erase(self, port: Port, name: str) -> None:
        self.keeper.erase(port, lambda: self.ended.append(name))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    with made.channel, made.listener:
        yield made
    made.loop.call_in(0, made.loop.stop)  # it hears that the keeper has gone, if it has not yet
    made.loop.run()
    made.loop.close()


def test_a_port_is_told_with_its_socket(pair: Pair) -> None:
    pair.keeper.enter(Port(), BACKEND, pair.listener)
    assert pair.hear() == "enter 1 172.17.0.2 8000 +1"


def test_a_port_ends_when_the_keeper_has_erased_it(pair: Pair) -> None:
    port, other = Port(), Port()
    for one in (port, other):
        pair.keeper.enter(one, BACKEND, pair.listener)
        pair.hear()
    pair.erase(other, "other")
    pair.erase(port, "port")
    assert (pair.hear(), pair.hear()) == ("erase 2 +0", "erase 1 +0")
    assert not pair.ended
    pair.channel.send(b"erased 2")
    pair.loop.turn()
    assert pair.ended == ["other"]


def test_what_the_connection_does_not_take_is_said_later_in_order(pair: Pair) -> None:
    ports = [Port() for _ in range(50)]
    for port in ports:
        pair.keeper.enter(port, BACKEND, pair.listener)
    pair.erase(ports[0], "first")
    heard: list[list[str]] = []
    while len(heard) < 51:
        heard.append(pair.hear().split()[:2])
        if len(heard) < 51:
            pair.channel.setblocking(False)
            while not _has_more(pair.channel):
                pair.loop.turn()
            pair.channel.settimeout(5)
    assert heard == [*(["enter", str(number)] for number in range(1, 51)), ["erase", "1"]]


def test_without_a_keeper_a_port_ends_at_once(pair: Pair) -> None:
    ports = [Port() for _ in range(3)]
    for port in ports[:2]:
        pair.keeper.enter(port, BACKEND, pair.listener)
    pair.erase(ports[0], "asked before")
    pair.channel.close()
    pair.loop.turn()
    assert pair.ended == ["asked before"]
    pair.keeper.enter(ports[2], BACKEND, pair.listener)
    for port in ports[1:]:
        pair.erase(port, "later")
    assert pair.ended == ["asked before", "later", "later"]


def _has_more(channel: socket.socket) -> bool:
    try:
        return bool(channel.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
