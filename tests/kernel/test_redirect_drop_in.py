"""The redirect under Docker: the keeper enters the launchers' ports, for a relay that has no right to."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.redirect import actual_peer, cgroup_links_of, link_exists
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S, Port, Ports, Site, echo, site_and_ports
from tests.kernel.published import processes, status_of

_LIBRARY = next((path for path in Path("/usr/lib").glob("*/libbpf.so.1")), Path("/nonexistent"))


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[tuple[Site, Ports]]:
    """A site whose keeper redirects, and its ports."""
    with site_and_ports(tmp_path, redirect=True) as made:
        yield made


def aim(port: Port, address: str) -> tuple[str, int]:
    """Whom a client of a port sends to; nothing has to be answered."""
    with port.site.host.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, port.server.type, port.server.proto) as client:
            client.setblocking(False)
            client.connect_ex((address, port.number))
            return actual_peer(client)


def is_entered(port: Port, address: str) -> None:
    """Waits until clients are redirected: the launcher's word that the port is served does not wait for it."""
    wait_until(lambda: aim(port, address) == port.server.getsockname()[:2], "the redirect", PATIENCE_S)


def _is_with(served: socket.socket, client: socket.socket) -> bool:
    """Whether these two are the ends of one connection: nothing is between them, not even a translation."""
    try:
        return bool(served.getpeername()[1] == client.getsockname()[1])
    except OSError:
        return False  # one of those that `aim` has made


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
def test_a_published_port_is_redirected(
    ground: tuple[Site, Ports], host_ip: str, address: str, is_v6: bool, protocol: str
) -> None:
    site, ports = ground
    container = site.box.address6 if is_v6 else site.box.address4
    port = getattr(ports, protocol)(host_ip, address, container)
    is_entered(port, address)
    client = port.connect()
    assert client.getpeername()[:2] == (address, port.number)
    if protocol == "tcp":
        echo(client, next(served for served in iter(port.accept, None) if _is_with(served, client)))
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
        is_entered(port, address)


def test_who_asks_the_hosts_address_or_has_a_loopback_one_is_relayed(ground: tuple[Site, Ports]) -> None:
    site, ports = ground
    port = ports.tcp("0.0.0.0", "127.0.0.1")
    is_entered(port, "127.0.0.1")
    assert aim(port, site.host.gateway4) == (site.host.gateway4, port.number)
    with site.host.entered(), socket.socket(socket.AF_INET) as client:
        client.bind(("127.0.0.1", 0))
        client.connect(("127.0.0.1", port.number))
        assert actual_peer(client) == ("127.0.0.1", port.number)


def test_a_stopped_launcher_ends_it_and_the_next_one_has_the_port(ground: tuple[Site, Ports]) -> None:
    site, ports = ground
    port = ports.tcp("0.0.0.0", "127.0.0.1")
    is_entered(port, "127.0.0.1")
    assert port.stop() == 0
    with pytest.raises(ConnectionRefusedError):
        port.connect()
    port.launcher.kill()
    is_entered(ports.tcp("0.0.0.0", "127.0.0.1", site.box.address4), "127.0.0.1")


@pytest.mark.parametrize("victim", ["keeper", "relay"])
def test_whoever_is_killed_it_is_back_and_nothing_is_left(ground: tuple[Site, Ports], victim: str) -> None:
    site, ports = ground
    port = ports.tcp("0.0.0.0", "127.0.0.1")
    is_entered(port, "127.0.0.1")
    keeper = site.daemon()
    before = cgroup_links_of([keeper])
    os.kill(keeper if victim == "keeper" else site.relay(), signal.SIGKILL)
    wait_until(lambda: keeper not in processes(site.host), "the end of the old keeper", PATIENCE_S)
    is_entered(port, "127.0.0.1")
    wait_until(lambda: not any(map(link_exists, before)), "the end of its links", PATIENCE_S)


def test_the_relay_holds_nothing_by_which_sockets_are_redirected(ground: tuple[Site, Ports]) -> None:
    site, ports = ground
    is_entered(ports.tcp("0.0.0.0", "127.0.0.1"), "127.0.0.1")
    relay = site.relay()
    assert status_of(relay)["Uid"].startswith("65534\t")
    held = [os.readlink(f"/proc/{relay}/fd/{fd}") for fd in os.listdir(f"/proc/{relay}/fd")]
    assert not [name for name in held if "bpf" in name]


@pytest.mark.skipif(not _LIBRARY.exists(), reason="libbpf is not where Debian has it")
def test_where_it_cannot_be_the_relay_serves_and_the_log_says_why(tmp_path: Path) -> None:
    before = ("sh", "-c", f'mount --bind /dev/null {_LIBRARY} && exec "$0" "$@"')
    with site_and_ports(tmp_path, before, redirect=True) as (site, ports):
        port = ports.tcp("0.0.0.0", "127.0.0.1")
        wait_until(lambda: site.log_lines("sockets are not redirected"), "a word in the log", PATIENCE_S)
        assert site.log_lines("libbpf.so.1 is not installed")
        assert aim(port, "127.0.0.1") == ("127.0.0.1", port.number)
        echo(*ports.tcp("0.0.0.0", "127.0.0.1").pair())
