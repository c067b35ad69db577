"""The daemon's connection to one relay: requests, answers, and the descriptors that come with both."""

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from gangway.errors import HostRefused
from gangway.peers import peer_credentials
from gangway.relay import protocol
from gangway.relay.protocol import Count, Exclude, Hello, List, ProtocolError

TIMEOUT_S = 10.0
"""How long a relay may take to start, and to answer."""

_Item = TypeVar("_Item")


class RelayFailed(HostRefused):
    """The connection is of no use any more."""


class RelayExited(RelayFailed):
    """The relay closed the connection, or was killed because it did not answer."""


class RelayHung(RelayExited):
    """It did not answer, and was killed: it serves nobody, either."""


class Connection:
    """A connection to the relay that listens at `path`.  OSError: none does."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(TIMEOUT_S)
        try:
            self._sock.connect(str(path))
            self.pid = peer_credentials(self._sock).pid
        except OSError:
            self._sock.close()
            raise
        self.version = 0  # of the protocol; 0: not known yet
        self.release = ""  # of gangway

    def greet(self) -> None:
        """Learn the relay's versions.  HostRefused: it does not say them to a daemon of another version."""
        version, _, self.release = self.ask(Hello(protocol.VERSION))[0].partition(" ")
        self.version = int(version) if version.isdecimal() else 0

    def ask(self, request: protocol.Request, fds: Sequence[int] = ()) -> tuple[str, list[int]]:
        """Send a request; return the answer's text and descriptors.  HostRefused: refused, or RelayFailed."""
        received: list[int] = []
        try:
            socket.send_fds(self._sock, [protocol.encode(request)], fds)
            answer, received, flags, _address = socket.recv_fds(
                self._sock, protocol.MAX_ANSWER_BYTES, protocol.MAX_DESCRIPTORS
            )
            if not answer:
                raise ConnectionResetError
            done, text = protocol.parse_answer(answer)
        except (OSError, ProtocolError) as error:
            close_all(received)
            self.close()
            raise self._failure(error) from None
        if done and not flags & socket.MSG_CTRUNC:
            return text, received
        close_all(received)
        if done:
            raise HostRefused("out of file descriptors: not all that the relay holds arrived")
        raise HostRefused(f"the relay refused {protocol.encode(request).decode()!r}: {text}")

    @contextmanager
    def lent(self, request: protocol.Request) -> Iterator[list[int]]:
        """Ask for descriptors, which are closed at the end of the block."""
        fds = self.ask(request)[1]
        try:
            yield fds
        finally:
            close_all(fds)

    def pages(self, request: type[List | Count], parse: Callable[[str], _Item]) -> list[_Item]:
        """Ask for lines about all ports, and parse each."""
        found: list[_Item] = []
        while lines := self.ask(request(len(found)))[0].splitlines():
            try:
                found += map(parse, lines)
            except ProtocolError as error:
                raise HostRefused(f"the relay failed: {error}") from None
        return found

    def exclude(self, addresses: Sequence[str]) -> None:
        """Have it serve nobody at these addresses by sockets at all addresses."""
        for offset in range(0, len(addresses) or 1, protocol.EXCLUDED_PAGE):
            self.ask(Exclude(offset, tuple(addresses[offset : offset + protocol.EXCLUDED_PAGE])))

    def is_open(self) -> bool:
        """True unless the relay has exited: between answers, only that makes the connection readable."""
        return self._sock.fileno() >= 0 and not is_readable(self._sock, 0)

    def fileno(self) -> int:
        """Return the descriptor, which hangs up when the relay exits; -1: it is closed."""
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def _failure(self, error: Exception) -> RelayFailed:
        if isinstance(error, TimeoutError):
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
            return RelayHung(f"the relay did not answer within {TIMEOUT_S:g} s, and was killed")
        if isinstance(error, ConnectionError):
            return RelayExited("the relay exited")
        return RelayFailed(f"the relay failed: {error}")


def is_readable(file: socket.socket | IO[bytes], timeout_s: float) -> bool:
    """True if a file can be read, or its other end is closed, within a time."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
