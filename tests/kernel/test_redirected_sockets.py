"""Redirected sockets: they end when the port is unpublished or moved, and see answers from other ports as requested."""

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gangway.host import connected, netlink
from gangway.host.connected import Redirected
from lab.redirect import actual_peer
from tests.kernel.street import HOST4, Street

PORT, PATIENCE_S = 8080, 5
BOX, BOX6, GATEWAY = "172.30.0.2", "fd30::2", b"172.30.0.1"
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
_SO_COOKIE = 57  # include/uapi/asm-generic/socket.h
LOOPBACKS = ["127.0.0.1", "::1", "::ffff:127.0.0.1"]


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street() as made:
        yield made


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def client(street: Street, clients: ExitStack, address: str, kind: int, port: int = PORT) -> socket.socket:
    """Return a client on the host that is connected, and closed after the test."""
    with street.host.entered():
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    clients.enter_context(made)
    made.settimeout(PATIENCE_S)
    made.connect((address, port))
    return made


def ask(sock: socket.socket) -> bytes:
    """Return the address that the server of a datagram sees."""
    sock.send(b"hello\n")
    return sock.recv(100).split()[0]


def is_reset(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1)
    except ConnectionResetError:
        return True


def cookie_of(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def aim(street: Street, sock: socket.socket) -> tuple[str, int]:
    with street.host.entered():
        return actual_peer(sock)


def test_unpublish_ends_redirected_connections_and_no_others(street: Street, clients: ExitStack) -> None:
    with street.published(street.near, "8090:80"):
        with street.published(street.server, f"{PORT}:80"):
            ended = [client(street, clients, address, TCP) for address in LOOPBACKS]
            other = client(street, clients, "127.0.0.1", TCP, 8090)
            direct = client(street, clients, BOX, TCP, 80)
        assert all(map(is_reset, ended))
        for sock in (other, direct):
            sock.sendall(b"hello\n")
            assert sock.recv(100).startswith(GATEWAY)


@pytest.mark.parametrize("address", LOOPBACKS)
def test_connected_udp_socket_follows_the_port(street: Street, clients: ExitStack, address: str) -> None:
    with street.published(street.server, f"{PORT}:80/udp"):
        sock = client(street, clients, address, UDP)
        direct = client(street, clients, BOX, UDP, 80)
        ask(sock)
    assert sock.getpeername()[:2] == aim(street, sock) or address.startswith("::ffff")
    assert aim(street, sock) == (address.removeprefix("::ffff:"), PORT)
    with pytest.raises(ConnectionRefusedError):
        ask(sock)
    assert aim(street, direct) == (BOX, 80)
    with street.published(street.near, f"{PORT}:80/udp"):
        assert ask(sock) in (GATEWAY, b"fd30::1")  # by relay


def test_sockets_end_with_the_container(street: Street, clients: ExitStack) -> None:
    box = street.container("brief", "web")
    street.publish(box, f"{PORT}:80/tcp", f"{PORT}:80/udp")
    stream, datagrams = client(street, clients, "127.0.0.1", TCP), client(street, clients, "127.0.0.1", UDP)
    street.gangway("detach", box.name)
    assert is_reset(stream)
    assert aim(street, datagrams) == ("127.0.0.1", PORT)


def test_sockets_of_many_mappings_are_listed_once(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[bytes] = []
    dump = netlink.dump

    def counted(sock: socket.socket, request: bytes) -> Iterator[bytes]:
        lists.append(request)
        return dump(sock, request)

    monkeypatch.setattr(netlink, "dump", counted)
    with street.host.entered():
        connected.end([Redirected("tcp", number, (BOX, 80), ("127.0.0.1", number)) for number in range(1, 100)])
    assert len(lists) == 4  # for both families, and again: such a socket may be about to connect


def test_processes_and_descriptors_that_end_meanwhile(
    street: Street, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, no_such = connected._numbers, 1 << 22  # no process or descriptor has such a number
    monkeypatch.setattr(connected, "_numbers", lambda folder: [no_such, *numbers(folder)])
    sock = client(street, clients, BOX, TCP, 80)
    with street.host.entered():
        # The same socket was also redirected elsewhere, before it was connected.
        former = [Redirected("tcp", cookie_of(sock), (to, 80), ("127.0.0.1", PORT)) for to in (HOST4, BOX, HOST4 + "9")]
        connected.end(former)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET


@pytest.mark.parametrize("kind", [TCP, UDP])
@pytest.mark.parametrize("address", [BOX, BOX6, "::ffff:" + BOX])
def test_kernel_ends_sockets_whose_process_is_not_found(
    street: Street, clients: ExitStack, monkeypatch: pytest.MonkeyPatch, kind: int, address: str
) -> None:
    sock, other = (client(street, clients, address, kind, 80) for _ in range(2))
    monkeypatch.setattr(connected, "_duplicates", lambda _inodes: ())
    protocol = "tcp" if kind == TCP else "udp"
    cookie = cookie_of(sock)
    to = address.removeprefix("::ffff:")
    with street.host.entered():
        assert not connected.unavailable()
        connected.end([Redirected(protocol, cookie, (HOST4, 80), ("127.0.0.1", PORT))])  # it is connected elsewhere
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        connected.end([Redirected(protocol, cookie, (to, 80), ("127.0.0.1", PORT))])
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
    other.send(b"hello\n")
    assert other.recv(100).endswith(b"hello\n")


def test_answers_from_another_port_come_from_the_requested_address(street: Street, clients: ExitStack) -> None:
    """As with TFTP: the server answers from a new port, and the client goes on with that."""
    with street.server.space.entered():
        server, session = (clients.enter_context(socket.socket(socket.AF_INET6, UDP)) for _ in range(2))
    server.bind(("::", 69))
    session.bind(("::", 0))
    port = session.getsockname()[1]
    with street.published(street.server, "69:69/udp"):
        for address in LOOPBACKS[:2]:
            for connects in (False, True):
                with street.host.entered():
                    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, UDP)
                with sock:
                    sock.settimeout(PATIENCE_S)
                    sock.sendto(b"read", (address, 69))
                    data, peer = server.recvfrom(100)
                    session.sendto(b"data", peer)
                    data, source = sock.recvfrom(100)
                    assert (data, source[:2]) == (b"data", (address, port))
                    if connects:
                        sock.connect(source)
                        assert sock.getpeername() == source
                        sock.send(b"more")
                    else:
                        sock.sendto(b"more", source)
                    assert session.recvfrom(100) == (b"more", peer)
                    server.sendto(b"late", peer)
                    if not connects:
                        assert sock.recvfrom(100)[1][:2] == (address, 69)


def test_own_server_on_the_host_is_not_shadowed(street: Street, clients: ExitStack) -> None:
    """A port that no container has answered from is the host's own."""
    with street.host.entered():
        own, sock = (clients.enter_context(socket.socket(socket.AF_INET, UDP)) for _ in range(2))
    own.bind(("127.0.0.1", 0))
    sock.settimeout(PATIENCE_S)
    with street.published(street.server, f"{PORT}:80/udp"):
        sock.sendto(b"hello\n", ("127.0.0.1", PORT))
        assert sock.recvfrom(100)[1] == ("127.0.0.1", PORT)
        sock.sendto(b"hello", own.getsockname())
        assert own.recvfrom(100) == (b"hello", ("127.0.0.1", sock.getsockname()[1]))
