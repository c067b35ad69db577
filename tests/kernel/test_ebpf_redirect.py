"""The redirect by itself, in a namespace: entries, takeover, reattachment, and what happens where it fails."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from gangway.ebpf import keys, libbpf
from gangway.ebpf.keys import PortBlock, Target, blocks
from gangway.ebpf.redirect import DISABLED, Redirect
from gangway.ebpf.steering import Steering
from gangway.errors import HostRefused, Unsupported
from lab.holder import Holder
from lab.netns import Namespace
from lab.redirect import actual_peer, detach_link, link_exists
from lab.waiting import wait_until
from tests.kernel.libbpf_calls import Calls, calls

__all__ = ["calls"]

HOST4, BOX4, BOX6 = "172.30.0.1", "172.30.0.2", "fd30::2"
PORT, UNCHANGED = 8000, ("127.0.0.1", 8000)
_SO_COOKIE = 57  # include/uapi/asm-generic/socket.h
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@pytest.fixture
def host() -> Iterator[Namespace]:
    """A namespace with a route to the targets, where nothing answers.  The test is in it."""
    with Namespace("host") as made:
        made.ip("link", "add", "br0", "type", "veth", "peer", "name", "end")
        made.ip("address", "add", f"{HOST4}/24", "dev", "br0")
        made.ip("address", "add", "fd30::1/64", "dev", "br0", "nodad")
        made.ip("link", "set", "br0", "up")
        made.ip("link", "set", "end", "up")
        with made.entered():
            yield made


@pytest.fixture
def holder() -> Iterator[Holder]:
    made = Holder()
    yield made
    made.stop()


@pytest.fixture
def redirect(host: Namespace, holder: Holder) -> Iterator[Redirect]:
    with closing(Redirect(holder)) as made:
        assert made.unavailable == ""
        yield made


def entries(protocol: str, address: str, first: int, last: int, to: str = BOX4) -> dict[PortBlock, Target]:
    """Host ports that lead to the same ports of a container."""
    return {block: Target(to, block.first) for block in blocks(protocol, address, first, last)}


def aim(address: str, port: int, protocol: str = "tcp") -> tuple[str, int]:
    """Return the address and port that a new client sends to."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, KINDS[protocol]) as client:
        client.setblocking(False)
        if client.connect_ex((address, port)) == 0 or protocol == "udp":
            return actual_peer(client)
        with closing(client):
            return _aim_of_connecting(client, address, port)


def _aim_of_connecting(client: socket.socket, address: str, port: int) -> tuple[str, int]:
    """A connection to loopback that was refused is not in the kernel's table any longer."""
    try:
        return actual_peer(client)
    except (ConnectionResetError, IndexError):
        return address, port


def recorded(redirect: Redirect, protocol: str) -> list[tuple[bytes, bytes]]:
    """The map's entries about redirected sockets."""
    assert redirect._map is not None
    return [*redirect._map.loaded.entries(f"requested_{protocol}", keys.FLOW_BYTES, keys.PEER_BYTES)]


def cookie_of(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def links(holder: Holder) -> set[int]:
    """The IDs of the links that the holder has."""
    return {libbpf.fdinfo(fd, "link_id") for fd in holder.fds["redirect"]}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("at", "requested", "to"),
    [("0.0.0.0", "127.0.0.1", BOX4), ("127.0.0.5", "127.0.0.5", BOX4), ("::", "::1", BOX6), ("::1", "::1", BOX6)],
)
def test_ports_of_an_entry_are_redirected_and_no_others(
    redirect: Redirect, protocol: str, at: str, requested: str, to: str
) -> None:
    redirect.add({block: Target(to, block.first - 7000) for block in blocks(protocol, at, 8001, 8006)})
    aims = {port: aim(requested, port, protocol) for port in range(8000, 8008)}
    assert aims == {port: (to, port - 7000) if 8001 <= port <= 8006 else (requested, port) for port in aims}


def test_entries_are_what_was_added_and_not_removed(redirect: Redirect) -> None:
    one, other = entries("tcp", "::", 8000, 8010, BOX6), entries("udp", "127.0.0.1", 9000, 9000)
    redirect.add(one)
    redirect.add(other)
    assert redirect.entries() == one | other
    for _ in range(2):
        redirect.remove(one)
    assert redirect.entries() == other
    assert aim("::1", 8000) == ("::1", 8000)
    assert aim("127.0.0.1", 9000, "udp") == (BOX4, 9000)


def test_an_entry_can_be_changed(redirect: Redirect) -> None:
    (block,) = blocks("tcp", "0.0.0.0", PORT, PORT)
    for target in (Target(BOX4, 80), Target("172.30.0.3", 81)):
        redirect.add({block: target})
        assert aim("127.0.0.1", PORT) == (target.address, target.port)
    redirect.remove([block])
    assert (redirect.entries(), aim("127.0.0.1", PORT)) == ({}, UNCHANGED)


@pytest.mark.parametrize("failing", range(3))
def test_a_failed_add_leaves_what_was_there(host: Namespace, holder: Holder, calls: Calls, failing: int) -> None:
    with closing(Redirect(holder)) as redirect:
        before = entries("tcp", "0.0.0.0", 8008, 8009) | entries("tcp", "0.0.0.0", 9000, 9000)
        redirect.add(before)
        calls.failing_update = failing
        with pytest.raises(HostRefused, match="cannot add an entry to the eBPF map targets: No space left on device"):
            redirect.add(entries("tcp", "0.0.0.0", 8000, 8010, "172.30.0.3"))
        assert redirect.entries() == before
        aims = {port: aim("127.0.0.1", port) for port in (8000, 8008, 8010, 9000)}
        assert aims == {8000: UNCHANGED, 8008: (BOX4, 8008), 8010: ("127.0.0.1", 8010), 9000: (BOX4, 9000)}


def test_lookup_and_count_are_what_the_kernel_has(redirect: Redirect) -> None:
    added = {block: Target(BOX4, block.first - 7920) for block in blocks("udp", "0.0.0.0", 8000, 8010)}
    redirect.add(added)
    for port in (8003, 8003, 8009):
        aim("127.0.0.1", port, "udp")
    assert redirect.lookup("udp", "0.0.0.0", 8003) == Target(BOX4, 83, 2)
    assert redirect.lookup("udp", "0.0.0.0", 8009) == Target(BOX4, 89, 1)
    assert redirect.lookup("udp", "0.0.0.0", 8011) is None
    assert redirect.lookup("tcp", "0.0.0.0", 8003) is None
    assert redirect.count(added) == 3
    assert redirect.count(blocks("udp", "0.0.0.0", 9000, 9010)) == 0


def test_a_successor_takes_over_entries_and_counts(redirect: Redirect, holder: Holder) -> None:
    added = entries("tcp", "0.0.0.0", 8000, 8010)
    redirect.add(added)
    aim("127.0.0.1", PORT)
    before = links(holder)
    redirect.close()
    assert aim("127.0.0.1", PORT) == (BOX4, PORT), "the holder keeps it attached"
    with closing(Redirect(holder)) as successor:
        assert (successor.entries(), successor.count(added)) == (added, 2)
        wait_until(lambda: not any(map(link_exists, before)), "the end of the former links")
        successor.remove(added)
        assert aim("127.0.0.1", PORT) == UNCHANGED, "the counts were taken over, too"


def test_without_a_holder_it_ends_with_the_daemon(redirect: Redirect, holder: Holder) -> None:
    redirect.add(entries("tcp", "0.0.0.0", PORT, PORT))
    before = links(holder)
    holder.stop()
    redirect.close()
    wait_until(lambda: not any(map(link_exists, before)), "the end of the links")
    assert aim("127.0.0.1", PORT) == UNCHANGED


def test_a_disabled_redirect_ends_the_former_one(redirect: Redirect, holder: Holder) -> None:
    redirect.add(entries("tcp", "0.0.0.0", PORT, PORT))
    before = links(holder)
    redirect.close()
    with closing(Redirect(holder, enabled=False)) as disabled:
        assert (disabled.unavailable, holder.fds["redirect"]) == (DISABLED, [])
    wait_until(lambda: not any(map(link_exists, before)), "the end of the links")
    assert aim("127.0.0.1", PORT) == UNCHANGED


def test_an_unavailable_redirect_says_why(host: Namespace, holder: Holder, calls: Calls) -> None:
    calls.rejects_programs = True
    with closing(Redirect(holder, host_addresses=True)) as redirect:
        reason = "this kernel rejects the programs of redirect.bpf.o: Invalid argument"
        assert (redirect.unavailable, holder.fds["redirect"]) == (reason, [])
        with pytest.raises(Unsupported, match=f"redirect is unavailable: {reason}"):
            redirect.add(entries("tcp", "0.0.0.0", PORT, PORT))
        redirect.remove(entries("tcp", "0.0.0.0", PORT, PORT))
        redirect.set_own_addresses(lambda: pytest.fail("called"))
        redirect.reattach()
        assert (redirect.entries(), redirect.is_attached()) == ({}, True)
        assert (redirect.lookup("tcp", "0.0.0.0", PORT), redirect.count(blocks("tcp", "::", 1, 9))) == (None, 0)


def test_a_detached_redirect_is_reattached(redirect: Redirect, holder: Holder) -> None:
    added = entries("tcp", "0.0.0.0", PORT, PORT)
    redirect.add(added)
    before = links(holder)
    redirect.reattach()
    assert links(holder) == before, "it was attached"
    detach_link(min(before))
    assert not redirect.is_attached()
    redirect.reattach()
    assert redirect.is_attached()
    assert not links(holder) & before
    assert (redirect.entries(), aim("127.0.0.1", PORT)) == (added, (BOX4, PORT))


def test_a_redirect_that_cannot_be_reattached_is_unavailable(host: Namespace, holder: Holder, calls: Calls) -> None:
    with closing(Redirect(holder)) as redirect:
        redirect.add(entries("tcp", "0.0.0.0", PORT, PORT))
        detach_link(min(links(holder)))
        calls.rejects_programs = True
        with pytest.raises(Unsupported, match="rejects the programs"):
            redirect.reattach()
        assert redirect.unavailable.startswith("this kernel rejects the programs")
        assert (redirect.is_attached(), redirect.entries(), holder.fds["redirect"]) == (True, {}, [])
        redirect.reattach()


def test_own_addresses_are_redirected_where_the_firewall_does_not_serve_them(host: Namespace, holder: Holder) -> None:
    addresses = ["127.0.0.1", HOST4, "::1", "fe80::5%br0", "fd30::1"]
    with closing(Redirect(holder, host_addresses=True)) as redirect:
        redirect.add(entries("udp", "0.0.0.0", PORT, PORT) | entries("udp", "::", PORT, PORT, BOX6))
        assert aim(HOST4, PORT, "udp") == (HOST4, PORT)
        redirect.set_own_addresses(lambda: addresses)
        assert aim(HOST4, PORT, "udp") == (BOX4, PORT)
        assert aim("fd30::1", PORT, "udp") == (BOX6, PORT)
        assert aim("172.30.0.9", PORT, "udp") == ("172.30.0.9", PORT)
        addresses.pop()
        redirect.set_own_addresses(lambda: addresses)
        assert aim("fd30::1", PORT, "udp") == ("fd30::1", PORT)
        detach_link(min(links(holder)))
        redirect.reattach()
        redirect.set_own_addresses(lambda: addresses)
        assert aim(HOST4, PORT, "udp") == (BOX4, PORT)


def test_own_addresses_are_not_listed_where_they_are_not_redirected(redirect: Redirect) -> None:
    redirect.set_own_addresses(lambda: pytest.fail("called"))


def test_auto_bound_ports_are_not_redirected(host: Namespace, holder: Holder) -> None:
    """Also after it was reattached: steering uses its map."""
    host.sysctl("net.ipv4.ip_local_port_range", f"{PORT} {PORT + 1}")
    with ExitStack() as stack:
        redirect = stack.enter_context(closing(Redirect(holder)))
        steering = stack.enter_context(closing(Steering(holder, lambda: redirect.auto_bound_fd)))
        redirect.add(entries("udp", "0.0.0.0", PORT, PORT + 1))
        steering.reserve("udp", "0.0.0.0", PORT, PORT + 1)
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.bind(("127.0.0.1", 0))
        port = client.getsockname()[1]
        host.sysctl("net.ipv4.ip_local_port_range", "40000 50000")  # for the clients that ask below
        for _ in range(2):
            assert aim("127.0.0.1", port, "udp") == ("127.0.0.1", port)
            detach_link(min(links(holder)))
            redirect.reattach()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_closed_sockets_are_forgotten(redirect: Redirect, protocol: str, address: str) -> None:
    """Else the connections of a day would displace a long-lived one, which would then survive unpublish."""
    redirect.add(entries(protocol, "0.0.0.0", PORT, PORT) | entries(protocol, "::", PORT, PORT, BOX6))
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, KINDS[protocol]) as client:
        client.setblocking(False)
        client.connect_ex((address, PORT))
        assert len(recorded(redirect, protocol)) == 1
    assert not recorded(redirect, protocol)


def test_sockets_become_stale_when_their_entry_leads_elsewhere(redirect: Redirect) -> None:
    for protocol in ("tcp", "udp"):
        redirect.add(entries(protocol, "0.0.0.0", PORT, PORT + 9) | entries(protocol, "::1", PORT, PORT, BOX6))
    with ExitStack() as stack:
        cookies = {}
        for protocol, kind in KINDS.items():
            for address, port in (("127.0.0.1", PORT), ("127.0.0.1", PORT + 5), ("::1", PORT)):
                client = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind))
                client.setblocking(False)
                client.connect_ex((address, port))
                cookies[protocol, address, port] = cookie_of(client)
        assert redirect.take_stale() == []
        redirect.add(entries("tcp", "0.0.0.0", PORT, PORT + 9))  # again
        assert redirect.take_stale() == []
        redirect.add(entries("tcp", "0.0.0.0", PORT + 4, PORT + 5, "172.30.0.3"))
        redirect.remove(entries("udp", "::1", PORT, PORT))
        stale = redirect.take_stale()
        assert {(one.protocol, *one.requested): one.cookie for one in stale} == {
            key: cookie for key, cookie in cookies.items() if key[1:] == ("127.0.0.1", PORT + 5) and key[0] == "tcp"
        } | {("udp", "::1", PORT): cookies["udp", "::1", PORT]}
        assert {one.to for one in stale} == {(BOX4, PORT + 5), (BOX6, PORT)}
        assert redirect.take_stale() == []


def test_descriptors_are_closed(host: Namespace, holder: Holder) -> None:
    with closing(Redirect(holder)):
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with closing(Redirect(holder)) as redirect:
            redirect.reattach()
    assert len(os.listdir("/proc/self/fd")) == before
