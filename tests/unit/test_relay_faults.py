"""An unexpected error in the relay ends the connection or client that it happened with, and is logged in one line."""

from collections.abc import Iterator

import pytest

from gangway.log import Log
from gangway.relay.core.listener import Listener
from gangway.relay.core.stream import Flow, StreamPort
from tests.unit.shared_relay import TCP, UDP, SharedRelay, running_relay


@pytest.fixture
def relay() -> Iterator[SharedRelay]:
    with running_relay() as made:
        made.loop.on_error = Log(lambda _level, line: made.log_lines.append(line), made.clock).unexpected
        yield made


def fail(*_: object) -> None:
    raise ValueError("a fault")


def test_fault_in_a_connection_resets_this_one_only(relay: SharedRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    server, entrance = relay.bound(TCP, "127.0.0.1"), relay.bound(TCP, "127.0.0.1")
    port = relay.use(entrance)
    relay.publish("127.0.0.1", (port, port), server)
    clients = [relay.client("127.0.0.1", port) for _ in range(2)]
    backends = [relay.accepted(server) for _ in clients]
    with monkeypatch.context() as patch:
        patch.setattr(Flow, "on", fail)
        clients[0].close()
        with pytest.raises(ConnectionResetError):
            relay.wait_for(lambda: backends[0].recv(1))
    clients[1].send(b"still here")
    assert relay.wait_for(lambda: backends[1].recv(100)) == b"still here"
    assert len(relay.streams.flows) == 1
    address = f"127.0.0.1:{server.getsockname()[1]}"
    assert len(relay.log_lines) == 1
    assert relay.log_lines[0].startswith("internal error: ValueError('a fault') in test_relay_faults.py:")
    assert relay.log_lines[0].endswith(f": a connection to tcp {address} was reset")


@pytest.mark.parametrize(("owner", "name"), [(Flow, "connect"), (StreamPort, "serve"), (Listener, "_accept")])
def test_fault_with_a_new_client_leaves_the_port_open(
    relay: SharedRelay, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    server = relay.bound(TCP, "127.0.0.1")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        port = relay.use(relay.bound(TCP, "127.0.0.1"))
        relay.publish("127.0.0.1", (port, port), server)
        relay.client("127.0.0.1", port)
        while not relay.log_lines:
            relay.turn()
    assert not relay.streams.flows
    if owner is Listener:
        return  # its handler stays the one that fails
    relay.pass_seconds(1)
    relay.client("127.0.0.1", port)
    relay.accepted(server)
    assert len(relay.log_lines) == 1


def test_fault_with_a_udp_client_forgets_this_one_only(relay: SharedRelay) -> None:
    server, entrance = relay.bound(UDP, "127.0.0.1"), relay.bound(UDP, "127.0.0.1")
    port = relay.use(entrance)
    published = relay.publish("0.0.0.0", (port, port), server)
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
