"""Corner cases of the redirect: namespaces and cgroups, reused sockets, sockets that are left to the relay."""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import echo_server
from lab.addresses import host_port
from lab.redirect import actual_peer
from tests.kernel.crossings import Tap, listening
from tests.kernel.ground import PATIENCE_S
from tests.kernel.street import HOST4, HOST6, Box, Street

_GATEWAY = {"127.0.0.1": "172.30.0.1", "::1": "fd30::1", "::ffff:127.0.0.1": "172.30.0.1"}
_IP_PKTINFO = 8  # include/uapi/linux/in.h
_FASTOPEN_BOTH_WAYS = 3  # Documentation/networking/ip-sysctl.rst: tcp_fastopen
_OPTIONS_AT, _SYN_DATA = 5, 32  # include/uapi/linux/tcp.h: tcpi_options, TCPI_OPT_SYN_DATA
_CGROUPS = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
BY_LOOPBACK = pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
BY_PROTOCOL = pytest.mark.parametrize("protocol", ["tcp", "udp"])


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street() as made:
        yield made


@pytest.fixture(autouse=True)
def _on_the_host(street: Street) -> Iterator[None]:
    with street.host.entered():
        yield


def _client(protocol: str, address: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    made.settimeout(PATIENCE_S)
    return made


def _check_answer(sock: socket.socket, address: str, port: int) -> None:
    """Check that an unconnected socket is answered by the address that it sent to."""
    text = f"{address}/{port}"
    sock.sendto(text.encode(), (address, port))
    answer, peer = sock.recvfrom(1000)
    assert (answer.decode().split()[1], *peer[:2]) == (text, address, port)


@contextmanager
def _goes_by(street: Street, road: str, address: str, port: int) -> Iterator[None]:
    """Check the road of the block's requests: only those to the relay send packets over the host's loopback."""
    with Tap(street.host, "lo") as tap:
        yield
        assert tap.has_seen(address.removeprefix("::ffff:"), port) == (road == "relay")


def test_a_socket_belongs_to_the_namespace_that_it_was_made_in(street: Street) -> None:
    with street.published(street.server, "80/tcp") as port, _client("tcp") as ours:
        with street.near.space.entered():
            ours.connect(("127.0.0.1", port))
            theirs = _client("tcp")
        assert actual_peer(ours) == (street.server.address4, 80)
        with theirs, pytest.raises(ConnectionRefusedError):
            theirs.connect(("127.0.0.1", port))


@pytest.mark.skipif(not _CGROUPS, reason="cgroup v2 is not mounted")
@BY_PROTOCOL
def test_a_process_in_a_cgroup_of_its_own_is_redirected(street: Street, protocol: str) -> None:
    cgroup = Path(_CGROUPS[0], f"gw-{os.getpid()}")
    cgroup.mkdir()
    try:
        into = ("sh", "-c", 'echo $$ >"$0" && exec "$@"', str(cgroup / "cgroup.procs"))
        with street.published(street.server, f"80/{protocol}") as port, _goes_by(street, "redirect", "127.0.0.1", port):
            answer = echo_server.request(lambda *words: street.host.command(*into, *words), protocol, "127.0.0.1", port)
        assert answer.peer == "172.30.0.1"
    finally:
        cgroup.rmdir()


@BY_LOOPBACK
def test_a_container_that_does_not_listen_refuses(street: Street, address: str) -> None:
    with street.published(street.server, "8081:81/tcp", "8081:81/udp"):
        with _client("tcp", address) as sock, pytest.raises(ConnectionRefusedError):
            sock.connect((address, 8081))
        with _client("udp", address) as sock:
            sock.connect((address, 8081))
            sock.send(b"hello")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(100)


@BY_LOOPBACK
def test_tcp_fast_open_sends_data_in_the_first_packet(street: Street, address: str) -> None:
    """It does from the second connection on: the first one fetches the cookie."""
    street.server.space.sysctl("net.ipv4.tcp_fastopen", _FASTOPEN_BOTH_WAYS)
    with street.published(street.server, "8081:81/tcp"), listening(street.server, "tcp", [81]) as at:
        at[81].setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
        for has_cookie in (False, True):
            with _client("tcp", address) as sock:
                sock.setblocking(True)  # else the data would be for a later call
                sock.sendto(b"hello", socket.MSG_FASTOPEN, (address, 8081))
                with at[81].accept()[0] as served:
                    assert served.recv(100) == b"hello"
                assert sock.recv(100) == b""
                options = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _OPTIONS_AT + 1)[_OPTIONS_AT]
                assert bool(options & _SYN_DATA) == has_cookie
                assert actual_peer(sock) == (street.server.address6 if ":" in address else street.server.address4, 81)
                assert sock.getpeername()[:2] == (address, 8081)


def test_a_udp_socket_may_be_connected_again_and_disconnected(street: Street) -> None:
    with (
        street.published(street.server, "80/udp") as port,
        street.published(street.far, "80/udp") as other,
        _client("udp") as sock,
    ):
        for target in (port, other, port):  # the first connect() sets its source address for good
            sock.connect(("127.0.0.1", target))
            assert sock.getpeername() == ("127.0.0.1", target)
            echo_server.request_over(sock)
        assert ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16) == 0  # AF_UNSPEC, connect(2)
        for target in (port, other):
            _check_answer(sock, "127.0.0.1", target)


def test_one_socket_reaches_one_mapping_at_two_addresses(street: Street) -> None:
    with street.published(street.server, "80/udp") as port, _client("udp") as sock:
        target = [("127.0.0.1", port), ("127.0.0.2", port)]
        for at in target:
            sock.sendto(at[0].encode(), at)
        answers = [sock.recvfrom(100) for _ in target]
        assert sorted((data.split()[1].decode(), peer) for data, peer in answers) == [(at[0], at) for at in target]


def test_one_udp_socket_uses_both_families(street: Street) -> None:
    with street.published(street.server, "80/udp") as port, _client("udp", "::1") as sock:
        for target in ("::1", "::ffff:127.0.0.1", "::1"):
            with _goes_by(street, "redirect", target, port):
                _check_answer(sock, target, port)


def test_an_unconnected_ipv6_socket_reaches_an_ipv4_container_by_relay(street: Street) -> None:
    with street.published(street.four, "80/udp") as port, _client("udp", "::1") as sock:
        with _goes_by(street, "relay", "::1", port):
            _check_answer(sock, "::1", port)
        with _goes_by(street, "redirect", "::ffff:127.0.0.1", port):
            _check_answer(sock, "::ffff:127.0.0.1", port)


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_datagram_from_a_socket_bound_to_loopback_is_relayed(street: Street, bound: str) -> None:
    with street.published(street.server, "80/udp") as port, _client("udp", bound) as sock:
        sock.bind((bound, 0))
        with _goes_by(street, "relay", bound, port):
            _check_answer(sock, bound, port)


@BY_LOOPBACK
def test_a_datagram_with_a_loopback_source_is_relayed(street: Street, address: str) -> None:
    """ip(7), ipv6(7): struct in_pktinfo, struct in6_pktinfo."""
    if ":" in address:
        source = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, socket.inet_pton(socket.AF_INET6, address) + bytes(4))
    else:
        source = (socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=I4s4s", 0, socket.inet_aton(address), bytes(4)))
    with street.published(street.server, "80/udp") as port, _client("udp", address) as sock:
        with _goes_by(street, "relay", address, port):
            sock.sendmsg([b"hello"], [source], 0, (address, port))
            assert sock.recvfrom(100)[1][:2] == (address, port)
        with _goes_by(street, "redirect", address, port):
            _check_answer(sock, address, port)


@BY_PROTOCOL
@pytest.mark.parametrize(("target", "loopback"), [("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_the_unspecified_address_is_answered_by_loopback(
    street: Street, protocol: str, target: str, loopback: str
) -> None:
    """The kernel replaces it by loopback, but for a connection only after the programs have run."""
    with street.published(street.server, f"80/{protocol}") as port, _client(protocol, target) as sock:
        sock.connect((target, port))
        assert sock.getpeername()[:2] == (loopback, port)
        assert echo_server.request_over(sock).peer == _GATEWAY[loopback]


@BY_PROTOCOL
@pytest.mark.parametrize(("bound", "target"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("::", "::ffff:127.0.0.1")])
def test_a_socket_bound_to_a_port_only_is_redirected(street: Street, protocol: str, bound: str, target: str) -> None:
    with street.published(street.server, f"80/{protocol}") as port, _client(protocol, bound) as sock:
        sock.bind((bound, 0))
        with _goes_by(street, "redirect", target, port):
            if protocol == "udp":
                _check_answer(sock, target, port)
            sock.connect((target, port))
            assert echo_server.request_over(sock).peer == _GATEWAY[target]


@BY_PROTOCOL
@pytest.mark.parametrize(("bound", "target"), [(HOST4, "127.0.0.1"), (HOST6, "::1")])
def test_a_socket_bound_to_another_host_address_reaches_an_internal_container(
    street: Street, inner: Box, protocol: str, bound: str, target: str
) -> None:
    """The container has no route to that address; it can answer the relay's."""
    with street.published(inner, f"{host_port(target, 0)}:80/{protocol}") as port, _client(protocol, bound) as sock:
        sock.bind((bound, 0))
        sock.connect((target, port))
        echo_server.request_over(sock)


@pytest.fixture(scope="module")
def inner(street: Street) -> Box:
    """A container on an internal network."""
    subnets = "--subnet", "172.27.0.0/24", "--subnet", "fd27::/64"
    street.gangway("network", "create", "inner", "--internal", *subnets)
    return street.container("inner", "inner")


def test_a_port_between_two_ranges_belongs_to_another_container(street: Street) -> None:
    with (
        street.published(street.server, "9000-9007:9000-9007/udp", "9009-9015:9009-9015/udp"),
        street.published(street.far, "9008:80/udp"),
    ):
        for port in range(9000, 9016):
            with _client("udp") as sock:
                sock.connect(("127.0.0.1", port))
                server = (street.server.address4, port), (street.far.address4, 80)
                assert actual_peer(sock) == server[port == 9008]


@BY_LOOPBACK
def test_an_unpublished_port_is_the_hosts_again_for_a_socket_that_was_redirected(street: Street, address: str) -> None:
    with _client("udp", address) as sock:
        with street.published(street.server, "8080:80/udp"), _goes_by(street, "redirect", address, 8080):
            _check_answer(sock, address, 8080)
        with listening(Box(street.host, "", ""), "udp", [8080]) as at:
            sock.sendto(b"to the host", (address, 8080))
            data, peer = at[8080].recvfrom(100)
            assert (data, peer[0].removeprefix("::ffff:")) == (b"to the host", address)
            at[8080].sendto(data, peer)
            assert sock.recvfrom(100)[1][:2] == (address, 8080)
