"""Published UDP ports, with real datagrams through the launcher's relay."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from lab.netns import Host, Namespace
from lab.waiting import wait_until
from tests.kernel.ground import BRIEF_S, PATIENCE_S, SLOW_MACHINE, Port, Ports, site_and_ports
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
_AT_ONCE = 50
_CLIENTS = 100 if SLOW_MACHINE else 500


def _client(port: Port, by: Namespace | None = None) -> socket.socket:
    """An unconnected socket: it hears from any address."""
    six = ":" in port.address
    with (by or port.site.host).entered():
        return port.keep(socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM))


def _hear(port: Port, text: bytes) -> tuple[str, int]:
    """The container gets `text`; from where."""
    got, sender = port.server.recvfrom(1 << 16)
    assert got == text
    return sender[0], sender[1]


def _ask(port: Port, client: socket.socket, text: bytes = b"ping", address: str = "") -> int:
    """A datagram, and an answer from where it was sent to; gives the port that the container knows the client by."""
    address = address or port.address
    client.sendto(text, (address, port.number))
    sender = _hear(port, text)
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
        _ask(port, client, text)


@pytest.mark.parametrize("container", _CONTAINERS)
@pytest.mark.parametrize(("host_ip", "address"), [("0.0.0.0", "127.0.0.1"), ("::", "fd30::1")])
def test_the_largest_datagram_passes_both_ways(ports: Ports, host_ip: str, address: str, container: str) -> None:
    port = ports.udp(host_ip, address, container)
    _ask(port, _client(port), (bytes(range(251)) * 261)[:_LARGEST_BYTES])


@pytest.mark.parametrize("container", _CONTAINERS)
def test_a_passed_dual_stack_socket_serves_both_families(ports: Ports, container: str) -> None:
    with ports.site.host.entered():
        listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 0))
    port = ports.passed(listener, "127.0.0.1", container)
    four = _client(port)
    _ask(port, four)
    _ask(port, four, address="127.1.2.3")
    port.address = "fd30::1"
    six = _client(port)
    for client, address in ((six, "fd30::1"), (four, "127.0.0.1"), (six, "::1"), (_client(port), "fd30::1")):
        _ask(port, client, address=address)


def test_one_client_asks_two_addresses_of_the_host(ports: Ports) -> None:
    site = ports.site
    site.host.ip("address", "add", "172.30.0.201/24", "dev", "br0")
    port = ports.udp("0.0.0.0", "172.30.0.1")
    client = _client(port, site.other)
    senders = {address: _ask(port, client, address=address) for address in ("172.30.0.1", "172.30.0.201")}
    assert len(set(senders.values())) == 2
    for number, address in enumerate(("172.30.0.201", "172.30.0.1", "172.30.0.201")):
        assert _ask(port, client, b"%d" % number, address) == senders[address]
    site.host.ip("address", "delete", "172.30.0.201/24", "dev", "br0")


def test_answers_that_overtake_each_other_leave_from_the_right_address(ports: Ports) -> None:
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
    """The device's link-local address, when the kernel is done with looking for duplicates of it; or nothing."""
    (found,) = json.loads(namespace.ip("-j", "address", "show", "dev", device))
    for address in found["addr_info"]:
        if address["scope"] == "link" and address["family"] == "inet6" and not address.get("tentative"):
            return str(address["local"])
    return ""


def test_a_link_local_client_is_answered_over_its_own_link(ports: Ports) -> None:
    site = ports.site
    there = wait_until(lambda: _link_local(site.host, "br0"), "the bridge's address", PATIENCE_S)
    wait_until(lambda: _link_local(site.other, "eth0"), "the container's address", PATIENCE_S)
    port = ports.udp("::", "fd30::1")
    client = _client(port, site.other)
    with site.other.entered():
        zone = socket.if_nametoindex("eth0")
    for number in range(3):
        client.sendto(b"%d" % number, (there, port.number, 0, zone))
        port.server.sendto(b"answer", _hear(port, b"%d" % number))
        answer, source = client.recvfrom(100)
        assert answer == b"answer"
        assert (source[0].partition("%")[0], *source[1:]) == (there, port.number, 0, zone)


def test_a_multicast_is_answered_from_an_address_of_the_interface(ports: Ports) -> None:
    site = ports.site
    wait_until(lambda: _link_local(site.host, "br0"), "the bridge's address", PATIENCE_S)
    wait_until(lambda: _link_local(site.other, "eth0"), "the container's address", PATIENCE_S)
    port = ports.udp("::", "fd30::1")
    client = _client(port, site.other)
    with site.other.entered():
        zone = socket.if_nametoindex("eth0")
    client.sendto(b"all nodes", ("ff02::1", port.number, 0, zone))
    port.server.sendto(b"answer", _hear(port, b"all nodes"))
    answer, source = client.recvfrom(100)
    assert answer == b"answer"
    assert source[0].startswith("fe80:")


def test_a_broadcast_is_answered_from_the_interfaces_address(ports: Ports) -> None:
    ports.site.host.ip("address", "change", "172.30.0.1/24", "broadcast", "172.30.0.255", "dev", "br0")
    port = ports.udp("0.0.0.0", "172.30.0.1")
    client = _client(port, ports.site.other)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.sendto(b"who?", ("172.30.0.255", port.number))
    port.server.sendto(b"me", _hear(port, b"who?"))
    assert client.recvfrom(100) == (b"me", ("172.30.0.1", port.number))


def test_a_container_without_a_server_ends_nothing(ports: Ports) -> None:
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
    _ask(port, client, b"third")


def test_clients_do_not_get_each_others_answers(ports: Ports) -> None:
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


def test_a_burst_passes_in_order(ports: Ports) -> None:
    port = ports.udp()
    client = _client(port)
    for number in range(100):
        client.sendto(b"%d" % number, (port.address, port.number))
    assert [int(port.server.recv(100)) for _ in range(100)] == list(range(100))


def test_answers_that_come_all_at_once_reach_their_clients_from_their_ports(ports: Ports) -> None:
    published = [ports.udp(), ports.udp("172.30.0.1", "172.30.0.1")]
    waiting = [(port, _client(port)) for _ in range(_AT_ONCE) for port in published]
    known = [_ask(port, client) for port, client in waiting]
    relay = ports.site.relay()
    os.kill(relay, signal.SIGSTOP)
    try:
        for (port, _), number in zip(waiting, known, strict=True):
            port.server.sendto(b"%d" % number, (Host.gateway4, number))
    finally:
        os.kill(relay, signal.SIGCONT)
    for (port, client), number in zip(waiting, known, strict=True):
        assert client.recvfrom(100) == (b"%d" % number, (port.address, port.number))


def test_a_client_keeps_its_port_while_in_use_and_is_forgotten_afterwards(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, udp_timeout_s=1) as (site, ports):
        port = ports.udp()
        unused = len(descriptors(site.relay()))
        client = _client(port)
        sender = _ask(port, client)
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            client.sendto(b"one way", (port.address, port.number))
            assert _hear(port, b"one way")[1] == sender
            time.sleep(0.2)
        wait_until(lambda: len(descriptors(site.relay())) == unused, "the client to be forgotten", PATIENCE_S)
        assert _ask(port, client) != sender


def test_answers_alone_keep_a_client(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, udp_timeout_s=1) as (_, ports):
        port = ports.udp()
        client = _client(port)
        client.sendto(b"subscribe", (port.address, port.number))
        sender = _hear(port, b"subscribe")
        until_s = time.monotonic() + 3
        while time.monotonic() < until_s:
            port.server.sendto(b"news", sender)
            assert client.recv(100) == b"news"
            time.sleep(0.2)


def test_of_too_many_clients_the_one_silent_longest_goes(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, udp_clients=3) as (site, ports):
        port = ports.udp()
        unused = len(descriptors(site.relay()))
        first, second, third, fourth = (_client(port) for _ in range(4))
        known = [_ask(port, client) for client in (first, second, third)]
        until_s = time.monotonic() + 2.2  # order is kept by whole seconds
        while time.monotonic() < until_s:
            assert _ask(port, first) == known[0]
            time.sleep(0.1)
        _ask(port, fourth)
        wait_until(lambda: len(descriptors(site.relay())) == unused + 3, "three clients", PATIENCE_S)
        assert _ask(port, first) == known[0]
        assert _ask(port, third) == known[2]
        assert _ask(port, second) != known[1]
        assert len(descriptors(site.relay())) == unused + 3


def test_out_of_descriptors_the_client_silent_longest_goes(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, ("prlimit", "--nofile=48:48")) as (site, ports):
        port = ports.udp()
        clients = [_client(port) for _ in range(60)]
        for client in clients:
            _ask(port, client)
        assert len(descriptors(site.relay())) <= 48
        _ask(port, clients[0])


def test_a_client_costs_no_buffer(ports: Ports) -> None:
    port = ports.udp()
    _ask(port, _client(port), b"x" * _LARGEST_BYTES)
    relay = ports.site.relay()
    clients = [_client(port) for _ in range(_CLIENTS)]
    before_kib = anonymous_kib(relay)
    for client in clients:
        _ask(port, client, b"x" * 1000)
    assert anonymous_kib(relay) - before_kib < 4 * _CLIENTS


def test_a_withdrawn_port_is_free_and_its_clients_are_gone(ports: Ports) -> None:
    other = ports.udp()
    relay = ports.site.relay()
    kept = _client(other)
    sender = _ask(other, kept)
    before = len(descriptors(relay))
    port = ports.udp()
    for _ in range(5):
        _ask(port, _client(port))
    assert port.stop() == 0
    open_socket(ports.site.host, "udp", "127.0.0.1", port.number).close()
    wait_until(lambda: len(descriptors(relay)) == before, "the end of the port's clients", PATIENCE_S)
    assert _ask(other, kept) == sender
