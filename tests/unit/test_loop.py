"""The event loop: timers, the next round, and sockets that are closed only when nobody can mistake their number."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from gangway.relay.core.loop import ENDED, READABLE, Loop


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    loop = Loop(clock)
    yield loop
    loop.close()


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Three connected pairs."""
    with ExitStack() as stack:
        made = [socket.socketpair() for _ in range(3)]
        for pair in made:
            for sock in pair:
                stack.enter_context(sock)
        yield made


def turn(loop: Loop) -> None:
    """One round that waits for nothing."""
    loop.call_soon(lambda _events: None, 0)
    loop.turn()


def test_timers_ring_in_order_and_when_due(loop: Loop, clock: Clock) -> None:
    rung: list[str] = []
    for delay_s, name in ((3, "c"), (1, "a"), (2, "b"), (1, "a, made later")):
        loop.call_in(delay_s, partial(rung.append, name))
    turn(loop)
    assert rung == []
    clock.now_s += 2
    turn(loop)
    assert rung == ["a", "a, made later", "b"]
    clock.now_s += 0.999
    turn(loop)
    assert rung[3:] == []
    clock.now_s += 0.001
    turn(loop)
    turn(loop)
    assert rung[3:] == ["c"]


def test_a_cancelled_timer_does_not_ring(loop: Loop, clock: Clock) -> None:
    rung: list[str] = []
    loop.call_in(1, partial(rung.append, "taken back")).cancel()
    loop.call_in(1, partial(rung.append, "kept"))
    clock.now_s += 5
    turn(loop)
    assert rung == ["kept"]


def test_a_timer_can_cancel_another_that_is_due(loop: Loop, clock: Clock) -> None:
    rung: list[str] = []
    loop.call_in(1, lambda: second.cancel())
    second = loop.call_in(2, partial(rung.append, "second"))
    clock.now_s += 5
    turn(loop)
    assert rung == []


def test_a_timer_that_is_due_does_not_wait_for_events(loop: Loop, clock: Clock) -> None:
    rung: list[str] = []
    loop.call_in(60, partial(rung.append, "due"))
    clock.now_s += 61
    loop.turn()
    assert rung == ["due"]


def test_again_is_the_next_round(loop: Loop) -> None:
    calls: list[int] = []

    def go_on(events: int) -> None:
        calls.append(events)
        loop.call_soon(go_on, events + 1)

    loop.call_soon(go_on, 7)
    assert calls == []
    loop.turn()
    assert calls == [7]
    loop.turn()
    assert calls == [7, 8]


def test_again_comes_after_the_events_of_its_round(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    calls: list[str] = []
    ours, theirs = pairs[0]
    theirs.send(b"x")
    loop.add(ours.fileno(), lambda _events: calls.append("event"))
    loop.call_soon(lambda _events: calls.append("again"), 0)
    loop.turn()
    assert calls == ["event", "again"]


def test_an_edge_is_reported_once_and_an_end_with_it(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    ours, theirs = pairs[0]
    seen: list[int] = []
    theirs.send(b"x")
    theirs.shutdown(socket.SHUT_WR)
    loop.add(ours.fileno(), seen.append)
    turn(loop)
    turn(loop)
    assert len(seen) == 1
    assert seen[0] & READABLE
    assert seen[0] & ENDED


def test_redirected_forgotten_and_modified(loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    (ours, theirs), (other, other_peer), _ = pairs
    calls: list[str] = []
    loop.add(ours.fileno(), lambda _events: calls.append("first"), READABLE)
    loop.set_handler(ours.fileno(), lambda _events: calls.append("second"))
    loop.add(other.fileno(), lambda _events: calls.append("other"), READABLE)
    loop.modify(other.fileno(), 0)
    theirs.send(b"x")
    other_peer.send(b"x")
    turn(loop)
    assert calls == ["second"]
    loop.forget(ours.fileno())
    loop.forget(ours.fileno())
    loop.modify(other.fileno(), READABLE)
    turn(loop)
    assert calls == ["second", "other"]
    assert ours.recv(1) == b"x"


def test_close_later_closes_when_the_batch_is_done(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    open_inside: list[bool] = []

    def ready(ours: socket.socket, _events: int) -> None:
        loop.close_later(ours)
        open_inside.append(ours.fileno() >= 0)

    for ours, theirs in pairs:
        theirs.send(b"x")
        loop.add(ours.fileno(), partial(ready, ours))
    turn(loop)
    assert open_inside == [True] * 3
    assert [ours.fileno() for ours, _ in pairs] == [-1] * 3


def test_a_closed_descriptor_hears_of_no_event_of_its_batch(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    heard: list[socket.socket] = []

    def first_one_closes_all(ours: socket.socket, _events: int) -> None:
        heard.append(ours)
        for sock, _ in pairs:
            loop.close_later(sock)

    for ours, theirs in pairs:
        theirs.send(b"x")
        loop.add(ours.fileno(), partial(first_one_closes_all, ours))
    turn(loop)
    assert len(heard) == 1


def test_a_new_socket_with_an_old_number_hears_only_its_own_events(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    ours, theirs = pairs[0]
    number = ours.fileno()
    theirs.send(b"x")
    loop.add(number, lambda _events: loop.close_later(ours))
    turn(loop)
    with ExitStack() as stack:
        new, peer = (stack.enter_context(sock) for sock in socket.socketpair())
        assert new.fileno() == number
        heard: list[int] = []
        loop.add(number, heard.append, READABLE)
        turn(loop)
        assert heard == []
        peer.send(b"y")
        turn(loop)
        assert len(heard) == 1
        loop.forget(number)


def test_run_goes_round_until_stop(loop: Loop) -> None:
    rounds: list[int] = []

    def go_on(events: int) -> None:
        rounds.append(events)
        if events == 3:
            loop.stop()
        loop.call_soon(go_on, events + 1)

    loop.call_soon(go_on, 1)
    loop.run()
    assert rounds == [1, 2, 3]


def test_a_call_at_the_end_comes_after_everybody_had_a_turn(loop: Loop) -> None:
    made: list[str] = []

    def ready(_events: int) -> None:
        loop.call_at_end(partial(made.append, "end"))
        made.append("turn")

    loop.call_soon(ready, 0)
    loop.call_soon(ready, 0)
    loop.turn()
    turn(loop)
    assert made == ["turn", "turn", "end", "end"]
