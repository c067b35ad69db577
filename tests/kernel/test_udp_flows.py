"""UDP flows that began before a port was published or unpublished: they move to the new road."""

import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street

pytestmark = pytest.mark.any_kernel

_PORT = 8080
_PAUSE_S = 0.2


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street("--firewall", request.param) as made:
        yield made


class Sender:
    """A client that uses one socket, so all its datagrams are one flow."""

    def __init__(self, space: Namespace, address: str) -> None:
        with space.entered():
            self._sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
            self._sock.connect((address, _PORT))
        self._sock.settimeout(_PAUSE_S)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def request(self) -> str:
        """Send a datagram; return the answer, or an empty string after a timeout."""
        with suppress(OSError):
            self._sock.send(b"hello\n")
            return self._sock.recv(1000).decode().strip()
        return ""

    def wait_for_answer(self, answer: str) -> None:
        """Send datagrams until this answer comes."""
        wait_until(lambda: self.request() == answer, f"{answer!r}", 3)


def _server(host: Namespace, address: str) -> socket.socket:
    with host.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, _PORT))
    sock.settimeout(3)
    return sock


def _serve_one(server: socket.socket, sender: Sender) -> None:
    """Answer one datagram of the flow by the host's own server, so that conntrack regards the flow as established."""
    wait_until(lambda: sender.request() or _answer(server), "a datagram", 3)
    assert sender.request() in ("host", "")
    _answer(server)


def _answer(server: socket.socket) -> bool:
    data, peer = server.recvfrom(1000)
    assert data == b"hello\n"
    server.sendto(b"host", peer)
    return True


CLIENTS = pytest.mark.parametrize("client", ["neighbour4", "neighbour6", "host4", "loopback", "container"])


def _client(street: Street, client: str) -> tuple[Namespace, str, str]:
    """Return a client's namespace, the address that it sends to, and its source as seen through firewall rules."""
    return {
        "neighbour4": (street.neighbour, HOST4, NEIGHBOUR4),
        "neighbour6": (street.neighbour, HOST6, NEIGHBOUR6),
        "host4": (street.host, HOST4, HOST4),
        "loopback": (street.host, "127.0.0.1", "172.30.0.1"),
        "container": (street.far.space, HOST4, street.far.address4),
    }[client]


def _expected_answer(street: Street, address: str, source: str) -> str:
    if street.gangway.json("explain", f"{HOST4}:{_PORT}/udp", "--from", "remote")[0]["firewall"] == "none":
        source = "fd30::1" if ":" in address else "172.30.0.1"
    return f"{source} hello"


@CLIENTS
def test_unanswered_flow_reaches_the_container_after_publish(street: Street, client: str) -> None:
    space, address, source = _client(street, client)
    with closing(Sender(space, address)) as sender:
        assert [sender.request() for _ in range(3)] == [""] * 3
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.wait_for_answer(_expected_answer(street, address, source))


@CLIENTS
def test_flow_to_a_host_server_moves_to_the_container_after_publish(street: Street, client: str) -> None:
    space, address, source = _client(street, client)
    with closing(Sender(space, address)) as sender:
        with closing(_server(street.host, address)) as server:
            _serve_one(server, sender)
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.wait_for_answer(_expected_answer(street, address, source))


@CLIENTS
def test_flow_to_a_container_moves_to_the_host_server_after_unpublish(street: Street, client: str) -> None:
    space, address, source = _client(street, client)
    with closing(Sender(space, address)) as sender:
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.wait_for_answer(_expected_answer(street, address, source))
        with closing(_server(street.host, address)) as server:
            _serve_one(server, sender)


@CLIENTS
def test_flow_to_a_container_moves_to_the_next_container_of_the_port(street: Street, client: str) -> None:
    space, address, source = _client(street, client)
    with closing(Sender(space, address)) as sender:
        with street.published(street.server, f"{_PORT}:80/udp"):
            sender.wait_for_answer(_expected_answer(street, address, source))
        with street.published(street.near, f"{_PORT}:80/udp"):
            sender.wait_for_answer(_expected_answer(street, address, source))
