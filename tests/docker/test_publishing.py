"""Ports that a real dockerd publishes: which clients reach them, and that nothing is left after they are unpublished.

All tests share one dockerd of each release, so each uses different ports.
"""

import socket
from collections.abc import Iterator
from functools import partial

import pytest

from lab import echo_server
from lab.dockerd import DockerFailed
from tests.docker.dockerhost import Site, site

DOCKER0 = (
    "172.17.0.1"  # the address of dockerd's default bridge; containers see it as the client's if the proxy connects
)


@pytest.fixture(scope="module")
def web(engine_site: Site) -> Iterator[str]:
    """A container with port 8000 published, TCP and UDP."""
    name = engine_site.container("-p", "8000:8000", "-p", "8000:8000/udp", serving=(8000,))
    yield name
    engine_site.remove(name)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("127.0.0.1", DOCKER0),
        ("127.1.2.3", DOCKER0),
        ("::1", DOCKER0),
        ("172.30.0.1", "172.30.0.1"),
        ("fd30::1", DOCKER0),
    ],
)
@pytest.mark.usefixtures("web")
def test_host_reaches_published_port(engine_site: Site, address: str, seen: str, protocol: str) -> None:
    assert engine_site.request(8000, address, protocol) == seen


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(("address", "seen"), [("172.30.0.1", "172.30.0.2"), ("fd30::1", DOCKER0)])
@pytest.mark.usefixtures("web")
def test_neighbour_reaches_published_port(engine_site: Site, address: str, seen: str, protocol: str) -> None:
    assert echo_server.request(engine_site.neighbour.command, protocol, address, 8000).peer == seen


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", [DOCKER0, "172.30.0.1"])
def test_containers_reach_published_port(engine_site: Site, web: str, address: str, protocol: str) -> None:
    other = engine_site.container()
    for client in (other, web):
        assert (
            echo_server.request(partial(engine_site.docker.command_in, client), protocol, address, 8000).peer == DOCKER0
        )
    engine_site.remove(other)


def test_proxy_carries_everything_without_iptables() -> None:
    with site("--iptables=false") as bare:
        name = bare.container("-p", "8000:8000", "-p", "8000:8000/udp", serving=(8000,))
        for protocol in ("tcp", "udp"):
            assert bare.request(8000, "172.30.0.1", protocol) == DOCKER0
            assert echo_server.request(bare.neighbour.command, protocol, "172.30.0.1", 8000).peer == DOCKER0
        bare.remove(name)


def test_port_on_one_address_leaves_other_addresses_free(shared_site: Site) -> None:
    names = [shared_site.container("-p", f"{address}:8001:80", serving=(80,)) for address in ("127.0.0.1", "127.0.0.2")]
    assert shared_site.request(8001, "127.0.0.1") == DOCKER0
    assert shared_site.request(8001, "127.0.0.2") == DOCKER0
    with pytest.raises(echo_server.NoAnswer, match="refused"):
        shared_site.request(8001, "127.0.0.3")
    shared_site.remove(*names)


def test_port_range(shared_site: Site) -> None:
    ports = range(8100, 8120)
    name = shared_site.container("-p", "8100-8119:8100-8119", serving=tuple(ports))
    for port in ports:
        assert shared_site.request(port) == DOCKER0
        assert shared_site.request(port, "::1") == DOCKER0
    shared_site.remove(name)
    assert all(shared_site.is_free(port) for port in ports)


@pytest.mark.parametrize("address", ["127.0.0.1", "fd30::1"], ids=["redirected", "relayed"])
def test_container_reuses_port_of_removed_container(shared_site: Site, address: str) -> None:
    for _ in range(5):
        name = shared_site.container("-p", "8002:80", "-p", "8002:80/udp", serving=(80,))
        assert shared_site.request(8002, address) == DOCKER0
        assert shared_site.request(8002, address, "udp") == DOCKER0
        with shared_site.host.entered(), socket.create_connection((address, 8002), 5) as client:
            echo_server.request_over(client)
            assert is_closed(client)  # the relay closes first, and so has the socket in TIME_WAIT
        waiting = shared_site.host.run("ss", "-Htn", "state", "time-wait", "sport = :8002").stdout
        assert waiting or address == "127.0.0.1"  # it must not keep the relay from listening again
        with shared_site.host.entered(), socket.create_connection((address, 8002)) as client:
            shared_site.remove(name)
            client.settimeout(5)
            assert is_closed(client)


def is_closed(connection: socket.socket) -> bool:
    """True if the other side closes or resets the connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
@pytest.mark.usefixtures("web")
def test_client_of_loopback_address_is_redirected_to_container(engine_site: Site, address: str, protocol: str) -> None:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with engine_site.host.entered(), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as sock:
        sock.connect((address, 8000))
        assert sock.getpeername()[:2] == (address, 8000)
        assert sock.getsockname()[0].removeprefix("::ffff:") == DOCKER0  # it left by the bridge


def test_stopped_container_frees_port_and_started_one_publishes_it(engine_site: Site) -> None:
    name = engine_site.container("-p", "8003:80", serving=(80,))
    assert engine_site.request(8003) == DOCKER0
    engine_site.docker.run("stop", name)
    assert engine_site.is_free(8003)
    for verb in ("start", "restart"):
        engine_site.docker.run(verb, name)
        engine_site.serve(name, 80)
        assert engine_site.request(8003) == DOCKER0
    engine_site.remove(name)


def test_dockerd_logs_no_error_when_publishing_and_unpublishing(shared_site: Site) -> None:
    before = len(shared_site.docker.log)
    name = shared_site.container("-p", "8005:80", "-p", "8005:80/udp", serving=(80,))
    assert shared_site.request(8005) == DOCKER0
    shared_site.docker.run("restart", name)
    shared_site.remove(name)
    logged = shared_site.docker.log[before:].splitlines()
    assert not [line for line in logged if "level=error" in line or "proxy" in line]


@pytest.mark.parametrize(
    ("family", "listen"), [(socket.AF_INET, "tcp4 0.0.0.0:8004"), (socket.AF_INET6, "tcp6 [::]:8004")]
)
def test_port_in_use_is_reported_and_leaves_nothing_behind(
    engine_site: Site, family: socket.AddressFamily, listen: str
) -> None:
    with engine_site.bound(8004, family), pytest.raises(DockerFailed) as failed:
        engine_site.container("-p", "8004:80")
    by_launcher = f"Error starting userland proxy: listen {listen}: bind: address already in use"
    by_dockerd = f"failed to bind host port for {listen.split()[1]}:"  # from Docker 28.0, which then starts no launcher
    assert by_launcher in str(failed.value) or by_dockerd in str(failed.value)
    assert engine_site.is_free(8004)
    name = engine_site.container("-p", "8004:80", serving=(80,))
    assert engine_site.request(8004) == DOCKER0
    engine_site.remove(name)
