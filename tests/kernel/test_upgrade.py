"""A daemon of another version: clients notice nothing on any road, and its own relay replaces the running one."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from gangway.cli.client import ask_running
from lab.gangwayd import GANGWAY
from lab.versions import installed
from lab.waiting import wait_until
from tests.kernel.crossings import client_of, listening
from tests.kernel.load import Client, under_load
from tests.kernel.street import HOST4, HOST6, Street, without_redirect

pytestmark = pytest.mark.any_kernel


@pytest.fixture(scope="module", params=["roads of rules and redirect", "relay only"])
def street(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    flags: tuple[str, ...] = ("--firewall", "nftables")
    if request.param == "relay only":
        flags = ("--firewall", "none", *without_redirect(tmp_path_factory.mktemp("settings")))
    with Street(*flags, "--log-format", "json") as made:
        yield made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("other"), "0.0.1")


def clients(street: Street, port: int) -> Iterator[Client]:
    for space, address in ((street.host, "127.0.0.1"), (street.host, "::1"), (street.neighbour, HOST4)):
        for protocol in ("tcp", "udp"):
            yield Client(space, protocol, address, port)
    yield Client(street.neighbour, "tcp", HOST6, port)


def exchange(client: socket.socket, served: socket.socket) -> None:
    """Send data both ways over a connection."""
    served.sendall(b"still here")
    assert client.recv(100) == b"still here"
    client.sendall(b"so am I")
    assert served.recv(100) == b"so am I"


def leader(street: Street) -> int:
    """Return the pid of the relay that accepts clients; 0 if there is none."""
    return ask_running(str(street.gangway.socket), "GET", "/status")["relay_pid"] or 0


def has_other_leader(street: Street, former: int) -> bool:
    return leader(street) not in (0, former)


def test_connections_of_a_replaced_relay_outlive_the_new_one(street: Street, other: Path) -> None:
    gangway = street.gangway
    with ExitStack() as stack:
        port = stack.enter_context(street.published(street.server, "8080:80/tcp", "8080:80/udp"))
        at = stack.enter_context(listening(street.four, "tcp", [81]))[81]
        stack.enter_context(street.published(street.four, "8081:81/tcp"))  # IPv6 clients of it are always relayed
        gangway.stop()
        gangway.program = other
        gangway.start()
        client = stack.enter_context(closing(client_of(street.neighbour, "tcp", HOST6, 8081)))
        served = stack.enter_context(closing(at.accept()[0]))
        assert served.recv(100)
        gangway.stop()
        gangway.program = GANGWAY
        gangway.start()
        for is_next_daemon in (False, True):
            pid = leader(street)
            if is_next_daemon:
                gangway.stop()
            os.kill(pid, signal.SIGKILL)
            if is_next_daemon:
                gangway.start()
            wait_until(partial(has_other_leader, street, pid), "another relay", 10)
            for protocol in ("tcp", "udp"):
                wait_until(partial(street.reaches, street.neighbour, protocol, HOST4, port), "an answer", 10)
            with closing(client_of(street.neighbour, "tcp", HOST6, 8081)):
                at.accept()[0].close()
            exchange(client, served)


def test_upgrade_and_downgrade_fail_no_client(street: Street, other: Path) -> None:
    gangway = street.gangway
    with ExitStack() as stack:
        port = stack.enter_context(street.published(street.server, "8080:80/tcp", "8080:80/udp"))
        stack.enter_context(street.published(street.four, "8090:80"))  # IPv6 clients of it are always relayed
        at = stack.enter_context(listening(street.near, "tcp", [81]))[81]
        stack.enter_context(street.published(street.near, "8081:81/tcp"))
        pairs = []
        for space, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4), (street.neighbour, HOST6)):
            client = stack.enter_context(closing(client_of(space, "tcp", address, 8081)))
            pairs.append((client, stack.enter_context(closing(at.accept()[0]))))
            assert pairs[-1][1].recv(100)
        relayed = Client(street.neighbour, "tcp", HOST6, 8090)
        for program, release in ((other, "0.0.1"), (GANGWAY, "")):
            before, logged = gangway.relays(), len(gangway.log.read_text())
            with under_load([*clients(street, port), relayed]) as load:
                load.wait_for_answers()
                gangway.stop()
                for pair in pairs:
                    exchange(*pair)
                gangway.program = program
                gangway.start()
                load.wait_for_answers()
            relayed = Client(street.neighbour, "tcp", HOST6, 8090)
            status = ask_running(str(gangway.socket), "GET", "/status")
            assert status["relay_version"] == status["version"]
            assert release in ("", status["version"])
            assert status["relay_pid"] not in before
            events = [json.loads(line) for line in gangway.log.read_text()[logged:].splitlines()]
            (replacement,) = (one for one in events if one["event"] == "relay-replacement")
            assert " replaced by " in replacement["message"]
            for pair in pairs:
                exchange(*pair)
    wait_until(lambda: gangway.relays() in ([], [status["relay_pid"]]), "the end of the relays that were replaced", 10)
