"""A relay that replaces one of another version, with real relay processes."""

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import product

import pytest

from gangway import __version__
from gangway.errors import HostRefused
from gangway.relay import protocol, replacement
from gangway.relay.client import RelayClient
from gangway.relay.connection import Connection
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from gangway.relay.replacement import Leader, decide, is_due, unwanted
from lab.waiting import wait_until
from tests.unit.relay_doubles import close_all, inodes, new_fds, new_socket
from tests.unit.test_relay_client import SETTINGS, Relays, held, relays

__all__ = ["relays"]

OTHER_RELEASE = "import gangway; gangway.__version__ = '0.0.1'"
OTHER_PROTOCOL = "from gangway.relay import protocol; protocol.VERSION = 3"
EACH_VERSION = pytest.mark.parametrize(
    "site", [OTHER_RELEASE, OTHER_PROTOCOL], ids=["release", "protocol"], indirect=True
)


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(100):
            self.request.sendall(data)


class Site:
    """An older relay that serves a port, what it leads to, and daemons' clients one after the other."""

    def __init__(self, relays: Relays, stack: ExitStack, old: str) -> None:
        self._relays, self.differs_by = relays, old
        server = stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo))
        server.daemon_threads = True
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        self.old = relays.start(old)
        self.said: list[str] = []
        own = stack.enter_context(new_socket())
        self.at = own.getsockname()
        self.port = Serve(HostPorts("tcp", "127.0.0.1", 80, 80), Destination(*server.server_address), Mode.OWN)
        giver = Connection(relays.path)
        giver.greet()
        giver.ask(self.port, [own.fileno()])
        own.close()
        giver.close()

    def client(self, limit_s: int = 3600) -> RelayClient:
        """Return a daemon's client that has connected."""
        made = self._relays.client(SETTINGS._replace(drain_timeout_s=limit_s))
        made._report = self.said.append
        made.connect()
        return made

    def connection(self) -> socket.socket:
        """Return a connection that was answered."""
        made = socket.create_connection(self.at, 5)
        assert is_answered(made)
        return made

    def wait_until_accepted_by(self, client: RelayClient) -> None:
        """Wait until the client's relay, and no other, accepts connections: threads leave a socket one by one."""

        def is_accepting_alone() -> bool:
            before = client.counted()[self.port.ports].connections
            for _ in range(8):
                self.connection().close()
            return client.counted()[self.port.ports].connections == before + 8

        wait_until(is_accepting_alone, "the other relay to retire")


def is_answered(connection: socket.socket) -> bool:
    connection.sendall(b"hello")
    return connection.recv(100) == b"hello"


def kill(relay: Connection) -> None:
    """Kill a relay, and wait for its end."""
    os.kill(relay.pid, signal.SIGKILL)
    wait_until(lambda: not relay.is_open(), "its end")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def site(relays: Relays, stack: ExitStack, request: pytest.FixtureRequest) -> Iterator[Site]:
    """The older relay differs by its release, or as the parameter says."""
    yield Site(relays, stack, getattr(request, "param", OTHER_RELEASE))
    for path in relays.path.parent.glob(f"{relays.path.name}*"):
        with suppress(OSError):
            left = Connection(path)
            kill(left)
            left.close()


# Decisions


@pytest.mark.parametrize(
    ("version", "release", "due"),
    [
        (protocol.VERSION, __version__, False),
        (protocol.VERSION + 1, __version__, True),
        (protocol.VERSION - 1, __version__, True),
        (protocol.VERSION, "0.0.1", True),
        (protocol.VERSION, "", True),
    ],
)
def test_relay_of_another_version_is_due(version: int, release: str, due: bool) -> None:
    assert is_due(version, release) is due


@pytest.mark.parametrize(("complete", "old", "new"), [*product([True, False], repeat=3)])
def test_a_relay_that_lives_serves(complete: bool, old: bool, new: bool) -> None:
    leader = decide(complete, old, new)
    assert {Leader.OLD: old, Leader.NEW: new, Leader.NONE: not old and not new}[leader]
    if old and new:
        assert (leader is Leader.NEW) is complete


def test_replaced_relay_keeps_what_is_wanted() -> None:
    to = Destination("172.30.0.2", 80)
    wanted, former, leased, ended = (
        Serve(HostPorts("tcp", "127.0.0.1", number, number), to, mode)
        for number, mode in enumerate([Mode.OWN, Mode.SHARED, Mode.LEASED, Mode.ENDED], start=80)
    )
    assert unwanted([wanted, former, leased, ended], {wanted.ports}) == [former.ports, ended.ports]


# Replacement


@EACH_VERSION
def test_replacement_refuses_nobody(site: Site) -> None:
    failures: list[Exception] = []
    is_over = threading.Event()

    def connect_again_and_again() -> None:
        while not is_over.is_set():
            try:
                site.connection().close()
            except (OSError, AssertionError) as error:
                failures.append(error)

    with site.connection() as lasting:
        load = threading.Thread(target=connect_again_and_again)
        load.start()
        client = site.client()
        is_over.set()
        load.join()
        assert failures == []
        site.wait_until_accepted_by(client)
        assert is_answered(lasting)
        with pytest.raises(subprocess.TimeoutExpired):
            site.old.wait(1.5)
    assert site.old.wait(5) == 0
    (text,) = site.said
    assert f"(pid {site.old.pid}) replaced by {__version__} (pid {client.pid}) after " in text


@EACH_VERSION
def test_replacement_has_all_that_the_former_one_had(site: Site, relays: Relays, stack: ExitStack) -> None:
    fds = [*new_fds(3), os.pidfd_open(os.getpid())]
    stack.callback(close_all, fds)
    sock = stack.enter_context(new_socket())
    leased = site.port._replace(ports=HostPorts("tcp", "127.0.0.1", 81, 81), mode=Mode.LEASED)
    many = Serve(HostPorts("udp", "192.0.2.5", 8000, 8010), Destination("172.30.0.2", 80), Mode.SHARED, ("10.0.0.0/8",))
    excluded = [f"192.0.2.{number}" for number in range(protocol.EXCLUDED_PAGE + 1)]
    giver = Connection(relays.path)
    giver.greet()
    giver.ask(leased, [sock.fileno(), fds[3]])
    giver.ask(many)
    giver.ask(protocol.Hold("one", 3), fds[:3])
    giver.ask(protocol.Share("tcp", 4), [sock.fileno()])
    giver.exclude(excluded)
    giver.close()

    client = site.client()
    assert client.pid != site.old.pid
    assert client.release == __version__
    assert client.served() == [site.port, leased, many]
    assert held(client, "one") == inodes(fds[:3])
    assert client.shared_count() == 1
    assert client._ask(protocol.ListExcluded())[0].split() == excluded
    assert site.old.wait(5) == 0


def test_datagrams_are_answered_before_and_after(site: Site, relays: Relays, stack: ExitStack) -> None:
    own, server, client = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3))
    for sock in (own, server):
        sock.bind(("127.0.0.1", 0))
    for sock in (server, client):
        sock.settimeout(5)
    client.connect(own.getsockname())
    port = Serve(HostPorts("udp", "127.0.0.1", 80, 80), Destination(*server.getsockname()), Mode.OWN)
    giver = Connection(relays.path)
    giver.greet()
    giver.ask(port, [own.fileno()])
    giver.close()
    own.close()

    client.send(b"question")
    before = server.recvfrom(100)[1]
    site.client()
    server.sendto(b"answer", before)
    assert client.recv(100) == b"answer"
    client.send(b"another")
    data, after = server.recvfrom(100)
    assert (data, after[1] != before[1]) == (b"another", True), "the new relay has no client yet"
    server.sendto(b"its answer", after)
    assert client.recv(100) == b"its answer"


def test_connections_of_a_replaced_relay_end_after_the_limit(site: Site) -> None:
    with site.connection() as lasting:
        site.client(limit_s=1)
        assert site.old.wait(5) == 0
        with suppress(ConnectionResetError):
            assert lasting.recv(1) == b""


@pytest.mark.parametrize("is_next_daemon", [False, True])
def test_connections_of_a_replaced_relay_end_with_their_port(site: Site, is_next_daemon: bool) -> None:
    with site.connection() as lasting:
        client = site.client()
        if is_next_daemon:
            client.close()
            client = site.client()
        client.remove(site.port.ports)
        with pytest.raises(ConnectionResetError):
            lasting.recv(1)
        socket.create_server(site.at).close()
    assert site.old.wait(5) == 0


def test_ports_that_were_removed_meanwhile_are_free(site: Site, relays: Relays) -> None:
    """A daemon was killed before it had told the replaced relay, too."""
    with site.connection():
        site.client().close()
        leader = Connection(relays.path)
        leader.greet()
        leader.ask(protocol.Remove(site.port.ports))
        leader.close()
        site.client().prune(())
        socket.create_server(site.at).close()


@pytest.mark.parametrize("is_next_daemon", [False, True])
def test_connections_of_a_replaced_relay_outlive_the_new_one(site: Site, relays: Relays, is_next_daemon: bool) -> None:
    with site.connection() as lasting:
        client = site.client()
        relays.kill()
        if is_next_daemon:
            client.close()
            client = site.client()
        client.start()
        assert client.served() == []
        client.prune({site.port.ports})
        with client.former_socket(site.port.ports) or new_socket() as sock:
            client.serve(site.port, [sock.fileno()])
        site.wait_until_accepted_by(client)
        assert is_answered(lasting)


# Failures


@EACH_VERSION
def test_relay_goes_on_if_none_can_be_started(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    if site.differs_by == OTHER_PROTOCOL:
        with pytest.raises(HostRefused, match=r"is of another version, and could not be replaced: the relay failed to"):
            site.client()
    else:
        assert site.client().pid == site.old.pid
        assert "is used, because it could not be replaced: the relay failed to start" in site.said[0]
    site.connection().close()
    monkeypatch.undo()
    client = site.client()
    assert client.release == __version__
    site.wait_until_accepted_by(client)


@pytest.mark.parametrize("who", ["old", "new", "both"])
def test_relay_that_dies_meanwhile_leaves_the_other(site: Site, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_and_die(old: Connection, new: Connection) -> None:
        copy(old, new)
        for one in {"old": [old], "new": [new], "both": [old, new]}[who]:
            kill(one)
        raise HostRefused("the relay exited")

    copy = replacement._copy
    monkeypatch.setattr(replacement, "_copy", copy_and_die)
    client = site.client()
    if who == "both":
        assert client.pid is None
        assert "exited while it was replaced" in site.said[0]
    else:
        assert (client.pid == site.old.pid) is (who == "new")
        site.wait_until_accepted_by(client)


_KILLED = """
import os, sys
from pathlib import Path
from gangway.relay.client import RelayClient
from gangway.relay.connection import Connection
from gangway.relay.settings import Settings

def counted(call, name_of):
    def instead(self, *given):
        global left
        left -= name_of(*given) == name
        if left == 0:
            os._exit(9)
        return call(self, *given)
    return instead

path, name, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
Connection.ask = counted(Connection.ask, lambda request, *_: type(request).__name__)
Path.rename = counted(Path.rename, lambda _to: "rename")
RelayClient(Path(path), Settings(workers=1, log="/dev/null")).connect()
"""


@pytest.mark.parametrize(
    ("name", "number"), [("Serve", 1), ("GetShared", 1), ("rename", 1), ("rename", 2), ("Retire", 1)]
)
def test_next_daemon_settles_what_a_killed_one_began(site: Site, relays: Relays, name: str, number: int) -> None:
    """The daemon is killed before the `number`-th operation of that name."""
    with site.connection() as lasting:
        done = subprocess.run([sys.executable, "-c", _KILLED, str(relays.path), name, str(number)], check=False)
        assert done.returncode == 9
        with site.connection() as meanwhile:
            client = site.client()
            assert client.release == __version__
            assert client.served() == [site.port]
            site.wait_until_accepted_by(client)
            assert is_answered(lasting)
            assert is_answered(meanwhile)
    assert site.old.wait(5) == 0
