"""A relay in this process: its real event loop, control socket and ports; only the serving of clients is a double."""

import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import pytest

from gangway.log import Log
from gangway.relay import protocol, sockets
from gangway.relay.control import Control
from gangway.relay.core.loop import Loop
from gangway.relay.ports import ServedPorts
from gangway.relay.protocol import GetHeld, Hello, List, Request, Serve
from gangway.relay.sockets import Backend, PublishedRange


class PublishedPort:
    """A port that is served by a socket of its own."""

    def __init__(self, backend: Backend, sock: socket.socket) -> None:
        self.backend = backend
        self.sock = sock

    def close(self) -> None:
        self.sock.close()


class SharedRange:
    """Ports that are served by a shared socket."""

    def __init__(self, ports: PublishedRange, backend: Backend, raw: socket.socket | None) -> None:
        self.ports = ports
        self.backend = backend
        self.raw = [] if raw is None else [raw]
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True
        for sock in self.raw:
            sock.close()


class SharedSockets:
    """The shared sockets."""

    def __init__(self, server: "Server") -> None:
        self._server = server
        self.socks: dict[tuple[int, int], socket.socket] = {}
        self.bindings: dict[int, int] = {}
        """For each family, the inode of the map that came with the socket."""

    def __len__(self) -> int:
        return len(self.socks)

    def use(self, protocol: int, family: int, sock: socket.socket, binding_fd: int | None) -> None:
        self._server.fail()
        former = self.socks.pop((protocol, family), None)
        if former is not None:
            former.close()
        self.socks[protocol, family] = sock
        if binding_fd is not None:
            self.bindings[family] = os.fstat(binding_fd).st_ino

    def close(self) -> None:
        for sock in self.socks.values():
            sock.close()
        self.socks.clear()

    def publish(self, ports: PublishedRange, backend: Backend, raw: socket.socket | None = None) -> SharedRange:
        self._server.fail()
        self._server.ranges.append(SharedRange(ports, backend, raw))
        return self._server.ranges[-1]


class Server:
    """Records what it is to serve."""

    def __init__(self) -> None:
        self.ports: list[PublishedPort] = []
        self.ranges: list[SharedRange] = []
        self.shared = SharedSockets(self)
        self.failure: Exception | None = None
        """Raised by whatever is called next."""
        self.has_connections = False
        """Withdrawn ports still have connections: `end_connections` ends them."""
        self._withdrawn: list[Callable[[], None]] = []
        self.excluded: list[str] = []
        self.log_files: list[int] = []
        """The inodes of the log files that were to be used."""

    def publish(self, backend: Backend, sock: socket.socket) -> PublishedPort:
        self.fail()
        self.ports.append(PublishedPort(backend, sock))
        return self.ports[-1]

    def exclude(self, addresses: Sequence[str]) -> None:
        self.excluded = list(addresses)

    def use_log(self, fd: int) -> None:
        self.log_files.append(os.fstat(fd).st_ino)

    def withdraw(self, port: sockets.PublishedPort, then: Callable[[], None]) -> None:
        port.close()
        self._withdrawn.append(then)
        if not self.has_connections:
            self.end_connections()

    def end_connections(self) -> None:
        withdrawn, self._withdrawn = self._withdrawn, []
        for then in withdrawn:
            then()

    def fail(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def open_sockets(self) -> list[int]:
        """The descriptors of the sockets that are in use."""
        socks = [port.sock for port in self.ports] + list(self.shared.socks.values())
        return [sock.fileno() for sock in socks if sock.fileno() >= 0]

    def close(self) -> None:
        for port in self.ports:
            port.close()
        for sock in self.shared.socks.values():
            sock.close()


class Daemon:
    """A daemon's connection to the relay."""

    def __init__(self, relay: "Relay") -> None:
        self._relay = relay
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(relay.address)
        self.sock.setblocking(False)
        relay.turn()

    def ask(self, request: Request, *fds: int) -> str:
        """Send a request with copies of descriptors; return the answer."""
        return self.send(protocol.encode(request), *fds)

    def send(self, message: bytes, *fds: int) -> str:
        """Send a message with copies of descriptors; return the answer, "" if there is none now."""
        socket.send_fds(self.sock, [message], fds)
        self._relay.turn()
        return self.receive()

    def receive(self) -> str:
        """Return the next answer, "" if there is none."""
        with suppress(BlockingIOError):
            return self.sock.recv(protocol.MAX_ANSWER_BYTES).decode()
        return ""

    def held(self, name: str) -> list[int]:
        """Return the inodes of what is held under a name."""
        self.sock.send(protocol.encode(GetHeld(name)))
        self._relay.turn()
        answer, fds, _, _ = socket.recv_fds(self.sock, 100, protocol.MAX_DESCRIPTORS)
        assert answer == b"ok"
        found = inodes(fds)
        close_all(fds)
        return found

    def served(self) -> list[Serve]:
        """Return the first page of the served ports."""
        return list(map(protocol.parse_served, self.ask(List(0)).removeprefix("ok").splitlines()))

    def is_connected(self) -> bool:
        """True if the relay has not closed the connection."""
        with suppress(BlockingIOError):
            return self.sock.recv(1, socket.MSG_PEEK) != b""
        return True

    def close(self) -> None:
        """Disconnect."""
        self.sock.close()
        self._relay.turn()


class Relay:
    """The relay.  Close it at the end: every descriptor that is left then is closed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """What was logged."""
        self.emptied = self.disconnected = 0
        """How often these were called."""
        self.server = Server()
        self._stack = ExitStack()
        self.now_s = 1000.0
        """What its clock shows."""
        self.loop = Loop(lambda: self.now_s)
        self._stack.callback(self.loop.close)
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind("")  # Linux chooses an address (unix(7), autobind)
        self.address = listener.getsockname()
        self.listener = listener
        listener.listen()
        log = Log(lambda _level, line: self.lines.append(line), lambda: self.now_s)
        self.control = Control(self.loop, listener, log, self._on_disconnected)
        self.ports = ServedPorts(self.loop, self.server, log, self.control.is_connected, self._on_emptied)
        self.control.ports = self.ports
        self._stack.callback(self._close_descriptors)
        self._stack.callback(self.server.close)

    def connect(self) -> Daemon:
        """Connect without sending anything."""
        daemon = Daemon(self)
        self._stack.callback(daemon.close)
        return daemon

    def daemon(self) -> Daemon:
        """Return a connected daemon."""
        daemon = self.connect()
        assert daemon.ask(Hello(protocol.VERSION)) == f"ok {protocol.VERSION}"
        return daemon

    def turn(self) -> None:
        """Handle what has happened, and whatever that makes happen at once."""
        for _ in range(2):
            self.loop.call_soon(lambda _events: None, 0)
            self.loop.turn()

    def close(self) -> None:
        """Disconnect all daemons, and close all descriptors."""
        self._stack.close()

    def _close_descriptors(self) -> None:
        """Close what a relay keeps open until it exits."""
        owners = [port.owner for port in self.ports._ports.values() if port.owner is not None]
        for fd in (*owners, *(fd for fds in self.ports._held.values() for fd in fds)):
            os.close(fd)
        if self.control._spare is not None:
            self.control._spare.close()

    def _on_emptied(self) -> None:
        self.emptied += 1

    def _on_disconnected(self) -> None:
        self.disconnected += 1


class Launcher:
    """A launcher's process, and its pidfd."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["sleep", "60"])
        self.pidfd = os.pidfd_open(self._process.pid)

    def exit(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.exit()
        os.close(self.pidfd)


def new_socket() -> socket.socket:
    """Return a listening TCP socket."""
    return socket.create_server(("127.0.0.1", 0))


def new_fds(count: int) -> list[int]:
    """Return descriptors of different files, none a socket."""
    return [os.memfd_create(f"file {number}") for number in range(count)]


def inodes(fds: Sequence[int]) -> list[int]:
    """Return what identifies the files of descriptors."""
    return [os.fstat(fd).st_ino for fd in fds]


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def fd_count() -> int:
    """Return how many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_descriptors_left(spare: int = 0) -> Iterator[None]:
    """Limit the number of further descriptors of this process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = new_fds(1 + spare)
    close_all(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(lowest), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def relay() -> Iterator[Relay]:
    """A relay, which leaves no descriptor open."""
    before = fd_count()
    made = Relay()
    yield made
    made.close()
    assert fd_count() == before
