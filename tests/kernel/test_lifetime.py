"""The end of the daemon, its relay, or a container: what continues without it, and what ends with it."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial

import pytest

from gangway.reconcile.state import link_name
from lab.gangwayd import Gangway
from lab.netns import Namespace, end, ip
from lab.waiting import wait_until
from tests.kernel.crossings import arrives, client_of, listening
from tests.kernel.load import Client, under_load
from tests.kernel.snapshot import snapshot, wait_until_restored
from tests.kernel.street import HOST4, HOST6, Box, Street

pytestmark = pytest.mark.any_kernel


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street("--firewall", request.param) as made:
        yield made


def clients(street: Street, port: int) -> Iterator[Client]:
    """Yield a client on each road and of each protocol."""
    for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4), (street.neighbour, HOST6)):
        for protocol in ("tcp", "udp"):
            yield Client(space, protocol, address, port)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_restarting_the_daemon_fails_no_client(street: Street, how: str) -> None:
    gangway = street.gangway
    with ExitStack() as stack:
        port = stack.enter_context(street.published(street.server, "8080:80/tcp", "8080:80/udp"))
        at = stack.enter_context(listening(street.near, "tcp", [81]))[81]
        stack.enter_context(street.published(street.near, "8081:81/tcp"))
        pairs = []
        for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4)):
            client = stack.enter_context(closing(client_of(space, "tcp", address, 8081)))
            pairs.append((client, stack.enter_context(closing(at.accept()[0]))))
        relays, listed, before = gangway.relays(), _listed(gangway), snapshot(street.host)
        with under_load(clients(street, port)) as load:
            for _ in range(2):
                gangway.kill() if how == "killed" else gangway.stop()
                load.wait_for_answers()
                gangway.start()
        assert set(relays) <= set(gangway.relays())
        assert _listed(gangway) == listed
        wait_until_restored(street.host, before)
        for client, served in pairs:
            served.sendall(b"still here")
            assert client.recv(100) == b"still here"


def _listed(gangway: Gangway) -> list[dict[str, object]]:
    """Return what is published, without how often it was used."""
    return [{**mapping, "redirected": None, "relayed": None} for mapping in gangway.json("ls")]


def test_ports_of_a_container_that_exited_are_free(street: Street) -> None:
    exited = street.container("exited", "web")
    street.publish(exited, "8080:80/tcp", "8080:80/udp", "9000-9010:9000-9010")
    exited.space.close()
    wait_until(lambda: all(mapping["container"] != exited.name for mapping in street.gangway.json("ls")), "its end", 5)
    assert "exited: its ports are unpublished" in street.gangway.log.read_text()
    with street.published(street.server, "8080:80/tcp", "8080:80/udp", "9000-9010:9000-9010"):
        assert street.reaches(street.neighbour, "tcp", HOST4, 8080)
    with street.host.entered(), closing(socket.create_server(("", 8080))):
        pass  # a program of the host can bind it, too


def test_ports_of_a_container_that_exited_can_be_published_before_the_daemon_was_notified(street: Street) -> None:
    exited = street.container("exited", "web")
    street.publish(exited, "8080:80/tcp")
    exited.space.close()
    wait_until(lambda: link_name(exited.name) not in street.host.ip("link"), "the end of its link", 5)
    with street.published(street.server, "8080:80/tcp"):
        assert street.reaches(street.neighbour, "tcp", HOST4, 8080)


def test_a_network_whose_last_container_exited_can_be_removed_before_the_daemon_was_notified(street: Street) -> None:
    street.gangway("network", "create", "brief", "--subnet", "172.28.0.0/24")
    with Namespace("brief") as space:
        street.gangway("attach", space.name, "--network", "brief")
    wait_until(lambda: link_name(space.name) not in street.host.ip("link"), "the end of its link", 5)
    street.gangway("network", "rm", "brief")


def test_the_next_daemon_notices_that_a_container_exited(street: Street) -> None:
    exited = street.container("exited", "web")
    street.publish(exited, "8088:80/tcp")
    street.gangway.kill()
    exited.space.close()
    street.gangway.start()
    assert street.gangway.json("ls") == []
    with street.published(street.server, "8088:80/tcp"):
        assert street.reaches(street.host, "tcp", "127.0.0.1", 8088)


def test_a_namespace_recreated_under_the_same_name_can_be_attached_at_once(street: Street) -> None:
    space = Namespace("again")
    with space:
        for _ in range(5):
            addresses = street.gangway("attach", space.name, "--network", "web").split()
            assert street.gangway.json("ls", space.name) == []
            street.publish(Box(space, *addresses), "8087:80")
            ip("netns", "delete", space.name)
            ip("netns", "add", space.name)
        addresses = street.gangway("attach", space.name, "--network", "web").split()
        again = Box(space, *addresses)
        with listening(again, "tcp", [80]) as at, street.published(again, "8087:80"):
            assert arrives(street.host, "tcp", "127.0.0.1", 8087, at[80])
            assert arrives(street.neighbour, "tcp", HOST4, 8087, at[80])


def test_a_process_is_a_container_until_it_exits(street: Street) -> None:
    process = street.host.popen("unshare", "--net", "sleep", "60")
    own = os.stat(street.host.path).st_ino
    wait_until(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino not in (own, _here()), "its namespace")
    street.gangway("attach", f"pid:{process.pid}", "--network", "web")
    street.gangway("publish", f"pid:{process.pid}", "-p", "8089:80")
    end(process)
    wait_until(lambda: street.gangway.json("ls") == [], "its end", 5)


def _here() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def test_a_killed_relay_is_restarted_at_once(street: Street) -> None:
    with street.published(street.server, "8080:80/tcp", "8080:80/udp") as port:
        before, logged = street.gangway.relays(), len(street.gangway.log.read_text())
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4)):
            for protocol in ("tcp", "udp"):
                wait_until(partial(street.reaches, space, protocol, address, port), "the relay", 5)
        wait_until(street.gangway.relays, "another relay", 5)
        assert not set(before) & set(street.gangway.relays())
        # A daemon knows the signal of a relay that it has started itself.
        said = r"relay exited( \(signal 9\))?: restarted, 2 ports served again after "
        wait_until(
            lambda: len(re.findall(said, street.gangway.log.read_text()[logged:])) == 1, "the line in the log", 5
        )


def test_the_next_daemon_restarts_a_relay_that_was_killed(street: Street) -> None:
    with street.published(street.server, "8080:80/tcp") as port:
        street.gangway.kill()
        for pid in street.gangway.relays():
            os.kill(pid, signal.SIGKILL)
        street.gangway.start()
        assert street.reaches(street.host, "tcp", "127.0.0.1", port)


def test_ports_are_published_and_unpublished_though_the_relay_was_killed(street: Street) -> None:
    with street.published(street.server, "8080:80/tcp", "8081:80/udp"):
        _kill_relay(street)
        with street.published(street.near, "8082:80/tcp") as port:
            assert street.reaches(street.host, "tcp", "127.0.0.1", port)
        _kill_relay(street)
    assert street.gangway.json("ls") == []


def _kill_relay(street: Street) -> None:
    before = set(street.gangway.relays())
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not before & set(street.gangway.relays()), "its end")
