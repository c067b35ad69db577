"""Steering while daemons and relays end and start, and what it leaves behind."""

import os
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from lab.netns import Namespace
from lab.processes import suspend
from lab.redirect import detach_link, link_exists
from lab.waiting import wait_until
from tests.kernel.crossings import listening
from tests.kernel.host_ports import PROTOCOLS, is_refused, relayed
from tests.kernel.load import Client, under_load
from tests.kernel.street import Street, without_redirect

pytestmark = pytest.mark.any_kernel

RANGES = ("9000-29999:9000-29999/tcp", "9000-29999:9000-29999/udp")
MOVED = ("8000-8099:80-179/tcp", "8000-8099:80-179/udp")


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    """Without the redirect: clients of 127.0.0.1 reach the relay."""
    with Street(*without_redirect(tmp_path_factory.mktemp("settings"))) as made:
        yield made


def links(street: Street) -> set[int]:
    """Return the IDs of all links that the daemon and its relay hold."""
    daemon = street.gangway.daemon
    there = [daemon.pid] if daemon is not None and daemon.poll() is None else []
    return {number for pid in [*there, *street.gangway.relays()] for number in _links_of(pid)}


def _links_of(pid: int) -> Iterable[int]:
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            yield from map(int, re.findall(r"^link_id:\s*(\d+)", info.read_text(), re.MULTILINE))


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_killing_the_daemon_under_load_fails_no_client(street: Street) -> None:
    with street.published(street.server, *MOVED) as port:
        clients = [Client(street.host, protocol, "127.0.0.1", port) for protocol in PROTOCOLS]
        with under_load(clients) as load:
            for _ in range(3):
                street.gangway.kill()
                load.wait_for_answers()
                assert is_refused(street.host, "tcp", "0.0.0.0", 8050)
                street.gangway.start()
                load.wait_for_answers()


def test_clients_wait_while_there_is_no_relay(street: Street) -> None:
    with listening(street.server, "tcp", [9123]) as at, street.published(street.server, *RANGES):
        for _ in range(2):
            _kill(street.gangway.relays())
            assert relayed(street, "tcp", 9123, at[9123])
            assert is_refused(street.host, "tcp", "0.0.0.0", 9123)


def test_published_ports_survive_daemon_and_relay(street: Street) -> None:
    """The next daemon starts from the database alone."""
    with ExitStack() as stack:
        served = {one: stack.enter_context(listening(street.server, one, [29999]))[29999] for one in PROTOCOLS}
        stack.enter_context(street.published(street.server, *RANGES))
        street.gangway.kill()
        _kill(street.gangway.relays())
        wait_until(lambda: not is_refused(street.host, "tcp", "0.0.0.0", 29999), "a free port")
        street.gangway.start()
        for protocol, at in served.items():
            assert relayed(street, protocol, 29999, at)
            assert is_refused(street.host, protocol, "0.0.0.0", 29999)


def test_a_range_with_a_port_in_use_is_served_when_that_is_free(street: Street) -> None:
    with street.published(street.server, "9100-9199:50-149"):
        street.gangway.kill()
        _kill(street.gangway.relays())
        wait_until(lambda: not is_refused(street.host, "tcp", "0.0.0.0", 9180), "a free port")
        with street.host.entered():
            theirs = socket.create_server(("0.0.0.0", 9180))
        with theirs:
            street.gangway.start()
            with street.host.entered(), socket.create_connection(("127.0.0.1", 9180), 3), theirs.accept()[0]:
                pass
            assert "9180/tcp is in use: choose another port, or stop" in street.gangway.log.read_text()
            assert not street.reaches(street.host, "tcp", "127.0.0.1", 9130)
        wait_until(lambda: street.reaches(street.host, "tcp", "127.0.0.1", 9130), "the range", 25)


def test_detached_links_are_attached_again(street: Street) -> None:
    with listening(street.server, "tcp", [9123]) as at, street.published(street.server, *RANGES):
        before = links(street)
        for link in before:
            detach_link(link)
        assert not is_refused(street.host, "tcp", "0.0.0.0", 9123)
        wait_until(lambda: is_refused(street.host, "tcp", "0.0.0.0", 9123), "steering", 25)
        assert relayed(street, "tcp", 9123, at[9123])
        wait_until(lambda: not before & links(street), "the end of the former links")


def test_no_link_is_left_when_the_daemon_stops(tmp_path: Path) -> None:
    with Street(*without_redirect(tmp_path)) as street:
        with street.published(street.server, *RANGES):
            ours = links(street)
            assert ours
        street.leave()
        street.gangway.stop()
        wait_until(lambda: not any(map(link_exists, ours)), "the end of its links")
        assert "192.0.0.8" not in street.host.run("ss", "-Hltun").stdout


def test_two_daemons_on_one_machine_do_not_interfere(street: Street) -> None:
    with Street() as other, street.published(street.server, *RANGES):
        assert not is_refused(other.host, "tcp", "0.0.0.0", 9123)
        with other.published(other.server, "9123:80"):
            assert is_refused(other.host, "tcp", "0.0.0.0", 9123)
        assert is_refused(street.host, "tcp", "0.0.0.0", 9123)


def test_waiting_clients_are_reset_when_their_range_is_unpublished(street: Street) -> None:
    """They wait in the queue of a socket that serves other ports, too."""
    with listening(street.server, "tcp", [8000]), street.published(street.server, "8000-8009:8000-8009"):
        street.publish(street.far, "7000:80")
        (relay,) = street.gangway.relays()
        suspend(relay)
        clients = [_connecting(street.host, 8001 + number) for number in range(3)]
        withdrawn = threading.Thread(target=street.gangway, args=("unpublish", street.server.name))
        withdrawn.start()
        os.kill(relay, signal.SIGCONT)
        withdrawn.join()
        for client in clients:
            with client, pytest.raises(ConnectionResetError):
                client.recv(1)
        assert street.reaches(street.host, "tcp", "127.0.0.1", 7000)
        street.publish(street.server, "8000-8009:8000-8009")
    street.gangway("unpublish", street.far.name)


def _connecting(space: Namespace, port: int) -> socket.socket:
    with space.entered():
        return socket.create_connection(("127.0.0.1", port), 5)
