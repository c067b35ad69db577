"""Accepting clients: what `accept` relies on in CPython."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from socket import SocketType

import pytest

from gangway.relay.core.listener import accept


@pytest.fixture(params=["127.0.0.1", "::1"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as sock:
        sock.setblocking(False)
        yield sock


@pytest.fixture
def client(listener: socket.socket) -> Iterator[socket.socket]:
    """A client that is connected as far as the kernel does it."""
    with socket.create_connection(listener.getsockname()[:2], 5) as sock:
        yield sock


def test_accept_returns_the_clients_connection(listener: socket.socket, client: socket.socket) -> None:
    with closing(accept(listener)) as accepted:
        assert isinstance(accepted, SocketType)
        assert accepted.getpeername() == client.getsockname()
        assert accepted.getsockname() == client.getpeername()
        assert (accepted.family, accepted.type, accepted.proto) == (listener.family, listener.type, listener.proto)
        client.sendall(b"data")
        assert accepted.recv(10) == b"data"


def test_an_accepted_socket_is_as_the_public_method_makes_it(listener: socket.socket, client: socket.socket) -> None:
    with closing(accept(listener)) as accepted, socket.create_connection(listener.getsockname()[:2], 5):
        public, _ = listener.accept()
        with public:
            for sock in (accepted, public):
                assert not os.get_inheritable(sock.fileno())
                assert os.get_blocking(sock.fileno())
            assert accepted.gettimeout() == public.gettimeout()


def test_the_private_method_returns_a_descriptor_and_the_clients_address(
    listener: socket.socket, client: socket.socket
) -> None:
    fd, address = listener._accept()  # type: ignore[attr-defined]
    assert isinstance(fd, int)
    os.close(fd)
    assert address == client.getsockname()


def test_accept_without_a_client_raises_and_does_not_wait(listener: socket.socket) -> None:
    with pytest.raises(BlockingIOError):
        accept(listener)


def test_closing_an_accepted_socket_ends_the_connection(listener: socket.socket, client: socket.socket) -> None:
    accept(listener).close()
    assert client.recv(1) == b""
