"""Published TCP and SCTP ports, with real connections through the launcher's relay."""

import ctypes
import fcntl
import os
import random
import select
import socket
import struct
import termios
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gangway.host.sockets import has_sockets
from lab.waiting import wait_until
from tests.kernel.ground import (
    BRIEF_S,
    PATIENCE_S,
    SLOW_MACHINE,
    Port,
    Ports,
    crowd_in,
    echo,
    exactly,
    few_descriptors,
    reset,
    serve_one_by_one,
    site_and_ports,
    stop_ends_all,
)
from tests.kernel.published import anonymous_kib, descriptors

BULK_BYTES = (4 if SLOW_MACHINE else 64) << 20
_PIDFD_GETFD = 438  # the same on every architecture: include/uapi/asm-generic/unistd.h
_CONTAINERS = ["172.30.0.2", "fd30::2"]
_FRONTS = [
    ("0.0.0.0", "127.0.0.1"),
    ("0.0.0.0", "172.30.0.1"),
    ("172.30.0.1", "172.30.0.1"),
    ("::", "::1"),
    ("::", "fd30::1"),
    ("fd30::1", "fd30::1"),
]


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize(("host_ip", "address"), _FRONTS)
def test_echo(ports: Ports, host_ip: str, address: str, container: str) -> None:
    echo(*ports.tcp(host_ip, address, container).pair())


@pytest.mark.parametrize("container", _CONTAINERS)
def test_passed_dual_stack_socket_serves_both_families(ports: Ports, container: str) -> None:
    with ports.site.host.entered():
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = ports.passed(listener, "127.0.0.1", container)
    echo(*port.pair())
    echo(port.connect("::1"), port.accept())


def test_client_in_a_container_reaches_the_published_port(ports: Ports) -> None:
    port = ports.tcp("0.0.0.0", "172.30.0.1")
    echo(port.connect(by=ports.site.other), port.accept())


def test_half_close_by_the_client_leaves_the_answer_direction_open(ports: Ports) -> None:
    client, served = ports.tcp().pair()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert exactly(served, 100) == b"question"
    for number in range(3):
        served.sendall(b"%d" % number)
        assert client.recv(10) == b"%d" % number
    served.close()
    assert client.recv(10) == b""


def test_half_close_by_the_container_leaves_the_request_direction_open(ports: Ports) -> None:
    client, served = ports.tcp().pair()
    served.sendall(b"banner")
    served.shutdown(socket.SHUT_WR)
    assert exactly(client, 100) == b"banner"
    for number in range(3):
        client.sendall(b"%d" % number)
        assert served.recv(10) == b"%d" % number
    client.close()
    assert served.recv(10) == b""


def test_data_of_a_client_that_sends_and_ends_at_once_arrives(ports: Ports) -> None:
    port = ports.tcp()
    for number in range(20):
        client = port.connect()
        client.sendall(b"%d" % number)
        client.shutdown(socket.SHUT_WR)
        served = port.accept()
        assert exactly(served, 100) == b"%d" % number
        served.sendall(b"bye")
        served.close()
        assert exactly(client, 100) == b"bye"


def test_data_of_a_container_that_sends_first_arrives(ports: Ports) -> None:
    client, served = ports.tcp().pair()
    served.sendall(b"220 ready")
    assert client.recv(100) == b"220 ready"


def test_data_after_urgent_data_arrives(ports: Ports) -> None:
    client, served = ports.tcp().pair()
    client.sendall(b"before")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"after")
    assert exactly(served, 11) == b"beforeafter"


@pytest.mark.parametrize("upload", [1000, 8 << 20])
def test_answer_arrives_although_the_container_reads_no_more(ports: Ports, upload: int) -> None:
    client, served = ports.tcp().pair()
    sender = threading.Thread(target=_send_until_error, args=(client, bytes(upload)))
    sender.start()
    served.recv(100)
    served.sendall(b"413 too large")
    served.close()  # with unread data left, the kernel sends a reset after the answer
    assert exactly(client, 13) == b"413 too large"
    client.close()
    sender.join()


def _send_until_error(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        sock.sendall(data)


def _send(sock: socket.socket, block: bytes, size: int) -> None:
    for _ in range(size // len(block)):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)


def _sum(sock: socket.socket) -> tuple[int, int]:
    """Receive until the end; return length and checksum."""
    size = checksum = 0
    while part := sock.recv(1 << 20):
        size, checksum = size + len(part), zlib.crc32(part, checksum)
    return size, checksum


def test_bulk_in_both_directions_at_once(ports: Ports) -> None:
    pair = ports.tcp().pair()
    blocks = [random.Random(seed).randbytes(1 << 20) for seed in (1, 2)]
    sums: dict[int, tuple[int, int]] = {}
    threads = [
        threading.Thread(target=_send, args=(sock, block, BULK_BYTES)) for sock, block in zip(pair, blocks, strict=True)
    ]
    threads += [
        threading.Thread(target=lambda direction=direction, sock=sock: sums.update({direction: _sum(sock)}))
        for direction, sock in enumerate(reversed(pair))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for direction, block in enumerate(blocks):
        checksum = 0
        for _ in range(BULK_BYTES // len(block)):
            checksum = zlib.crc32(block, checksum)
        assert sums[direction] == (BULK_BYTES, checksum)
    pipes = [name for name in descriptors(ports.site.relay()) if name.startswith("pipe:")]
    assert pipes, "a bulky flow uses a pipe"


def _fill(sock: socket.socket) -> tuple[int, int]:
    """Send until the buffers are full; return length and checksum of the data that was accepted."""
    size = checksum = 0
    block = random.Random(3).randbytes(1 << 16)
    sock.setblocking(False)
    while select.select([], [sock], [], BRIEF_S)[1]:
        sent = sock.send(block)
        size, checksum = size + sent, zlib.crc32(block[:sent], checksum)
    sock.settimeout(PATIENCE_S)
    return size, checksum


def test_client_that_does_not_read_stalls_only_its_own_flow(ports: Ports) -> None:
    port = ports.tcp()
    other = port.pair()
    echo(*other)
    relay = ports.site.relay()
    stalled = [port.pair() for _ in range(2 if SLOW_MACHINE else 4)]
    before_kib = anonymous_kib(relay)
    sums = [_fill(served) for _, served in stalled]
    for _ in range(50):
        echo(*other)
    echo(*port.pair())
    assert anonymous_kib(relay) - before_kib < 64 * len(stalled) + 256
    for (client, served), filled in zip(stalled, sums, strict=True):
        served.shutdown(socket.SHUT_WR)
        assert _sum(client) == filled


def test_refused_backend_connection_resets_the_client_and_the_port_stays_published(ports: Ports) -> None:
    port = ports.tcp()
    name = port.server.getsockname()
    port.server.close()
    for _ in range(3):
        with pytest.raises(ConnectionResetError):
            port.connect().recv(1)
    with port.site.box.entered():
        port.server = port.keep(socket.create_server(name))
    echo(*port.pair())


@pytest.mark.parametrize("size", [0, 1000, 60_000])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_reset_is_passed_on_after_the_data(ports: Ports, direction: str, size: int) -> None:
    client, served = ports.tcp().pair()
    sender, receiver = (client, served) if direction == "up" else (served, client)
    sender.sendall(b"x" * size)
    if size > 1000:  # a reset discards data that is not sent yet: wait until all has arrived
        wait_until(lambda: _waiting_bytes(receiver) == size, "the data", PATIENCE_S)
    reset(sender)
    assert len(exactly(receiver, size)) == size
    with pytest.raises(ConnectionResetError):
        receiver.recv(1)


def _waiting_bytes(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))[0])


def test_end_is_passed_on_after_the_data(ports: Ports) -> None:
    client, served = ports.tcp().pair()
    filled = _fill(served)
    served.close()
    assert _sum(client) == filled


def test_connection_timeout_is_logged_once_a_second(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, connect_timeout_s=1.0, workers=1) as (site, ports):
        port = ports.to_nowhere("172.30.0.99")
        clients = [port.connect() for _ in range(20)]
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        text = "cannot connect to tcp 172.30.0.99:80: Connection timed out"
        lines = wait_until(lambda: site.log_lines(text), "a line of the log", PATIENCE_S)  # clients are reset first
        assert len(lines) <= 3


def test_client_reset_while_connecting_frees_the_flow(ports: Ports) -> None:
    port = ports.to_nowhere("172.30.0.98")
    relay = ports.site.relay()
    before = len(descriptors(relay))
    clients = [port.connect() for _ in range(5)]
    wait_until(lambda: len(descriptors(relay)) == before + 10, "five flows", PATIENCE_S)
    for client in clients:
        reset(client)
    wait_until(lambda: len(descriptors(relay)) == before, "the end of the flows", PATIENCE_S)


@contextmanager
def _relay_sockets(relay: int) -> Iterator[list[socket.socket]]:
    """Duplicates of the relay's connected TCP sockets."""
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(relay)
    socks = []
    try:
        for number in os.listdir(f"/proc/{relay}/fd"):
            if os.readlink(f"/proc/{relay}/fd/{number}").startswith("socket:"):
                socks.append(socket.socket(fileno=libc.syscall(_PIDFD_GETFD, pidfd, int(number), 0)))
        yield [sock for sock in socks if sock.proto == socket.IPPROTO_TCP and _is_connected(sock)]
    finally:
        os.close(pidfd)
        for sock in socks:
            sock.close()


def _is_connected(sock: socket.socket) -> bool:
    """False for a listening socket, and for one that was just made for a client's container."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _options(relay: int) -> list[tuple[int, int, int]]:
    """Return TCP_NODELAY, SO_KEEPALIVE and TCP_KEEPIDLE of each of the relay's connections."""
    tcp = socket.IPPROTO_TCP
    with _relay_sockets(relay) as socks:
        return [
            (
                sock.getsockopt(tcp, socket.TCP_NODELAY),
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                sock.getsockopt(tcp, socket.TCP_KEEPIDLE),
            )
            for sock in socks
        ]


def test_nodelay_and_keepalive_are_set_on_both_sides(ports: Ports) -> None:
    echo(*ports.tcp().pair())
    relay = ports.site.relay()
    wait_until(lambda: _options(relay) == [(1, 1, 15)] * 2, "keepalive on both sides", PATIENCE_S)
    lines = ports.site.host.run("ss", "-Htnop", "state", "established").stdout.splitlines()
    assert sum(f"pid={relay}," in line and "timer:(keepalive" in line for line in lines) == 2


def test_connection_to_the_container_is_not_paced(ports: Ports) -> None:
    port = ports.tcp()
    echo(*port.pair())
    with _relay_sockets(ports.site.relay()) as socks:
        at = {sock.getpeername()[0]: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) for sock in socks}
    used = {address: name.rstrip(b"\0").decode() for address, name in at.items()}
    default = ports.site.host.sysctl("net.ipv4.tcp_congestion_control")
    assert used == {port.server.getsockname()[0]: "reno", port.address: default}


def test_without_descriptors_clients_wait_until_others_end(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, few_descriptors(64), workers=1) as (site, ports):
        port = ports.tcp()
        relay = site.relay()
        clients = crowd_in(port, 40)
        serve_one_by_one(port, clients)
        assert site.relay() == relay
        echo(*port.pair())


def test_unpublish_resets_connections_at_once(ports: Ports) -> None:
    port, other = ports.tcp(), ports.tcp()
    pairs, others = [port.pair() for _ in range(5)], other.pair()
    stop_ends_all(port, pairs)
    echo(*others)


@pytest.fixture
def sctp(ports: Ports) -> Port:
    """A published SCTP port."""
    if not has_sockets("sctp"):
        pytest.skip("the kernel has no SCTP")
    return ports.tcp(proto="sctp")


def test_sctp_echo(sctp: Port) -> None:
    client, served = sctp.pair()
    for number in range(10):
        echo(client, served, b"message %d" % number)


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize(("host_ip", "address"), [("0.0.0.0", "127.0.0.1"), ("::", "fd30::1")])
def test_sctp_echo_between_families(ports: Ports, host_ip: str, address: str, container: str) -> None:
    if not has_sockets("sctp"):
        pytest.skip("the kernel has no SCTP")
    echo(*ports.tcp(host_ip, address, container, proto="sctp").pair())


def test_sctp_message_boundaries_are_preserved(sctp: Port) -> None:
    client, served = sctp.pair()
    for size in (1, 20, 300):
        client.sendall(b"m" * size)
    for size in (1, 20, 300):
        assert len(served.recv(1000)) == size


@pytest.mark.parametrize("direction", ["up", "down"])
def test_sctp_large_message(sctp: Port, direction: str) -> None:
    client, served = sctp.pair()
    sender, receiver = (client, served) if direction == "up" else (served, client)
    message = random.Random(4).randbytes(100_000)
    sender.sendall(message)
    assert exactly(receiver, len(message)) == message


@pytest.mark.parametrize("direction", ["up", "down"])
def test_sctp_end_is_passed_on(sctp: Port, direction: str) -> None:
    client, served = sctp.pair()
    sender, receiver = (client, served) if direction == "up" else (served, client)
    sender.sendall(b"last")
    sender.close()
    assert exactly(receiver, 100) == b"last"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_sctp_reset_is_passed_on(sctp: Port, direction: str) -> None:
    client, served = sctp.pair()
    echo(client, served)
    sender, receiver = (client, served) if direction == "up" else (served, client)
    reset(sender)
    with pytest.raises(ConnectionResetError):
        receiver.recv(1)


def test_sctp_refused_backend_connection_resets_the_client(sctp: Port) -> None:
    sctp.server.close()
    with pytest.raises(ConnectionResetError):
        sctp.connect().recv(1)
