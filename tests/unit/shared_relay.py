"""A relay whose ports share sockets, in the test's own process.

No traffic is steered here: a socket bound to one port replaces the one to which the kernel steers many.
"""

import gc
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from gangway.host import sockets
from gangway.log import Log
from gangway.relay.core.loop import Loop
from gangway.relay.core.serving import Core, Port, open_icmp
from gangway.relay.protocol import canonical
from gangway.relay.settings import Settings
from gangway.relay.sockets import Backend, PublishedRange

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_SO_COOKIE = 57

_Result = TypeVar("_Result")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class SharedRelay:
    """A relay's shared sockets, in this process.  All sockets are closed at the end."""

    def __init__(self, stack: ExitStack, **settings: Any) -> None:
        self._stack = stack
        self.clock = Clock()
        self.loop = Loop(self.clock)
        self.log_lines: list[str] = []
        log = Log(lambda event: self.log_lines.append(event.text), self.clock)
        self.core = Core(self.loop, Settings(workers=1)._replace(**settings), log, open_icmp())
        self.binding_fd = os.memfd_create("binding")
        stack.callback(os.close, self.binding_fd)
        os.truncate(self.binding_fd, os.sysconf("SC_PAGESIZE"))

    def turn(self) -> None:
        """Run one round without waiting."""
        self.loop.call_soon(lambda _events: None, 0)
        self.loop.turn()

    def wait_for(self, get: Callable[[], _Result]) -> _Result:
        """Run rounds until a non-blocking call succeeds; return its result."""
        while True:
            try:
                return get()
            except BlockingIOError:
                self.turn()
                time.sleep(0.001)  # clients are served by threads

    def bound(self, protocol: int, address: str, port: int = 0) -> socket.socket:
        """Return a bound, non-blocking socket; for TCP it listens."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM if protocol == UDP else socket.SOCK_STREAM, protocol)
        self._stack.enter_context(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # before, the kernel might choose another one's port
        if protocol == TCP:
            sock.listen()
        sock.setblocking(False)
        return sock

    def use(self, sock: socket.socket) -> int:
        """Share a socket; return its port."""
        port = port_of(sock)
        self.core.share(sock.proto, sock.family, sock, self.binding_fd if sock.proto == UDP else None)
        return port

    def duplicate(self, sock: socket.socket) -> socket.socket:
        """Return a duplicate, as it comes with another message."""
        return self._stack.enter_context(sock.dup())

    def raw(self, family: int) -> socket.socket:
        """Return a raw socket, for a held port of a family: 4 or 6."""
        return self._stack.enter_context(sockets.open_raw(family))

    def publish(
        self, at: str, ports: tuple[int, int], to: socket.socket, shift: int = 0, raw: socket.socket | None = None
    ) -> Port:
        """Publish a range; clients of its first port + `shift` are connected to the socket `to`.

        `raw`: they are answered by this raw socket.
        """
        address, port = to.getsockname()[:2]
        family = socket.AF_INET6 if ":" in at else socket.AF_INET
        published = PublishedRange(to.proto, family, canonical(at), *ports)
        return self.core.publish_shared(published, Backend(to.proto, to.family, address, port - shift), raw)

    def publish_own(self, sock: socket.socket, to: socket.socket) -> Port:
        """Publish a port by its own socket; its clients are connected to the socket `to`."""
        return self.core.publish(Backend(to.proto, to.family, *to.getsockname()[:2]), sock)

    def client(self, address: str, port: int) -> socket.socket:
        """Return a TCP client, which the kernel connects before the relay accepts it."""
        sock = self._stack.enter_context(socket.create_connection((address, port), 5))
        sock.setblocking(False)
        return sock

    def accepted(self, server: socket.socket) -> socket.socket:
        """Wait for a connection to a backend, and accept it."""
        sock = self._stack.enter_context(self.wait_for(lambda: server.accept()[0]))
        sock.setblocking(False)
        return sock

    def receive(self, sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
        """Wait for a datagram; return it and its sender."""
        data, address = self.wait_for(lambda: sock.recvfrom(100))
        return data, address[:2]

    def closed(self, port: Port) -> None:
        """Unpublish a port, and wait for its end."""
        ended: list[bool] = []
        port.close(lambda: ended.append(True))
        while not ended:
            self.turn()
            time.sleep(0.001)

    def close(self) -> None:
        """Remove all flows and clients."""
        self.core.unshare()
        self.core.close()
        self.loop.close()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Allow this many new descriptors in the block: free numbers below the highest in use are taken meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] <= highest:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    first = taken.pop()
    os.close(first)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


@contextmanager
def running_relay(**settings: Any) -> Iterator[SharedRelay]:
    """Provide a relay with some settings of its own."""
    gc.collect()  # garbage of earlier tests must not free descriptors later, while a test limits them
    with ExitStack() as stack:
        made = SharedRelay(stack, **settings)
        yield made
        made.close()
