"""The event loop: timers, deferred calls, and sockets that are closed after the batch of events."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest

from gangway.relay.core.loop import READABLE, Loop


class Clock:
    """A clock that the test sets."""

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
    """Run one round without waiting."""
    loop.call_soon(lambda _events: None, 0)
    loop.turn()


def test_timers_are_called_in_order_when_due(loop: Loop, clock: Clock) -> None:
    called: list[str] = []
    for delay_s, name in ((3, "c"), (1, "a"), (2, "b"), (1, "a, set later")):
        loop.call_in(delay_s, partial(called.append, name))
    turn(loop)
    assert called == []
    clock.now_s += 2
    turn(loop)
    assert called == ["a", "a, set later", "b"]
    clock.now_s += 0.999
    turn(loop)
    assert called[3:] == []
    clock.now_s += 0.001
    turn(loop)
    turn(loop)
    assert called[3:] == ["c"]


def test_cancelled_timer_is_not_called(loop: Loop, clock: Clock) -> None:
    called: list[str] = []
    loop.call_in(1, partial(called.append, "cancelled")).cancel()
    loop.call_in(1, partial(called.append, "other"))
    clock.now_s += 5
    turn(loop)
    assert called == ["other"]


def test_timer_can_cancel_another_due_timer(loop: Loop, clock: Clock) -> None:
    called: list[str] = []
    loop.call_in(1, lambda: second.cancel())
    second = loop.call_in(2, partial(called.append, "second"))
    clock.now_s += 5
    turn(loop)
    assert called == []


def test_due_timer_does_not_wait_for_events(loop: Loop, clock: Clock) -> None:
    called: list[str] = []
    loop.call_in(60, partial(called.append, "due"))
    clock.now_s += 61
    loop.turn()
    assert called == ["due"]


def test_call_soon_calls_in_the_next_round(loop: Loop) -> None:
    calls: list[int] = []

    def continue_(events: int) -> None:
        calls.append(events)
        loop.call_soon(continue_, events + 1)

    loop.call_soon(continue_, 7)
    assert calls == []
    loop.turn()
    assert calls == [7]
    loop.turn()
    assert calls == [7, 8]


def test_call_soon_calls_after_the_events_of_the_round(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    calls: list[str] = []
    ours, theirs = pairs[0]
    theirs.send(b"x")
    loop.add(ours.fileno(), lambda _events: calls.append("event"))
    loop.call_soon(lambda _events: calls.append("deferred"), 0)
    loop.turn()
    assert calls == ["event", "deferred"]


def test_forget_and_modify(loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    (ours, theirs), (other, other_peer), _ = pairs
    calls: list[str] = []
    loop.add(ours.fileno(), lambda _events: calls.append("ours"), READABLE)
    loop.add(other.fileno(), lambda _events: calls.append("other"), READABLE)
    loop.modify(other.fileno(), 0)
    theirs.send(b"x")
    other_peer.send(b"x")
    turn(loop)
    assert calls == ["ours"]
    loop.forget(ours.fileno())
    loop.forget(ours.fileno())
    loop.modify(other.fileno(), READABLE)
    turn(loop)
    assert calls == ["ours", "other"]
    assert ours.recv(1) == b"x"


def test_close_later_closes_after_the_batch(loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    open_inside: list[bool] = []

    def ready(ours: socket.socket, _events: int) -> None:
        loop.close_later(ours.fileno(), ours.close)
        open_inside.append(ours.fileno() >= 0)

    for ours, theirs in pairs:
        theirs.send(b"x")
        loop.add(ours.fileno(), partial(ready, ours))
    turn(loop)
    assert open_inside == [True] * 3
    assert [ours.fileno() for ours, _ in pairs] == [-1] * 3


def test_closed_descriptor_gets_no_more_events_of_the_batch(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    handled: list[socket.socket] = []

    def close_all(ours: socket.socket, _events: int) -> None:
        handled.append(ours)
        for sock, _ in pairs:
            loop.close_later(sock.fileno(), sock.close)

    for ours, theirs in pairs:
        theirs.send(b"x")
        loop.add(ours.fileno(), partial(close_all, ours))
    turn(loop)
    assert len(handled) == 1


def test_new_socket_with_a_reused_number_gets_only_its_own_events(
    loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]
) -> None:
    ours, theirs = pairs[0]
    number = ours.fileno()
    theirs.send(b"x")
    loop.add(number, lambda _events: loop.close_later(ours.fileno(), ours.close))
    turn(loop)
    with ExitStack() as stack:
        new, peer = (stack.enter_context(sock) for sock in socket.socketpair())
        assert new.fileno() == number
        handled: list[int] = []
        loop.add(number, handled.append, READABLE)
        turn(loop)
        assert handled == []
        peer.send(b"y")
        turn(loop)
        assert len(handled) == 1
        loop.forget(number)


def test_run_ends_after_stop(loop: Loop) -> None:
    rounds: list[int] = []

    def continue_(events: int) -> None:
        rounds.append(events)
        if events == 3:
            loop.stop()
        loop.call_soon(continue_, events + 1)

    loop.call_soon(continue_, 1)
    loop.run()
    assert rounds == [1, 2, 3]


class Fragile:
    """An object whose handler fails."""

    def __init__(self) -> None:
        self.aborted = 0

    def handle(self, _events: int) -> None:
        raise ValueError("a fault")

    def abort(self) -> str:
        self.aborted += 1
        return "given up"


def test_failing_handlers_do_not_end_the_loop(loop: Loop, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    def divide(_events: int) -> None:
        1 // 0  # noqa: B018

    fragile, called, errors = Fragile(), list[int](), list[str]()
    loop.on_error = lambda error, done: errors.append(f"{error}: {done}")
    for number, handler in enumerate((fragile.handle, divide, called.append)):
        pairs[number][1].send(b"x")
        loop.add(pairs[number][0].fileno(), handler, READABLE)
    loop.call_soon(fragile.handle, 0)
    loop.call_in(0.0, lambda: called.remove(0))
    loop.turn()
    assert (fragile.aborted, called) == (2, [READABLE])
    assert sorted(errors) == [
        "a fault: given up",
        "a fault: given up",
        "integer division or modulo by zero: it is not called again",
        "list.remove(x): x not in list: it was not completed",
    ]
    errors.clear()
    loop.turn()  # the handler that nobody answers for is not called again
    assert errors == ["a fault: given up"]


def test_abort_that_fails_is_reported_with_the_error(loop: Loop) -> None:
    class Broken(Fragile):
        def abort(self) -> str:
            raise KeyError("more")

    errors = list[str]()
    loop.on_error = lambda error, done: errors.append(f"{error}: {done}")
    loop.call_soon(Broken().handle, 0)
    loop.turn()
    assert errors == ["a fault: giving up failed, too: KeyError('more')"]
