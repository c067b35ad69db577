"""Published UDP ports, with real datagrams through the launcher's relay."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from lab.netns import Host, Namespace
from lab.processes import suspend
from lab.waiting import wait_until
from tests.kernel.ground import BRIEF_S, PATIENCE_S, SLOW_MACHINE, Port, Ports, few_descriptors, site_and_ports
from tests.kernel.published import anonymous_kib, descriptors, open_socket

_CONTAINERS = ["172.30.0.2", "fd30::2"]
_FRONTS = [
    ("0.0.0.0", "127.0.0.1"),
    ("0.0.0.0", "127.1.2.3"),
    ("0.0.0.0", "172.30.0.1"),
    ("172.30.0.1", "172.30.0.1"),
    ("::", "::1"),
    ("::", "fd30::1"),
    ("fd30::1", "fd30::1"),
]
_LARGEST_BYTES = 65_507
_UDP_SEGMENT = 103  # include/uapi/linux/udp.h
_AT_ONCE = 50
_CLIENTS = 100 if SLOW_MACHINE else 500


def _client(port: Port, by: Namespace | None = None) -> socket.socket:
    """Return an unconnected socket: it receives from any address."""
    six = ":" in port.address
    with (by or port.site.host).entered():
        return port.keep(socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM))


def _receive(port: Port, text: bytes) -> tuple[str, int]:
    """Receive `text` in the container; return its sender."""
    got, sender = port.server.recvfrom(1 << 16)
    assert got == text
    return sender[0], sender[1]


def _exchange(port: Port, client: socket.socket, text: bytes = b"ping", address: str = "") -> int:
    """Send a datagram and receive the answer; return the port that the container sees as the client's."""
    address = address or port.address
    client.sendto(text, (address, port.number))
    sender = _receive(port, text)
    port.server.sendto(text[::-1], sender)
    answer, source = client.recvfrom(1 << 16)
    assert answer == text[::-1]
    assert source[:2] == (address, port.number)
    return sender[1]


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize(("host_ip", "address"), _FRONTS)
def test_echo(ports: Ports, host_ip: str, address: str, container: str) -> None:
    port = ports.udp(host_ip, address, container)
    client = _client(port)
    for text in (b"one", b"", b"three"):
        _exchange(port, client, text)


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize(("host_ip", "address"), [("0.0.0.0", "127.0.0.1"), ("::", "fd30::1")])
def test_largest_datagram_passes_in_both_directions(ports: Ports, host_ip: str, address: str, container: str) -> None:
    port = ports.udp(host_ip, address, container)
    _exchange(port, _client(port), (bytes(range(251)) * 261)[:_LARGEST_BYTES])


@pytest.mark.parametrize("container", _CONTAINERS)
def test_passed_dual_stack_socket_serves_both_families(ports: Ports, container: str) -> None:
    with ports.site.host.entered():
        listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 0))
    port = ports.passed(listener, "127.0.0.1", container)
    four = _client(port)
    _exchange(port, four)
    _exchange(port, four, address="127.1.2.3")
    port.address = "fd30::1"
    six = _client(port)
    for client, address in ((six, "fd30::1"), (four, "127.0.0.1"), (six, "::1"), (_client(port), "fd30::1")):
        _exchange(port, client, address=address)


def test_client_of_two_host_addresses_gets_each_answer_from_the_right_one(ports: Ports) -> None:
    site = ports.site
    site.host.ip("address", "add", "172.30.0.201/24", "dev", "br0")
    port = ports.udp("0.0.0.0", "172.30.0.1")
    client = _client(port, site.other)
    senders = {address: _exchange(port, client, address=address) for address in ("172.30.0.1", "172.30.0.201")}
    assert len(set(senders.values())) == 2
    for number, address in enumerate(("172.30.0.201", "172.30.0.1", "172.30.0.201")):
        assert _exchange(port, client, b"%d" % number, address) == senders[address]
    site.host.ip("address", "delete", "172.30.0.201/24", "dev", "br0")


def test_reordered_answers_leave_from_the_right_address(ports: Ports) -> None:
    port = ports.udp("0.0.0.0", "127.0.0.1")
    client = _client(port)
    addresses = ("127.0.0.1", "127.1.2.3")
    for address in addresses:
        client.sendto(address.encode(), (address, port.number))
    senders = dict(port.server.recvfrom(100) for _ in addresses)
    for address in reversed(addresses):
        port.server.sendto(address.encode(), senders[address.encode()])
        assert client.recvfrom(100) == (address.encode(), (address, port.number))


def _link_local(namespace: Namespace, device: str) -> str:
    """Return the device's link-local address after duplicate address detection; before that, an empty string."""
    (found,) = json.loads(namespace.ip("-j", "address", "show", "dev", device))
    for address in found["addr_info"]:
        if address["scope"] == "link" and address["family"] == "inet6" and not address.get("tentative"):
            return str(address["local"])
    return ""


def test_link_local_client_is_answered_over_its_own_link(ports: Ports) -> None:
    site = ports.site
    there = wait_until(lambda: _link_local(site.host, "br0"), "the bridge's address", PATIENCE_S)
    wait_until(lambda: _link_local(site.other, "eth0"), "the container's address", PATIENCE_S)
    port = ports.udp("::", "fd30::1")
    client = _client(port, site.other)
    with site.other.entered():
        zone = socket.if_nametoindex("eth0")
    for number in range(3):
        client.sendto(b"%d" % number, (there, port.number, 0, zone))
        port.server.sendto(b"answer", _receive(port, b"%d" % number))
        answer, source = client.recvfrom(100)
        assert answer == b"answer"
        assert (source[0].partition("%")[0], *source[1:]) == (there, port.number, 0, zone)


def test_multicast_is_answered_from_an_address_of_the_interface(ports: Ports) -> None:
    site = ports.site
    wait_until(lambda: _link_local(site.host, "br0"), "the bridge's address", PATIENCE_S)
    wait_until(lambda: _link_local(site.other, "eth0"), "the container's address", PATIENCE_S)
    port = ports.udp("::", "fd30::1")
    client = _client(port, site.other)
    with site.other.entered():
        zone = socket.if_nametoindex("eth0")
    client.sendto(b"all nodes", ("ff02::1", port.number, 0, zone))
    port.server.sendto(b"answer", _receive(port, b"all nodes"))
    answer, source = client.recvfrom(100)
    assert answer == b"answer"
    assert source[0].startswith("fe80:")


def test_broadcast_is_answered_from_the_interface_address(ports: Ports) -> None:
    ports.site.host.ip("address", "change", "172.30.0.1/24", "broadcast", "172.30.0.255", "dev", "br0")
    port = ports.udp("0.0.0.0", "172.30.0.1")
    client = _client(port, ports.site.other)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.sendto(b"who?", ("172.30.0.255", port.number))
    port.server.sendto(b"me", _receive(port, b"who?"))
    assert client.recvfrom(100) == (b"me", ("172.30.0.1", port.number))


def test_client_is_served_after_its_container_refused_datagrams(ports: Ports) -> None:
    port = ports.udp()
    name = port.server.getsockname()
    port.server.close()
    client = _client(port)
    client.sendto(b"first", (port.address, port.number))
    client.sendto(b"second", (port.address, port.number))
    client.settimeout(BRIEF_S)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(PATIENCE_S)
    port.server = port.keep(open_socket(ports.site.box, "udp", *name))
    _exchange(port, client, b"third")


@pytest.mark.parametrize(("host_ip", "address"), [("0.0.0.0", "172.30.0.1"), ("::", "fd30::1")])
def test_connected_client_is_told_that_nobody_listens_in_the_container(
    ports: Ports, host_ip: str, address: str
) -> None:
    port = ports.udp(host_ip, address)
    port.server.close()
    client = _client(port, ports.site.other)
    client.connect((address, port.number))
    client.send(b"anybody?")
    with pytest.raises(ConnectionRefusedError):
        client.recv(1)


def test_each_client_gets_its_own_answers(ports: Ports) -> None:
    port = ports.udp()
    clients = [_client(port) for _ in range(20)]
    for number, client in enumerate(clients):
        client.sendto(b"%d" % number, (port.address, port.number))
    senders = dict(port.server.recvfrom(100) for _ in clients)
    assert len(set(senders.values())) == len(clients)
    for text in sorted(senders, reverse=True):
        port.server.sendto(b"to " + text, senders[text])
    for number, client in enumerate(clients):
        assert client.recv(100) == b"to %d" % number


def test_burst_passes_in_order(ports: Ports) -> None:
    port = ports.udp()
    client = _client(port)
    for number in range(100):
        client.sendto(b"%d" % number, (port.address, port.number))
    assert [int(port.server.recv(100)) for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("container", _CONTAINERS)
def test_joined_datagrams_larger_than_the_mtu_are_fragmented(ports: Ports, container: str) -> None:
    """The kernel refuses to cut them into datagrams that do not fit the way to the container."""
    port = ports.udp(container=container)
    client, route = _client(port), ["route", "replace", container, "dev", "br0", "mtu", "1280"]
    datagrams = [bytes([number]) * 1400 for number in range(10)] + [b"the last one"]
    port.site.host.ip(*route)
    try:
        client.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 1400)
        client.sendto(b"".join(datagrams), (port.address, port.number))
        assert [port.server.recv(2000) for _ in datagrams] == datagrams
    finally:
        port.site.host.ip("route", "del", container, "dev", "br0")


def test_batch_of_answers_leaves_from_the_right_ports(ports: Ports) -> None:
    published = [ports.udp(), ports.udp("172.30.0.1", "172.30.0.1")]
    waiting = [(port, _client(port)) for _ in range(_AT_ONCE) for port in published]
    known = [_exchange(port, client) for port, client in waiting]
    relay = ports.site.relay()
    suspend(relay)
    try:
        for (port, _), number in zip(waiting, known, strict=True):
            port.server.sendto(b"%d" % number, (Host.gateway4, number))
    finally:
        os.kill(relay, signal.SIGCONT)
    for (port, client), number in zip(waiting, known, strict=True):
        assert client.recvfrom(100) == (b"%d" % number, (port.address, port.number))


def test_active_client_keeps_its_port_and_idle_client_expires(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, udp_timeout_s=1) as (site, ports):
        port = ports.udp()
        unused = len(descriptors(site.relay()))
        client = _client(port)
        sender = _exchange(port, client)
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            client.sendto(b"one way", (port.address, port.number))
            assert _receive(port, b"one way")[1] == sender
            time.sleep(0.2)
        wait_until(lambda: len(descriptors(site.relay())) == unused, "the client to be forgotten", PATIENCE_S)
        assert _exchange(port, client) != sender


def test_client_that_only_receives_does_not_expire(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, udp_timeout_s=1) as (_, ports):
        port = ports.udp()
        client = _client(port)
        client.sendto(b"subscribe", (port.address, port.number))
        sender = _receive(port, b"subscribe")
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            port.server.sendto(b"news", sender)
            assert client.recv(100) == b"news"
            time.sleep(0.2)


def test_beyond_the_limit_the_longest_idle_client_is_removed(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, udp_clients=3) as (site, ports):
        port = ports.udp()
        unused = len(descriptors(site.relay()))
        first, second, third, fourth = (_client(port) for _ in range(4))
        known = [_exchange(port, client) for client in (first, second, third)]
        until_s = time.monotonic() + 2.2  # order is remaining by whole seconds
        while time.monotonic() < until_s:
            assert _exchange(port, first) == known[0]
            time.sleep(0.1)
        _exchange(port, fourth)
        wait_until(lambda: len(descriptors(site.relay())) == unused + 3, "three clients", PATIENCE_S)
        assert _exchange(port, first) == known[0]
        assert _exchange(port, third) == known[2]
        assert _exchange(port, second) != known[1]
        assert len(descriptors(site.relay())) == unused + 3


def test_without_descriptors_the_longest_idle_client_is_removed(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, few_descriptors(48)) as (site, ports):
        port = ports.udp()
        clients = [_client(port) for _ in range(60)]
        for client in clients:
            _exchange(port, client)
        assert len(descriptors(site.relay())) <= 48
        _exchange(port, clients[0])


def test_idle_client_has_no_buffer(ports: Ports) -> None:
    port = ports.udp()
    _exchange(port, _client(port), b"x" * _LARGEST_BYTES)
    relay = ports.site.relay()
    clients = [_client(port) for _ in range(_CLIENTS)]
    before_kib = anonymous_kib(relay)
    for client in clients:
        _exchange(port, client, b"x" * 1000)
    assert anonymous_kib(relay) - before_kib < 4 * _CLIENTS


def test_unpublish_frees_the_port_and_its_clients(ports: Ports) -> None:
    other = ports.udp()
    relay = ports.site.relay()
    remaining = _client(other)
    sender = _exchange(other, remaining)
    before = len(descriptors(relay))
    port = ports.udp()
    for _ in range(5):
        _exchange(port, _client(port))
    assert port.stop() == 0
    open_socket(ports.site.host, "udp", "127.0.0.1", port.number).close()
    wait_until(lambda: len(descriptors(relay)) == before, "the end of the port's clients", PATIENCE_S)
    assert _exchange(other, remaining) == sender
