"""The daemon's end of the control connection, with real relay processes."""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gangway.errors import HostRefused
from gangway.peers import peer_credentials
from gangway.relay import connection, protocol
from gangway.relay.client import RelayClient
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from gangway.relay.settings import Settings
from lab.processes import suspend
from lab.waiting import wait_until
from tests.unit.relay_doubles import close_all, fd_count, inodes, new_fds, new_socket, no_descriptors_left

SETTINGS = Settings(workers=1, log="/dev/null")
RANGE = Serve(HostPorts("tcp", "192.0.2.5", 8000, 8010), Destination("172.30.0.2", 80), Mode.SHARED)
OTHER = RANGE._replace(ports=HostPorts("udp", "::", 53, 53))
OWN = Serve(HostPorts("tcp", "127.0.0.1", 80, 80), Destination("127.0.0.1", 8000), Mode.OWN)
NOBODY = 65534


class Relays:
    """The relays behind a control socket, one after the other, and the clients that start them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clients: list[RelayClient] = []
        self._processes: list[subprocess.Popen[bytes]] = []

    def client(self, settings: Settings = SETTINGS) -> RelayClient:
        """Return a client that has not connected yet."""
        self._clients.append(RelayClient(self.path, settings))
        return self._clients[-1]

    def start(self, patch: str, settings: Settings = SETTINGS) -> "subprocess.Popen[bytes]":
        """Start a relay that differs by a statement."""
        main = f"import sys; {patch}; from gangway.relay.__main__ import main; sys.exit(main())"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.bind(str(self.path))
            process = subprocess.Popen(
                [sys.executable, "-c", main, json.dumps(settings._asdict())],
                stdin=control.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        self._processes.append(process)
        assert process.stdout is not None
        with process.stdout as status:
            assert status.read() == b"0\n"
        return process

    def pid(self) -> int:
        """Return the relay's pid; 0 if none runs."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                sock.connect(str(self.path))
            except OSError:
                return 0
            return peer_credentials(sock).pid

    def kill(self) -> None:
        """Kill the relay, and wait until it has exited; its parent has yet to reap it."""
        pid = self.pid()
        assert pid != os.getpid()
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        self.kill()
        for process in self._processes:
            process.wait(5)
        for client in self._clients:
            client.is_running()  # reaps it
            client.close()


@pytest.fixture
def relays(tmp_path: Path) -> Iterator[Relays]:
    made = Relays(tmp_path / "relay")
    yield made
    made.close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relays]:
    """A relay that serves the tests that leave it as it was."""
    made = Relays(tmp_path_factory.mktemp("relay") / "relay")
    first = made.client()
    first.serve(RANGE)
    first.remove(RANGE.ports)
    yield made
    made.close()


@pytest.fixture
def client(lasting: Relays) -> Iterator[RelayClient]:
    """A daemon's client, connected to the lasting relay."""
    gc.collect()  # nothing that an earlier test has left is closed meanwhile
    before = fd_count()
    made = RelayClient(lasting.path, SETTINGS)
    assert made.connect()
    yield made
    for port in made.served():
        made.remove(port.ports)
    made.hold("one", ())
    made.close()
    assert fd_count() == before


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with new_socket() as made:
        yield made


@pytest.fixture
def fds() -> Iterator[list[int]]:
    made = new_fds(3)
    yield made
    close_all(made)


def held(client: RelayClient, name: str) -> list[int]:
    """Return the inodes of what the relay holds."""
    fds = client.held(name)
    found = inodes(fds)
    close_all(fds)
    return found


def test_served_ports_are_as_they_were_handed_over(client: RelayClient, sock: socket.socket) -> None:
    leased = OWN._replace(mode=Mode.LEASED, ports=OWN.ports._replace(first=81, last=81))
    pidfd = os.pidfd_open(os.getpid())
    client.serve(RANGE)
    client.serve(OWN, [sock.fileno()])
    client.serve(leased, [sock.fileno(), pidfd])
    os.close(pidfd)
    assert client.served() == [RANGE, OWN, leased]
    client.remove(OWN.ports)
    client.remove(OWN.ports)
    assert client.served() == [RANGE, leased]


def test_port_is_served_until_it_is_removed(client: RelayClient) -> None:
    with new_socket() as backend:
        sock = new_socket()
        at = sock.getsockname()
        client.serve(OWN._replace(to=Destination(*backend.getsockname())), [sock.fileno()])
        sock.close()
        with socket.create_connection(at, 5) as connection, backend.accept()[0] as accepted:
            accepted.sendall(b"hello")
            assert connection.recv(5) == b"hello"
            client.remove(OWN.ports)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        socket.create_server(at).close()


def test_ports_of_a_relay_that_has_just_exited_are_removed(relays: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    client = relays.client(SETTINGS)
    client.serve(RANGE)
    relays.kill()
    monkeypatch.setattr(client, "is_running", lambda: True)  # its end is seen when it is asked
    client.remove(RANGE.ports)


@pytest.mark.parametrize("count", [0, protocol.PAGE, protocol.PAGE + 1])
def test_all_pages_are_read(client: RelayClient, count: int) -> None:
    ports = [RANGE._replace(ports=HostPorts("sctp", "::1", port, port)) for port in range(1, count + 1)]
    for port in ports:
        client.serve(port)
    assert client.served() == ports


@pytest.mark.parametrize(
    ("port", "reason"),
    [
        (RANGE, "'serve tcp 192.0.2.5 8000 8010 .*is served already"),
        (OWN, "wrong number of descriptors"),
        (RANGE._replace(to=Destination("172.30.0.2", 65535)), "malformed message"),
    ],
)
def test_refusal_is_passed_on(client: RelayClient, port: Serve, reason: str) -> None:
    client.serve(RANGE)
    with pytest.raises(HostRefused, match=f"the relay refused .*{reason}"):
        client.serve(port)
    is_closed = reason == "malformed message"  # the relay closes the connection after its answer
    wait_until(lambda: client.is_running() is not is_closed, "the relay to close the connection")
    assert client.connect()
    assert client.served() == [RANGE]


def test_next_daemon_finds_ports_and_descriptors(lasting: Relays, client: RelayClient, fds: list[int]) -> None:
    client.serve(RANGE)
    client.hold("one", fds)
    client.close()
    successor = lasting.client()
    assert (successor.served(), successor.held("one"), successor.fileno()) == ([], [], None), "not connected yet"
    assert successor.connect()
    assert (successor.served(), held(successor, "one"), held(successor, "other")) == ([RANGE], inodes(fds), [])
    successor.close()
    assert client.connect()


def test_descriptors_are_not_returned_in_part(client: RelayClient, fds: list[int]) -> None:
    client.hold("one", fds)
    for spare in range(3):
        with no_descriptors_left(spare), pytest.raises(HostRefused, match="out of file descriptors"):
            client.held("one")
    assert held(client, "one") == inodes(fds)


def test_shared_sockets_are_counted(lasting: Relays, client: RelayClient, sock: socket.socket, fds: list[int]) -> None:
    assert client.shared_count() == 0
    os.truncate(fds[0], os.sysconf("SC_PAGESIZE"))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
        client.share("udp", 6, [udp.fileno(), fds[0]])
        assert client.shared_count() == 1
        with pytest.raises(HostRefused, match="the relay refused 'share udp 4'"):
            client.share("udp", 4, [udp.fileno(), fds[1]])
    for _ in range(2):
        client.share("tcp", 4, [sock.fileno()])
    successor = lasting.client()
    assert successor.shared_count() == 0, "not connected yet"
    assert successor.connect()
    assert (client.shared_count(), successor.shared_count()) == (2, 2)
    successor.close()


def test_threads_get_their_own_answers(client: RelayClient, fds: list[int]) -> None:
    client.serve(RANGE)
    client.hold("one", fds)
    with ThreadPoolExecutor(2) as threads:
        served = threads.submit(lambda: [client.served() for _ in range(200)])
        found = threads.submit(lambda: [held(client, "one") for _ in range(200)])
        assert served.result() == [[RANGE]] * 200
        assert found.result() == [inodes(fds)] * 200


# Relays that start and exit.


def test_relay_starts_with_the_first_port(relays: Relays, fds: list[int]) -> None:
    client = relays.client()
    assert (client.is_running(), client.fileno(), client.served(), client.shared_count()) == (True, None, [], 0)
    client.remove(RANGE.ports)
    client.hold("one", fds)
    with pytest.raises(HostRefused, match="the relay is not running"):
        client.share("tcp", 4, fds[:1])
    assert (client.connect(), relays.path.exists()) == (False, False)
    client.serve(RANGE)
    pid = relays.pid()
    assert (client.is_running(), client.served(), held(client, "one")) == (True, [RANGE], inodes(fds))
    assert relays.path.stat().st_mode & 0o777 == 0o600
    assert os.stat(f"/proc/{pid}").st_uid == (NOBODY if os.geteuid() == 0 else os.geteuid())
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {os.devnull}


def test_killed_relay_is_replaced(relays: Relays, fds: list[int]) -> None:
    client = relays.client()
    client.serve(RANGE)
    client.hold("one", fds[:1])
    client.hold("other", fds[1:])
    hangup = select.poll()
    hangup.register(client.fileno() or -1, select.POLLRDHUP)
    relays.kill()
    assert hangup.poll(5000)
    with pytest.raises(HostRefused, match="the relay exited"):
        client.served()
    assert (client.is_running(), client.fileno(), client.served(), client.held("one")) == (False, None, [], [])
    client.remove(RANGE.ports)
    client.serve(OTHER)
    assert (client.is_running(), client.served()) == (True, [OTHER])
    assert (held(client, "one"), held(client, "other")) == (inodes(fds[:1]), inodes(fds[1:]))


def test_exit_is_noticed_without_a_request(relays: Relays, fds: list[int]) -> None:
    client = relays.client()
    client.serve(RANGE)
    client.hold("one", fds)
    relays.kill()
    with pytest.raises(HostRefused, match="the relay exited"):
        client.hold("one", fds[:1])
    client.serve(RANGE)
    relays.kill()
    assert (client.is_running(), client.fileno()) == (False, None)
    client.serve(RANGE)
    assert held(client, "one") == inodes(fds[:1]), "what was to be held last"


def test_stopped_relay_is_not_missed(relays: Relays) -> None:
    client = relays.client()
    client.serve(RANGE)
    client.remove(RANGE.ports)
    pid = relays.pid()
    client.stop()
    assert (client.is_running(), client.fileno(), relays.path.exists()) == (True, None, False)
    os.kill(pid, signal.SIGTERM)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    client.serve(RANGE)
    assert relays.pid() != pid


def test_unused_relay_exits(relays: Relays) -> None:
    process = relays.start("from gangway.relay import __main__ as process; process.LINGER_S = 0.1")
    client = relays.client()
    if client.connect():  # or it has exited already
        client.serve(RANGE)
        client.close()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert client.connect()
        client.remove(RANGE.ports)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        client.close()
    assert process.wait(5) == 0


def test_relay_that_is_too_old_is_named(relays: Relays) -> None:
    """Those of version 1 of the protocol refuse a daemon of another version."""
    refuse = "lambda _: (_ for _ in ()).throw(protocol.ProtocolError('this is version 1'))"
    process = relays.start(f"from gangway.relay import protocol; protocol._WITH_NUMBER['hello'] = {refuse}")
    client = relays.client()
    pid = process.pid
    reason = rf"the running relay \(pid {pid}\) is too old .*: .*version 1; kill {pid} replaces it, and ends its connec"
    for call in (client.connect, lambda: client.serve(RANGE)):
        with pytest.raises(HostRefused, match=reason):
            call()
        assert (client.fileno(), process.poll()) == (None, None)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(5)
    client.serve(RANGE)
    assert client.served() == [RANGE]


def test_relay_that_exits_during_connect_is_not_running(relays: Relays) -> None:
    client = relays.client()
    with ThreadPoolExecutor(1) as thread:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(relays.path))
            listener.listen()
            connected = thread.submit(client.connect)
            assert select.select([listener], [], [], 5)[0]
        assert connected.result() is False
    client.serve(RANGE)


def test_relay_that_hangs_at_its_start_is_killed(relays: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is on a file system that does not answer, for example; the other ports do not wait for one each."""
    monkeypatch.setattr(connection, "TIMEOUT_S", 0.3)
    program = relays.path.with_name("hangs")
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    client = relays.client(SETTINGS)
    with pytest.raises(HostRefused, match=r"the relay failed to start: no status within 0\.3 s"):
        client.serve(RANGE)
    assert client._process is not None
    assert (client._process.returncode, relays.pid(), client.fileno()) == (-signal.SIGKILL, 0, None)
    monkeypatch.undo()
    with pytest.raises(HostRefused, match=r"no status within .* s; it is started again in some seconds"):
        client.serve(RANGE)
    monkeypatch.setattr(client, "_hung_until_s", 0.0)
    client.serve(RANGE)


def test_reason_of_a_failed_start_is_named(relays: Relays) -> None:
    client = relays.client(SETTINGS._replace(log="/nowhere/log"))
    with pytest.raises(HostRefused, match=r"the relay failed to start: .*No such file or directory: '/nowhere/log'"):
        client.serve(RANGE)
    with pytest.raises(HostRefused, match=r"the relay failed to start: .*No such file"):
        RelayClient(Path("/nowhere/relay"), SETTINGS).serve(RANGE)


def test_relay_that_does_not_answer_is_killed(relays: Relays, monkeypatch: pytest.MonkeyPatch) -> None:
    starter = relays.client()
    starter.serve(RANGE)
    monkeypatch.setattr(connection, "TIMEOUT_S", 0.1)
    client = relays.client()
    assert client.connect()
    suspend(relays.pid())
    with pytest.raises(HostRefused, match=r"the relay did not answer within 0\.1 s, and was killed"):
        client.served()
    assert (client.is_running(), client.fileno(), client.exits) == (False, None, 1)
    assert client.last_exit is not None
    assert client.last_exit.reason == "killed: no answer within 0.1 s"
    monkeypatch.undo()
    client.serve(OTHER)
    assert [port.ports for port in client.served()] == [OTHER.ports]


def test_unexpected_error_is_logged(relays: Relays, tmp_path: Path) -> None:
    log = tmp_path / "log"
    patch = "from gangway.relay.core.loop import Loop; Loop.run = lambda loop: 1 / 0"
    assert relays.start(patch, SETTINGS._replace(log=str(log))).wait(5) == 1
    assert "internal error: ZeroDivisionError('division by zero') in " in log.read_text()
    assert log.read_text().endswith(": the relay exits, and its connections end\n")
