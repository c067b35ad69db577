"""The redirect of launchers' ports: the daemon adds the entries, for a relay that has no privilege to."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.redirect import actual_peer, cgroup_links_of, link_exists
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S, Port, Ports, Site, echo, site_and_ports
from tests.kernel.published import descriptors, processes, status_of

pytestmark = pytest.mark.any_kernel  # test_redirect.py has what the kernel decides
_LIBRARY = next((path for path in Path("/usr/lib").glob("*/libbpf.so.1")), Path("/nonexistent"))


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[tuple[Site, Ports]]:
    """A site whose daemon redirects, and its ports."""
    with site_and_ports(tmp_path, redirect=True) as made:
        yield made


def peer_of_client(port: Port, address: str) -> tuple[str, int]:
    """Return what a client of a port really sends to; no server has to answer."""
    with port.site.host.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, port.server.type, port.server.proto) as client:
            client.setblocking(False)
            client.connect_ex((address, port.number))
            return actual_peer(client)


def is_redirected(port: Port, address: str) -> bool:
    """True if clients are redirected to the container."""
    return bool(peer_of_client(port, address) == port.server.getsockname()[:2])


def _are_connected(served: socket.socket, client: socket.socket) -> bool:
    """True if these two are the ends of one connection, without even a translation in between."""
    try:
        return bool(served.getpeername()[1] == client.getsockname()[1])
    except OSError:
        return False  # a connection that `peer_of_client` has made


@pytest.mark.parametrize(
    ("host_ip", "address", "is_v6"),
    [
        ("0.0.0.0", "127.0.0.1", False),
        ("127.0.0.5", "127.0.0.5", False),
        ("::", "::1", False),
        ("::", "::1", True),
        ("::1", "::1", True),
    ],
)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_port_is_redirected(ground: tuple[Site, Ports], host_ip: str, address: str, is_v6: bool, protocol: str) -> None:
    site, ports = ground
    container = site.box.address6 if is_v6 else site.box.address4
    port = getattr(ports, protocol)(host_ip, address, container)
    assert is_redirected(port, address)
    client = port.connect()
    assert client.getpeername()[:2] == (address, port.number)
    if protocol == "tcp":
        echo(client, next(served for served in iter(port.accept, None) if _are_connected(served, client)))
    else:
        client.send(b"question")
        data, peer = port.server.recvfrom(100)
        port.server.sendto(data, peer)
        assert client.recv(100) == b"question"


def test_both_families_of_a_passed_socket_are_redirected(ground: tuple[Site, Ports]) -> None:
    site, ports = ground
    with site.host.entered():
        listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    port = ports.passed(listener, "::1", site.box.address4)
    for address in ("127.0.0.1", "::1"):
        assert is_redirected(port, address)


def test_clients_of_the_host_address_and_bound_clients_are_relayed(ground: tuple[Site, Ports]) -> None:
    site, ports = ground
    port = ports.tcp("0.0.0.0", "127.0.0.1")
    assert is_redirected(port, "127.0.0.1")
    assert peer_of_client(port, site.host.gateway4) == (site.host.gateway4, port.number)
    with site.host.entered(), socket.socket(socket.AF_INET) as client:
        client.bind(("127.0.0.1", 0))
        client.connect(("127.0.0.1", port.number))
        assert actual_peer(client) == ("127.0.0.1", port.number)


def test_redirect_ends_with_the_launcher_and_begins_with_the_next(ground: tuple[Site, Ports]) -> None:
    site, ports = ground
    port = ports.tcp("0.0.0.0", "127.0.0.1")
    assert is_redirected(port, "127.0.0.1")
    assert port.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        port.connect()
    port.launcher.kill()
    assert is_redirected(ports.tcp("0.0.0.0", "127.0.0.1", site.box.address4), "127.0.0.1")


@pytest.mark.parametrize("victim", ["daemon", "relay"])
def test_redirect_survives_killed_processes_and_leaves_nothing_behind(ground: tuple[Site, Ports], victim: str) -> None:
    site, ports = ground
    port = ports.tcp("0.0.0.0", "127.0.0.1")
    daemon, relay = site.daemon(), site.relay()
    before = cgroup_links_of([daemon])
    assert before
    killed = daemon if victim == "daemon" else relay
    os.kill(killed, signal.SIGKILL)
    assert is_redirected(port, "127.0.0.1")
    wait_until(lambda: killed not in (now := set(processes(site.host))) and len(now) == 2, "a new process", PATIENCE_S)
    assert is_redirected(port, "127.0.0.1")
    if victim == "daemon":
        wait_until(lambda: not any(map(link_exists, before)), "the end of the old links", PATIENCE_S)
    wait_until(lambda: cgroup_links_of([site.relay()]) == cgroup_links_of([site.daemon()]), "its links", PATIENCE_S)
    assert is_redirected(port, "127.0.0.1")


def test_relay_holds_links_only(ground: tuple[Site, Ports]) -> None:
    """With a link the relay can end the redirect, but neither read nor change its entries."""
    site, ports = ground
    assert is_redirected(ports.tcp("0.0.0.0", "127.0.0.1"), "127.0.0.1")
    relay = site.relay()
    assert status_of(relay)["Uid"].startswith("65534\t")
    assert {name for name in descriptors(relay) if "bpf" in name} == {"anon_inode:bpf_link"}
    assert cgroup_links_of([relay]) == cgroup_links_of([site.daemon()])


@pytest.mark.skipif(not _LIBRARY.exists(), reason="libbpf is not where Debian has it")
def test_unavailable_redirect_is_logged_and_the_relay_serves(tmp_path: Path) -> None:
    before = ("sh", "-c", f'mount --bind /dev/null {_LIBRARY} && exec "$0" "$@"')
    with site_and_ports(tmp_path, before, redirect=True) as (site, ports):
        port = ports.tcp("0.0.0.0", "127.0.0.1")
        assert site.log_lines("redirect unavailable: libbpf.so.1 is not installed")
        assert peer_of_client(port, "127.0.0.1") == ("127.0.0.1", port.number)
        echo(*ports.tcp("0.0.0.0", "127.0.0.1").pair())
