"""A relay in this process: its real event loop, control socket and ports; only the serving of clients is a double."""

import gc
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import pytest

from gangway import __version__
from gangway.log import Log
from gangway.relay import protocol
from gangway.relay.control import Control
from gangway.relay.core.loop import Loop
from gangway.relay.ports import ServedPorts
from gangway.relay.protocol import GetHeld, Hello, List, Request, Serve
from gangway.relay.sockets import Backend, Counters, PublishedRange


class PublishedPort:
    """A port that is served by a socket of its own, or ports that are served by a shared socket."""

    def __init__(
        self, server: "Server", backend: Backend, *socks: socket.socket, at: PublishedRange | None = None
    ) -> None:
        self.backend, self.at = backend, at
        self.socks = list(socks)
        self.is_closed = self.is_left = False
        self.counted = Counters()
        self._server = server

    def counters(self) -> Counters:
        return self.counted

    @property
    def fd(self) -> int | None:
        return self.socks[0].fileno() if self.socks else None

    def leave(self) -> None:
        self.is_left = True

    def close(self, then: Callable[[], None]) -> None:
        self.is_closed = True
        for sock in self.socks:
            sock.close()
        self._server.withdrawn.append(then)
        if not self._server.has_connections:
            self._server.end_connections()


class Server:
    """Records what it is to serve."""

    def __init__(self) -> None:
        self.ports: list[PublishedPort] = []
        self.ranges: list[PublishedPort] = []
        self.socks: dict[tuple[int, int], socket.socket] = {}
        """The shared sockets, by protocol and family."""
        self.bindings: dict[int, int] = {}
        """For each family, the inode of the map that came with the socket."""
        self.failure: Exception | None = None
        """Raised by whatever is called next."""
        self.has_connections = False
        """Withdrawn ports still have connections: `end_connections` ends them."""
        self.withdrawn: list[Callable[[], None]] = []
        self.excluded: list[str] = []
        self.is_left = False

    @property
    def shared_count(self) -> int:
        return len(self.socks)

    def publish(self, backend: Backend, sock: socket.socket) -> PublishedPort:
        self.fail()
        self.ports.append(PublishedPort(self, backend, sock))
        return self.ports[-1]

    def publish_shared(
        self, ports: PublishedRange, backend: Backend, raw: socket.socket | None = None
    ) -> PublishedPort:
        self.fail()
        self.ranges.append(PublishedPort(self, backend, *([] if raw is None else [raw]), at=ports))
        return self.ranges[-1]

    def share(self, protocol: int, family: int, sock: socket.socket, binding: int | None = None) -> None:
        self.fail()
        former = self.socks.pop((protocol, family), None)
        if former is not None:
            former.close()
        self.socks[protocol, family] = sock
        if binding is not None:
            self.bindings[family] = os.fstat(binding).st_ino

    def unshare(self) -> None:
        for sock in self.socks.values():
            sock.close()
        self.socks.clear()

    def shared(self, protocol: int, family: int) -> list[int]:
        sock = self.socks.get((protocol, family))
        return [] if sock is None else [sock.fileno()]

    def leave(self) -> None:
        self.is_left = True

    def exclude(self, addresses: Sequence[str]) -> None:
        self.excluded = list(addresses)

    def end_connections(self) -> None:
        withdrawn, self.withdrawn = self.withdrawn, []
        for then in withdrawn:
            then()

    def fail(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def open_sockets(self) -> list[int]:
        """The descriptors of the sockets that are in use."""
        socks = [sock for port in self.ports for sock in port.socks] + list(self.socks.values())
        return [sock.fileno() for sock in socks if sock.fileno() >= 0]

    def close(self) -> None:
        for port in self.ports:
            port.close(lambda: None)
        self.unshare()


class RecordingLog(Log):
    """A log that keeps the inodes of the files that it was to use."""

    def use(self, fd: int) -> None:
        self.files = [*getattr(self, "files", []), os.fstat(fd).st_ino]


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
        return self.given(GetHeld(name))

    def given(self, request: Request) -> list[int]:
        """Return the inodes of what a request is answered with."""
        self.sock.send(protocol.encode(request))
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
        self.limits_s: list[int] = []
        """How long connections may last since the relay has retired."""
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
        self.log = log = RecordingLog(lambda event: self.lines.append(event.text), lambda: self.now_s)
        self.control = Control(self.loop, listener, log, self._on_disconnected)
        self.ports = ServedPorts(
            self.loop, self.server, log, self.control.is_connected, self._on_emptied, self.limits_s.append
        )
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
        assert daemon.ask(Hello(protocol.VERSION)) == f"ok {protocol.VERSION} {__version__}"
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
    gc.collect()  # garbage of earlier tests must not close descriptors while this one counts them
    before = fd_count()
    made = Relay()
    yield made
    made.close()
    assert fd_count() == before
