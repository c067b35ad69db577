"""Who ends, and what goes on: the daemon, its relay, a container; several daemons beside each other."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from gangway.reconcile.state import link_name
from lab import echo_server
from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace, end, ip
from lab.waiting import wait_until
from tests.kernel.crossings import arrives, client_of, listening
from tests.kernel.street import HOST4, HOST6, Box, Street

pytestmark = pytest.mark.any_kernel


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street("--firewall", request.param) as made:
        yield made


# As often as does not take the processor away from those who are to come again.
_PAUSE_S = 0.005


class Asker(threading.Thread):
    """A client that asks all the time, by a new connection each time."""

    def __init__(self, space: Namespace, protocol: str, address: str, port: int) -> None:
        super().__init__()
        self._where = space, protocol, address, port
        self._over = threading.Event()
        self.answers = 0
        self.failures: list[str] = []

    def run(self) -> None:
        space, *_ = self._where
        with space.entered():
            while not self._over.wait(_PAUSE_S):
                try:
                    echo_server.request_here(*self._where[1:], patience_s=5)
                    self.answers += 1
                except echo_server.NoAnswer as error:
                    self.failures.append(f"{self._where}: {error}")

    def more(self) -> None:
        """Waits until it was answered some more times."""
        before = self.answers
        wait_until(lambda: self.answers > before + 5 or self.failures, "more answers")

    def end(self) -> None:
        """It asks no more."""
        self._over.set()
        self.join()


@contextmanager
def asked_all_the_time(street: Street, port: int) -> Iterator[list[Asker]]:
    """Clients on each road that there is; none of them may ever be without an answer."""
    where = [(street.host, "127.0.0.1"), (street.neighbour, HOST4), (street.neighbour, HOST6)]
    askers = [Asker(space, protocol, address, port) for space, address in where for protocol in ("tcp", "udp")]
    for asker in askers:
        asker.start()
    try:
        yield askers
        for asker in askers:
            asker.more()
    finally:
        for asker in askers:
            asker.end()
    assert [failure for asker in askers for failure in asker.failures] == []


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_daemon_that_ends_and_comes_again_costs_no_connection(street: Street, how: str) -> None:
    gangway = street.gangway
    with ExitStack() as stack:
        port = stack.enter_context(street.published(street.server, "8080:80/tcp", "8080:80/udp"))
        at = stack.enter_context(listening(street.near, "tcp", [81]))[81]
        stack.enter_context(street.published(street.near, "8081:81/tcp"))
        pairs = []
        for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4)):
            client = stack.enter_context(closing(client_of(space, "tcp", address, 8081)))
            pairs.append((client, stack.enter_context(closing(at.accept()[0]))))
        relays, listed = gangway.relays(), _listed(gangway)
        with asked_all_the_time(street, port) as askers:
            for _ in range(2):
                gangway.kill() if how == "killed" else gangway.stop()
                for asker in askers:
                    asker.more()
                gangway.start()
        assert set(relays) <= set(gangway.relays())
        assert _listed(gangway) == listed
        for client, served in pairs:
            served.sendall(b"still here")
            assert client.recv(100) == b"still here"


def _listed(gangway: Gangway) -> list[dict[str, object]]:
    """What is published; how often it was used is another matter."""
    return [{**mapping, "redirected": None} for mapping in gangway.json("ls")]


def test_the_ports_of_a_container_that_is_gone_are_free(street: Street) -> None:
    gone = street.container("gone", "web")
    street.publish(gone, "8080:80/tcp", "8080:80/udp", "9000-9010:9000-9010")
    gone.space.close()
    wait_until(lambda: all(mapping["container"] != gone.name for mapping in street.gangway.json("ls")), "its end", 5)
    assert "exited: its ports are unpublished" in street.gangway.log.read_text()
    with street.published(street.server, "8080:80/tcp", "8080:80/udp", "9000-9010:9000-9010"):
        assert street.reaches(street.neighbour, "tcp", HOST4, 8080)
    with street.host.entered(), closing(socket.create_server(("", 8080))):
        pass  # a program of the host can have it, too


def test_what_a_container_had_that_is_gone_can_be_asked_for_before_anybody_has_looked(street: Street) -> None:
    gone = street.container("gone", "web")
    street.publish(gone, "8080:80/tcp")
    gone.space.close()
    wait_until(lambda: link_name(gone.name) not in street.host.ip("link"), "the end of its link", 5)
    with street.published(street.server, "8080:80/tcp"):
        assert street.reaches(street.neighbour, "tcp", HOST4, 8080)


def test_a_network_whose_last_container_is_gone_can_be_removed_before_anybody_has_looked(street: Street) -> None:
    street.gangway("network", "create", "brief", "--subnet", "172.28.0.0/24")
    with Namespace("brief") as space:
        street.gangway("attach", space.name, "--network", "brief")
    wait_until(lambda: link_name(space.name) not in street.host.ip("link"), "the end of its link", 5)
    street.gangway("network", "rm", "brief")


def test_a_container_that_went_while_there_was_no_daemon_is_noticed_by_the_next_one(street: Street) -> None:
    gone = street.container("gone", "web")
    street.publish(gone, "8088:80/tcp")
    street.gangway.kill()
    gone.space.close()
    street.gangway.start()
    assert street.gangway.json("ls") == []
    with street.published(street.server, "8088:80/tcp"):
        assert street.reaches(street.host, "tcp", "127.0.0.1", 8088)


def test_a_container_that_is_made_anew_at_once_can_be_attached_at_once(street: Street) -> None:
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


def test_a_process_is_a_container_until_it_ends(street: Street) -> None:
    process = street.host.popen("unshare", "--net", "sleep", "60")
    own = os.stat(street.host.path).st_ino
    wait_until(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino not in (own, _here()), "its namespace")
    street.gangway("attach", f"pid:{process.pid}", "--network", "web")
    street.gangway("publish", f"pid:{process.pid}", "-p", "8089:80")
    end(process)
    wait_until(lambda: street.gangway.json("ls") == [], "its end", 5)


def _here() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def test_several_daemons_live_in_namespaces_of_their_own() -> None:
    with Street() as one, Street() as other:
        ports = [street.publish(street.server, "8080:80") for street in (one, other)]
        assert ports[0] == ports[1]
        for street in (one, other):
            assert street.reaches(street.host, "tcp", "127.0.0.1", 8080)
            assert street.reaches(street.neighbour, "tcp", HOST4, 8080)
        one.gangway("unpublish", one.server.name)
        assert not one.reaches(one.neighbour, "tcp", HOST4, 8080)
        assert other.reaches(other.neighbour, "tcp", HOST4, 8080)


def test_a_second_daemon_in_a_namespace_is_refused(street: Street, tmp_path: Path) -> None:
    done = street.host.run(str(GANGWAY), "daemon", "--socket", str(tmp_path / "sock"), check=False, timeout=10)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "another gangway daemon" in done.stderr
    assert list(tmp_path.iterdir()) == []
    with street.published(street.server, "8080:80"):
        assert street.reaches(street.host, "tcp", HOST4, 8080)


def test_a_second_daemon_at_a_socket_is_refused(street: Street) -> None:
    with Namespace("else") as elsewhere:
        words = str(GANGWAY), "daemon", "--socket", str(street.gangway.socket)
        done = elsewhere.run(*words, check=False, timeout=10)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(street.gangway.socket) in done.stderr
    assert street.gangway.json("network", "ls")


def test_a_relay_that_is_killed_is_back_at_once(street: Street) -> None:
    with street.published(street.server, "8080:80/tcp", "8080:80/udp") as port:
        before = street.gangway.relays()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4)):
            for protocol in ("tcp", "udp"):
                wait_until(partial(street.reaches, space, protocol, address, port), "the relay", 5)
        wait_until(street.gangway.relays, "another relay", 5)
        assert not set(before) & set(street.gangway.relays())


def test_a_relay_that_is_killed_while_there_is_no_daemon_comes_with_the_next_one(street: Street) -> None:
    with street.published(street.server, "8080:80/tcp") as port:
        street.gangway.kill()
        for pid in street.gangway.relays():
            os.kill(pid, signal.SIGKILL)
        street.gangway.start()
        assert street.reaches(street.host, "tcp", "127.0.0.1", port)


def test_ports_are_published_and_withdrawn_though_the_relay_has_died(street: Street) -> None:
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
