"""A relay process that is a thread of this one: it handles the daemon's messages, and serves no clients."""

import io
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from gangway.relay.kept import MOST_HELD, Kept, Published, Range

from gangway.relay.sockets import Backend

_MESSAGE_BYTES = 256


class Port:
    """A port with a socket of its own."""

    def __init__(self, backend: Backend, sock: socket.socket) -> None:
        self.backend = backend
        self.sock = sock

    def close(self) -> None:
        self.sock.close()


class Ports:
    """Ports that are served by a shared socket."""

    def __init__(self, ports: Range, backend: Backend) -> None:
        self.ports = ports
        self.backend = backend
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Pool:
    """The shared sockets, and the ports that they serve."""

    def __init__(self) -> None:
        self.socks: dict[tuple[int, int], socket.socket] = {}
        self.bindings: dict[int, int] = {}
        """The inode of the descriptor that came with the UDP socket of each family."""
        self.served: list[Ports] = []
        self.trouble: Exception | None = None

    def __len__(self) -> int:
        return len(self.socks)

    def use(self, protocol: int, family: int, sock: socket.socket, binding_fd: int | None) -> None:
        if self.trouble is not None:
            raise self.trouble
        former = self.socks.get((protocol, family))
        if former is not None:
            former.close()
        self.socks[protocol, family] = sock
        if binding_fd is not None:
            self.bindings[family] = os.fstat(binding_fd).st_ino

    def publish(self, ports: Range, backend: Backend) -> Ports:
        if self.trouble is not None:
            raise self.trouble
        self.served.append(Ports(ports, backend))
        return self.served[-1]

    def close(self) -> None:
        for sock in self.socks.values():
            sock.close()


class Process:
    """Stands for the subprocess.Popen of `python3 -m gangway.relay`; `end` ends it."""

    begun: "list[Process]"
    """All processes of a test."""

    def __init__(self, _command: Sequence[str], stdin: int, **_others: object) -> None:
        self.pool = Pool()
        self.ports: list[Port] = []
        self.stdout = io.BytesIO(b"0\n")
        self._kept = Kept(self._publish, self._withdraw, self.pool)
        self._listener = socket.socket(fileno=os.dup(stdin))
        self._daemon: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        Process.begun.append(self)

    def poll(self) -> None:
        """Do nothing: the process runs."""

    def end(self) -> None:
        """End the process, and close everything that it has."""
        for sock in (self._listener, self._daemon):
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self._kept.let_go()
        self.pool.close()
        for port in self.ports:
            port.close()

    def _serve(self) -> None:
        """Serve one daemon after the other."""
        with suppress(OSError):
            while True:
                self._daemon, _ = self._listener.accept()
                with self._daemon:
                    self._hear(self._daemon)

    def _hear(self, daemon: socket.socket) -> None:
        def answer(text: str, fds: Sequence[int]) -> None:
            socket.send_fds(daemon, [text.encode()], fds)

        while True:
            message, fds, _, _ = socket.recv_fds(daemon, _MESSAGE_BYTES, MOST_HELD)
            if not message:
                return
            self._kept.hear(message.decode(), fds, answer)

    def _publish(self, backend: Backend, sock: socket.socket) -> Port:
        self.ports.append(Port(backend, sock))
        return self.ports[-1]

    def _withdraw(self, port: Published, then: Callable[[], None]) -> None:
        port.close()
        then()
