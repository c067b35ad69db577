"""Which sockets are redirected and which are not, and what each kind of client sees."""

import errno
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from lab import echo_server
from lab.netns import Namespace
from lab.redirect import actual_peer
from tests.kernel.street import HOST4, HOST6, Box, Street

PORT, UDP_PORT = 8080, 8081
WEB4, WEB6 = ("172.30.0.2", 80), ("fd30::2", 80)
GATEWAY = "172.30.0.1"
LOOPBACKS = ["127.0.0.1", "127.0.0.7", "::1", "::ffff:127.0.0.1"]
_PATIENCE_S = 15
_TCP_FASTOPEN_CONNECT = 30  # include/uapi/linux/tcp.h
_IP_PKTINFO = 8  # include/uapi/linux/in.h
_SCOPE_AND_FLOW = {socket.AF_INET: (), socket.AF_INET6: (0, 0)}


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street() as made:
        made.publish(made.server, f"{PORT}:80/tcp", f"{UDP_PORT}:80/udp")
        yield made


@pytest.fixture(scope="module")
def spare(street: Street) -> Box:
    """Another container on the server's network; `server` keeps what it has published."""
    return street.container("spare", "web")


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def client(space: Namespace, address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Make a socket in a namespace, of the address's family."""
    with space.entered():
        made = socket.socket(family_of(address), kind)
    made.settimeout(_PATIENCE_S)
    return made


def aim(space: Namespace, sock: socket.socket) -> tuple[str, int]:
    """Return where a socket really sends to."""
    with space.entered():
        return actual_peer(sock)


def is_redirected(street: Street, sock: socket.socket, port: int = 80) -> bool:
    return aim(street.host, sock)[1] == port


@pytest.mark.parametrize("address", LOOPBACKS)
@pytest.mark.parametrize(("kind", "port"), [(socket.SOCK_STREAM, PORT), (socket.SOCK_DGRAM, UDP_PORT)])
def test_connected_sockets_are_redirected_and_see_the_requested_peer(
    street: Street, address: str, kind: int, port: int
) -> None:
    with client(street.host, address, kind) as sock:
        sock.connect((address, port))
        assert aim(street.host, sock) == (WEB6 if address == "::1" else WEB4)
        asked = (address, port, *_SCOPE_AND_FLOW[sock.family])
        assert sock.getpeername() == asked
        assert echo_server.request_over(sock).peer in (GATEWAY, "fd30::1")
        if kind == socket.SOCK_STREAM:
            assert sock.recv(1) == b""  # the server has closed its half, and the peer is the same still
            assert sock.getpeername() == asked


def test_datagrams_come_from_the_requested_address(street: Street) -> None:
    for address in LOOPBACKS:
        for connected in (False, True):
            with client(street.host, address, socket.SOCK_DGRAM) as sock:
                if connected:
                    sock.connect((address, UDP_PORT))
                    sock.send(b"hello\n")
                else:
                    sock.sendto(b"hello\n", (address, UDP_PORT))
                data, _, _, peer = sock.recvmsg(1000)
                assert data.split()[0] in (b"172.30.0.1", b"fd30::1")
                assert peer == (address, UDP_PORT, *_SCOPE_AND_FLOW[sock.family]), connected


def test_one_unconnected_socket_reaches_several_mappings(street: Street) -> None:
    with (
        street.published(street.near, "8090:80/udp"),
        street.published(street.far, "8091:80/udp"),
        client(street.host, "0.0.0.0", socket.SOCK_DGRAM) as sock,
    ):
        for _ in range(3):
            for port in (8090, UDP_PORT, 8091):
                sock.sendto(b"hello\n", ("127.0.0.1", port))
        came = [sock.recvfrom(1000) for _ in range(9)]
        assert sorted(peer for _, peer in came) == sorted([("127.0.0.1", port) for port in (8090, UDP_PORT, 8091)] * 3)
        sock.sendto(b"hello\n", ("127.0.0.1", 8090))  # answers are also distinguished by the container
        sock.sendto(b"hello\n", (street.near.address4, 80))
        assert {sock.recvfrom(1000)[1] for _ in range(2)} == {("127.0.0.1", 8090)}


def test_a_non_blocking_connect_is_redirected(street: Street) -> None:
    for address in ("127.0.0.1", "::1"):
        with client(street.host, address) as sock:
            sock.setblocking(False)
            assert sock.connect_ex((address, PORT)) in (0, errno.EINPROGRESS)
            assert select.select([], [sock], [], _PATIENCE_S)[1]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert is_redirected(street, sock)
            sock.settimeout(_PATIENCE_S)
            echo_server.request_over(sock)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_connection_by_tcp_fast_open_is_redirected(street: Street, address: str) -> None:
    with client(street.host, address) as sock:
        sock.settimeout(None)
        assert sock.sendto(b"hello\n", socket.MSG_FASTOPEN, (address, PORT)) == 6
        assert is_redirected(street, sock)
        assert b"hello" in sock.recv(1000)
    with client(street.host, address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_FASTOPEN_CONNECT, 1)
        sock.connect((address, PORT))
        echo_server.request_over(sock)
        assert is_redirected(street, sock)


@pytest.mark.parametrize("device", ["lo", "eth0"])
@pytest.mark.parametrize(("kind", "port"), [(socket.SOCK_STREAM, PORT), (socket.SOCK_DGRAM, UDP_PORT)])
def test_a_socket_bound_to_a_device_is_not_redirected(street: Street, device: str, kind: int, port: int) -> None:
    for address in ("127.0.0.1", "::1"):
        with client(street.host, address, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            if device == "lo":
                sock.connect((address, port))
                echo_server.request_over(sock)
                assert not is_redirected(street, sock)
            else:  # as without gangway: loopback addresses are not reachable by another device
                sock.settimeout(0.5)
                with suppress(OSError):
                    sock.connect((address, port))
                    pytest.fail(f"it was answered by {echo_server.request_over(sock).peer}")


@pytest.mark.parametrize(
    ("source", "address"),
    [("127.0.0.1", "127.0.0.1"), ("127.0.0.9", "127.0.0.1"), ("::1", "::1"), ("::ffff:127.0.0.1", "::ffff:127.0.0.1")],
)
@pytest.mark.parametrize(("kind", "port"), [(socket.SOCK_STREAM, PORT), (socket.SOCK_DGRAM, UDP_PORT)])
def test_a_socket_bound_to_a_loopback_address_is_relayed(
    street: Street, source: str, address: str, kind: int, port: int
) -> None:
    with client(street.host, address, kind) as sock:
        sock.bind((source, 0))
        sock.connect((address, port))
        echo_server.request_over(sock)
        assert not is_redirected(street, sock)
    if kind == socket.SOCK_DGRAM:
        with client(street.host, address, kind) as sock:
            sock.bind((source, 0))
            sock.sendto(b"hello\n", (address, port))
            assert sock.recvfrom(1000)[1][:2] == (address, port)


def test_a_datagram_with_a_loopback_source_is_relayed(street: Street) -> None:
    """IP_PKTINFO (ip(7)): index, source, destination."""
    source = struct.pack("=i4s4s", 0, socket.inet_aton("127.0.0.1"), bytes(4))
    with client(street.host, "127.0.0.1", socket.SOCK_DGRAM) as sock:
        sock.sendmsg([b"hello\n"], [(socket.IPPROTO_IP, _IP_PKTINFO, source)], 0, ("127.0.0.1", UDP_PORT))
        assert sock.recvfrom(1000)[1] == ("127.0.0.1", UDP_PORT)


def test_sockets_bound_to_an_address_are_relayed_and_those_bound_to_a_port_are_not(street: Street) -> None:
    for source, expected in ((HOST4, False), ("0.0.0.0", True)):
        with client(street.host, "127.0.0.1") as sock:
            sock.bind((source, 0))
            sock.connect(("127.0.0.1", PORT))
            assert is_redirected(street, sock) == expected
            assert echo_server.request_over(sock).peer == GATEWAY


@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")])
def test_ipv6_only_sockets_reach_an_ipv4_container_by_relay(street: Street, kind: int, protocol: str) -> None:
    with street.published(street.four, f"8092:80/{protocol}") as port:
        for v6only in (0, 1):
            with client(street.host, "::1", kind) as sock:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
                sock.connect(("::1", port))
                assert echo_server.request_over(sock).peer == "172.29.0.1"
                assert is_redirected(street, sock) == (not v6only)
                assert sock.getpeername()[:2] == ("::1", port)
        if protocol == "udp":
            with client(street.host, "::1", kind) as sock:
                sock.sendto(b"hello\n", ("::1", port))
                assert sock.recvfrom(1000)[1][:2] == ("::1", port)


def test_other_namespaces_keep_their_own_loopback(street: Street) -> None:
    for space in (street.server.space, street.near.space, street.far.space, street.neighbour):
        with space.entered(), closing(socket.create_server(("127.0.0.1", PORT))) as own:
            sock = socket.create_connection(("127.0.0.1", PORT))
            with sock, own.accept()[0] as served:
                assert served.getpeername() == sock.getsockname()
                assert sock.getpeername() == actual_peer(sock) == ("127.0.0.1", PORT)
            with client(space, "127.0.0.1", socket.SOCK_DGRAM) as datagram:
                datagram.connect(("127.0.0.1", UDP_PORT))
                assert actual_peer(datagram) == ("127.0.0.1", UDP_PORT)
        for address in ("127.0.0.1", "::1"):
            assert not street.reaches(space, "tcp", address, PORT)


def test_unpublished_ports_are_not_redirected(street: Street) -> None:
    with street.host.entered(), closing(socket.create_server(("127.0.0.1", 0))) as own:
        with socket.create_connection(own.getsockname()) as sock:
            assert actual_peer(sock) == own.getsockname()
        free = own.getsockname()[1]
    with client(street.host, "127.0.0.1") as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(("127.0.0.1", free))


def test_a_port_has_a_target_for_each_protocol_family_and_address(street: Street, spare: Box) -> None:
    with (
        street.published(street.near, "127.0.0.1:8093:80/tcp"),
        street.published(street.far, "127.0.0.2:8093:80/tcp"),
        street.published(spare, "[::1]:8093:80/tcp", "0.0.0.0:8093:80/udp"),
    ):
        found = {}
        for address, kind in (("127.0.0.1", 1), ("127.0.0.2", 1), ("::1", 1), ("127.0.0.1", 2), ("127.0.0.2", 2)):
            with client(street.host, address, kind) as sock:
                sock.connect((address, 8093))
                found[address, kind] = aim(street.host, sock)[0]
        assert found == {
            ("127.0.0.1", 1): street.near.address4,
            ("127.0.0.2", 1): street.far.address4,
            ("::1", 1): spare.address6,
            ("127.0.0.1", 2): spare.address4,
            ("127.0.0.2", 2): spare.address4,
        }
        with client(street.host, "127.0.0.3") as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(("127.0.0.3", 8093))


@pytest.mark.parametrize(
    ("ports", "first", "last", "shift"),
    [
        ("20000-20010:20000-20010", 20000, 20010, 0),
        ("20001-20030:30-59", 20001, 20030, 30 - 20001),
        ("65535:80", 65535, 65535, 80 - 65535),
        ("65530-65535:65000-65005", 65530, 65535, -530),
    ],
)
def test_each_port_of_a_range_is_redirected_and_its_neighbours_are_not(
    street: Street, ports: str, first: int, last: int, shift: int
) -> None:
    with street.published(street.near, f"{ports}/udp"), street.host.entered():
        for port in range(first - 1, min(last + 1, 65535) + 1):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.connect(("127.0.0.1", port))
                is_in = first <= port <= last
                assert actual_peer(sock) == ((street.near.address4, port + shift) if is_in else ("127.0.0.1", port))


def test_an_unpublished_port_is_not_redirected_until_it_is_published_again(street: Street, spare: Box) -> None:
    with client(street.host, "127.0.0.1", socket.SOCK_DGRAM) as sock:
        for box in (street.near, street.far, spare):
            with street.published(box, "8094:80/tcp", "8094:80/udp"):
                with client(street.host, "127.0.0.1") as stream:
                    stream.connect(("127.0.0.1", 8094))
                    assert aim(street.host, stream)[0] == box.address4
                sock.sendto(b"hello\n", ("127.0.0.1", 8094))
                assert sock.recvfrom(1000)[1] == ("127.0.0.1", 8094)
            with client(street.host, "127.0.0.1") as stream, pytest.raises(ConnectionRefusedError):
                stream.connect(("127.0.0.1", 8094))
            sock.settimeout(0.3)
            sock.sendto(b"hello\n", ("127.0.0.1", 8094))
            with pytest.raises(TimeoutError):
                sock.recvfrom(1000)
            sock.settimeout(_PATIENCE_S)


def test_without_a_firewall_own_addresses_are_redirected() -> None:
    with Street("--firewall", "none") as street, street.published(street.server, f"{PORT}:80/tcp"):
        for address, aimed in ((HOST4, WEB4), (HOST6, WEB6), (GATEWAY, WEB4), ("172.31.0.1", WEB4)):
            with client(street.host, address) as sock:
                sock.connect((address, PORT))
                assert aim(street.host, sock) == aimed
                assert sock.getpeername()[:2] == (address, PORT)
        echo_server.serve(street.neighbour.popen, PORT)  # the same port of another machine is not redirected
        with client(street.host, "10.77.0.2") as sock:
            sock.connect(("10.77.0.2", PORT))
            assert aim(street.host, sock) == ("10.77.0.2", PORT)


def test_uses_are_counted(street: Street) -> None:
    with street.published(street.near, "8095:80/tcp", "8095:80/udp"):
        for _ in range(3):
            with client(street.host, "127.0.0.1") as sock:
                sock.connect(("127.0.0.1", 8095))
        with client(street.host, "127.0.0.1", socket.SOCK_DGRAM) as sock:
            for _ in range(5):
                sock.sendto(b"hello\n", ("127.0.0.1", 8095))
        counts = {
            (one["protocol"], one["host_address"]): one["redirected"]
            for one in street.gangway.json("ls", street.near.name)
        }
        assert counts == {("tcp", "0.0.0.0"): 3, ("tcp", "::"): 0, ("udp", "0.0.0.0"): 1, ("udp", "::"): 0}
        told = street.gangway("explain", "127.0.0.1:8095", "--from", "loopback")
        assert (
            f"redirect map: tcp 0.0.0.0:8095 -> {street.near.address4}:80; the mapping was used 3 times so far" in told
        )


def test_a_process_of_another_user_is_redirected(street: Street) -> None:
    """The programs are attached to the root cgroup, which includes every process of the host."""
    asking = ("setpriv", "--reuid=65534", "--clear-groups", "--")
    before = street.gangway.json("ls", street.server.name)[0]["redirected"]
    street.host.run(*asking, "bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{PORT}; echo hello >&3; read -r _ <&3")
    assert street.gangway.json("ls", street.server.name)[0]["redirected"] == before + 1
