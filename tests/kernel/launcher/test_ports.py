"""Ports that launchers publish: the status pipe, addresses and passed sockets, and how a port ends."""

import fcntl
import os
import signal
import socket

import pytest

from lab.netns import Container, Host
from lab.redirect import actual_peer
from lab.waiting import wait_until
from tests.kernel.launcher.launchers import (
    BRIEF_S,
    KINDS,
    Echo,
    bound,
    connect,
    daemon_and_relay,
    ends,
    exchange,
    flags_for,
    is_free,
    publish,
    serves,
    start,
    stop,
)


@pytest.mark.any_kernel
def test_status_is_one_write_and_no_other_process_holds_the_pipe(fresh: tuple[Host, Container], port: int) -> None:
    host, box = fresh
    for _ in range(2):  # the first launcher starts the daemon, the second finds it
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            status = fcntl.fcntl(writing, fcntl.F_DUPFD_CLOEXEC, 10)
            os.close(writing)
            instead = ("bash", "-c", f'exec "$@" 3>&{status} {status}>&-', "bash")
            launcher, _ = start(host, *flags_for(box, port), before=instead, pass_fds=(status,))
            os.close(status)
            assert [pipe.read(64), pipe.read(64)] == [b"0\n", b""]
        assert launcher.poll() is None
        daemon_and_relay(host)
        assert stop(launcher) == 0


def test_both_families_of_a_port(host: Host, box: Container, port: int) -> None:
    launchers = [publish(host, box, port), publish(host, box, port, "-host-ip", "::")]
    assert serves(host, port, "127.0.0.1")
    assert serves(host, port, "::1")
    assert stop(launchers[0]) == 0
    assert serves(host, port, "::1")
    with pytest.raises(ConnectionRefusedError):
        connect(host, port, "127.0.0.1")
    assert stop(launchers[1]) == 0


@pytest.mark.parametrize("proto", KINDS)
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_port_of_one_host_address(host: Host, box: Container, port: int, proto: str, address: str) -> None:
    launcher, status = start(host, *flags_for(box, port, proto, address))
    assert status == b"0\n"
    assert serves(host, port, address, KINDS[proto])
    if proto == "tcp":
        with pytest.raises(ConnectionRefusedError):
            connect(host, port, host.gateway6 if ":" in address else host.gateway4)
    assert stop(launcher) == 0


@pytest.mark.parametrize("kind", ["listening", "bound", "udp"])
def test_passed_socket(host: Host, box: Container, port: int, kind: str) -> None:
    proto = "udp" if kind == "udp" else "tcp"
    with bound(host, port, KINDS[proto]) as server:
        if kind == "listening":
            server.listen()
        launcher = publish(host, box, port, "-use-listen-fd", proto=proto, passed=server.fileno())
    assert serves(host, port, "127.0.0.1", KINDS[proto])
    assert stop(launcher) == 0
    assert is_free(host, port, KINDS[proto])


@pytest.mark.any_kernel
@pytest.mark.parametrize("proto", KINDS)
def test_sigint_frees_the_port_each_time(host: Host, box: Container, port: int, proto: str) -> None:
    for _ in range(10):
        launcher = publish(host, box, port, proto=proto)
        assert serves(host, port, "127.0.0.1", KINDS[proto])  # leaves a connection in TIME_WAIT
        with connect(host, port, "127.0.0.1", KINDS[proto]) as client:
            exchange(client)
            assert stop(launcher) == 0
            with bound(host, port, KINDS[proto]):
                pass
            if proto == "tcp":
                assert ends(client)


def test_sigterm_frees_the_port_too(host: Host, box: Container, port: int) -> None:
    assert stop(publish(host, box, port), signal.SIGTERM) == 0
    assert is_free(host, port)


@pytest.mark.parametrize("proto", KINDS)
def test_port_ends_with_a_killed_launcher(host: Host, box: Container, port: int, proto: str) -> None:
    kind = KINDS[proto]
    launcher = publish(host, box, port, proto=proto)
    with connect(host, port, "127.0.0.1", kind) as client:
        exchange(client)
        assert stop(launcher, signal.SIGKILL) == -signal.SIGKILL
        if proto == "tcp":
            assert ends(client)
        wait_until(lambda: is_free(host, port, kind), "the killed launcher's port to be free", BRIEF_S)


@pytest.mark.parametrize("proto", KINDS)
def test_redirected_sockets_end_with_the_port(host: Host, box: Container, port: int, proto: str) -> None:
    launcher = publish(host, box, port, proto=proto)
    with host.entered(), socket.socket(socket.AF_INET, KINDS[proto]) as client:
        client.settimeout(BRIEF_S)
        client.connect(("127.0.0.1", port))
        assert actual_peer(client) == (box.address4, Echo.port)
        exchange(client)
        assert stop(launcher) == 0
        if proto == "tcp":
            assert ends(client)
        else:
            assert actual_peer(client) == ("127.0.0.1", port)


def test_stopped_launcher_leaves_other_ports_alone(host: Host, box: Container, port: int, ports: list[int]) -> None:
    launcher, other = publish(host, box, port), publish(host, box, ports[0])
    with connect(host, ports[0]) as client:
        exchange(client)
        assert stop(launcher) == 0
        exchange(client)
    assert stop(other) == 0


def test_socket_is_passed_with_its_queue(host: Host, box: Container, port: int) -> None:
    """A client that connected before the launcher started is served."""
    with bound(host, port) as server:
        server.listen()
        with connect(host, port) as client:
            launcher = publish(host, box, port, "-use-listen-fd", passed=server.fileno())
            exchange(client)
            assert stop(launcher) == 0
