"""An unexpected error in the relay ends the client that it happened with, and is logged in one line."""

from collections.abc import Iterator

import pytest

from gangway.log import Log
from gangway.relay.core.datagram import DatagramPort
from tests.unit.shared_relay import UDP, SharedRelay, running_relay


@pytest.fixture
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        made.loop.on_error = Log(lambda _level, line: made.log_lines.append(line), made.clock).unexpected
        yield made


def fail(*_: object) -> None:
    raise ValueError("a fault")


def test_fault_with_a_udp_client_forgets_this_one_only(relay: SharedRelay) -> None:
    server, entrance = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1")
    port = relay.use(entrance)
    published = relay.publish("0.0.0.0", (port, port), server)
    assert isinstance(published, DatagramPort)
    clients = [relay.bound(UDP, "127.0.0.1") for _ in range(2)]
    for client in clients:
        client.sendto(b"first", ("127.0.0.1", port))
        relay.receive(server)
    first = next(iter(relay.datagrams.clients))
    first.send = fail  # type: ignore[assignment]
    for client in clients:
        client.sendto(b"second", ("127.0.0.1", port))
    assert relay.receive(server)[0] == b"second"
    assert len(relay.datagrams.clients) == 1
    assert relay.log_lines[0].endswith(f": a UDP client of {published.backend} was forgotten")
    clients[0].sendto(b"third", ("127.0.0.1", port))
    assert relay.receive(server)[0] == b"third"
    assert len(relay.log_lines) == 1
