"""A connection through the relay behaves as a direct one: random schedules, with the same bytes and endings on both."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import NamedTuple

import pytest

from tests.unit.shared_relay import TCP, SharedRelay, port_of, running_relay

_SCHEDULES = 40
_MOST_BYTES = 1_500_000
_PATIENCE_S = 10
_BUFFER_BYTES = 16384  # of the receivers and of the relay's sockets to clients, so that many sends stall
_RESET = b"\1\0\0\0\0\0\0\0"  # struct linger: closing sends a reset


class Step(NamedTuple):
    """What one side does: `send` a number of bytes, `stall` and `read` again, or end: `shut`, `close`, `reset`."""

    side: int  # 0 is the client
    verb: str
    size: int = 0


def _schedule(seed: int) -> list[Step]:
    """Return random steps that both sides can carry out, up to an end of both."""
    choose = random.Random(seed)
    steps, is_open, is_stalled = list[Step](), [True, True], [False, False]
    ends_by_reset = choose.random() < 0.4
    for _ in range(choose.randrange(1, 12)):
        side = choose.randrange(2)
        if not is_open[side]:
            continue
        verb = choose.choices(["send", "stall", "read", "shut"], [8, 2, 3, 1])[0]
        if verb == "send":
            # A reset discards what is in the sender's buffer, so then all has to fit in the receiver's.
            most = 500 if ends_by_reset or choose.random() < 0.6 else _MOST_BYTES
            steps.append(Step(side, verb, choose.randrange(1, most)))
        elif verb == "shut":
            is_open[side] = False
            steps.append(Step(side, verb))
        elif is_stalled[side] is (verb == "read"):
            is_stalled[side] = not is_stalled[side]
            steps.append(Step(side, verb))
    steps += [Step(side, "read") for side in range(2) if is_stalled[side]]
    if ends_by_reset:
        return [*steps, Step(choose.randrange(2), "reset")]
    return steps + [Step(side, "shut") for side in choose.sample(range(2), 2) if is_open[side]]


class End:
    """One end of a connection: what it has sent and received, and how the other side ended."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.unsent = b""
        self.sent = 0
        self.received = bytearray()
        self.ending = ""
        self.is_stalled = self.is_shut = False

    def move(self) -> None:
        """Send and receive what can be; end what is to be ended when all is sent."""
        with suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
            while self.unsent:
                count = self.sock.send(self.unsent)
                self.sent, self.unsent = self.sent + count, self.unsent[count:]
            if self.is_shut:
                self.sock.shutdown(socket.SHUT_WR)
                self.is_shut = False
        try:
            while not self.is_stalled and not self.ending:
                data = self.sock.recv(1 << 16)
                self.received += data
                self.ending = "" if data else "end"
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.ending = "reset"


def _carry_out(steps: list[Step], ends: list[End], seed: int) -> list[tuple[bytes, str]]:
    """Return what each end has received, and how the other side ended for it."""
    fill = random.Random(seed)
    for step in steps:
        end, other = ends[step.side], ends[1 - step.side]
        if step.verb == "send":
            end.unsent += fill.randbytes(step.size)
        elif step.verb in ("stall", "read"):
            end.is_stalled = step.verb == "stall"
        elif step.verb == "shut":
            end.is_shut = True
        else:
            _settle(ends)
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            end.sock.close()
            end.ending = "itself"
            _wait(other)
            break
        _settle(ends)
    for end in ends:
        if end.ending != "itself":
            _wait(end, ends)
    return [(bytes(end.received), end.ending) for end in ends]


def _settle(ends: list[End]) -> None:
    """Let everything arrive that a reader waits for."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        for end in ends:
            end.move()
        arrived = [ends[1 - side].is_stalled or len(ends[1 - side].received) == ends[side].sent for side in range(2)]
        waits = [bool(ends[side].unsent) and not ends[1 - side].is_stalled for side in range(2)]
        if all(arrived) and not any(waits):
            return
        assert time.monotonic() < deadline, "data got lost"


def _wait(end: End, ends: list[End] | None = None) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not end.ending:
        for one in ends or [end]:
            one.move()
        assert time.monotonic() < deadline, "the end got lost"


@pytest.fixture(scope="module")
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        yield made


@pytest.fixture(scope="module")
def server(relay: SharedRelay) -> socket.socket:
    sock = relay.bound(TCP, "127.0.0.1")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    return sock


@pytest.fixture(scope="module")
def front(relay: SharedRelay, server: socket.socket) -> int:
    sock = relay.bound(TCP, "127.0.0.1")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    port = relay.use(sock)
    relay.publish("127.0.0.1", (port, port), server)
    return port


@pytest.mark.parametrize("seed", range(_SCHEDULES))
def test_relayed_and_direct_connections_are_alike(
    relay: SharedRelay, server: socket.socket, front: int, seed: int
) -> None:
    steps, results = _schedule(seed), []
    for port in (port_of(server), front):
        with ExitStack() as stack:
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            client.connect(("127.0.0.1", port))
            served = stack.enter_context(relay.wait_for(lambda: server.accept()[0]))
            results.append(_carry_out(steps, [End(client), End(served)], seed))
    assert results[0] == results[1], steps
