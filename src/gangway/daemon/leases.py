"""The front for docker-proxy launchers: the socket where they take leases (relay/protocol.py).

A thread of its own serves it, so that a launcher is answered whatever else the daemon does.  Only launchers of the
user that the daemon runs as are accepted.
"""

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread

from gangway.daemon import audit
from gangway.errors import GangwayError, InvalidRequest
from gangway.limits import exhausted
from gangway.log import Log
from gangway.peers import peer_credentials
from gangway.relay import protocol
from gangway.relay.protocol import ProtocolError
from gangway.state.leases import Lease, Leases

_RETRY_S = 0.1  # after running out of descriptors
# Tracked connections of a new lease's clients are deleted after the last lease of a burst, or of a long burst's part.
_SETTLE_S, _SETTLE_AT_LEAST_S = 0.1, 1.0
# For an earlier daemon's leases: how often to look for launchers that have exited, and the time in which the other
# launchers, which try twice a second, have to take new leases.
_REAP_S, _CLAIM_S = 1.0, 30.0


class LeaseServer:
    """Serves launchers at a listening socket; `changed` is called after a lease was granted or has ended."""

    def __init__(self, listener: socket.socket, leases: Leases, log: Log, changed: Callable[[], object]) -> None:
        self._listener, self._leases, self._log, self._changed = listener, leases, log, changed
        self._epoll = select.epoll()
        self._wake, self._woken = os.pipe()
        self._connections: dict[int, tuple[socket.socket, Lease | None]] = {}
        listener.setblocking(False)
        self._epoll.register(listener, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def restore(self) -> None:
        """The relay has exited: have a new one serve every lease."""
        os.write(self._woken, b"r")

    def close(self) -> None:
        """Stop serving.  The relay goes on, and launchers take their leases from the next daemon."""
        os.write(self._woken, b"q")
        self._thread.join()
        for connection, _ in self._connections.values():
            connection.close()
        self._epoll.close()
        for fd in (self._wake, self._woken):
            os.close(fd)

    def _run(self) -> None:
        started_s = reaped_s = settled_s = time.monotonic()
        while True:
            is_waiting = self._leases.unclaimed or self._leases.is_incomplete
            is_settling = self._leases.is_settling
            found = self._epoll.poll(_SETTLE_S if is_settling else _REAP_S if is_waiting else None)
            if is_settling and (not found or time.monotonic() - settled_s > _SETTLE_AT_LEAST_S):
                self._guarded(self._leases.settle)
                settled_s = time.monotonic()
            for fd, _events in found:
                if fd == self._wake:
                    if b"q" in os.read(self._wake, 64):
                        return
                    self._guarded(self._restore)
                elif fd == self._listener.fileno():
                    self._guarded(self._accept)
                elif fd in self._connections:
                    self._guarded(partial(self._receive, fd))
            now_s = time.monotonic()
            if is_waiting and now_s - reaped_s > _REAP_S:
                reaped_s = now_s
                if self._leases.unclaimed:
                    self._guarded(partial(self._leases.reap, now_s - started_s > _CLAIM_S))
                if self._leases.is_incomplete:
                    self._guarded(self._restore)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except ExceptionGroup as errors:
            for one in errors.exceptions:
                self._log.warning("%s: %s", errors.message, one)
        except GangwayError as error:
            self._log.warning("%s", error)
        except Exception as error:
            self._log.failure(error)

    def _restore(self) -> None:
        try:
            if text := self._leases.restore():
                self._log.warning(text, event="relay-restarted")
        finally:
            self._changed()  # there is another relay to watch

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._log.lasting(f"launchers wait for their leases: {exhausted(error) or error.strerror}")
            time.sleep(_RETRY_S)
            return
        if peer_credentials(connection).uid != os.geteuid():
            self._log.warning("lease refused: the launcher is a process of another user", event="lease-refused")
            connection.close()
            return
        connection.setblocking(False)
        try:
            self._epoll.register(connection, select.EPOLLIN | select.EPOLLRDHUP)
        except OSError as error:
            self._log.lasting(f"leases are refused: {exhausted(error) or error.strerror}")
            connection.close()
            return
        self._connections[connection.fileno()] = connection, None
        self._receive(connection.fileno())

    def _receive(self, fd: int) -> None:
        connection, lease = self._connections[fd]
        fds: list[int] = []
        try:
            message, fds, flags, _address = socket.recv_fds(connection, protocol.MAX_REQUEST_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        try:
            if message and lease is not None:
                self._log.warning("lease ended: its launcher sent another message")
            if not message or lease is not None:
                self._end(fd)
            else:
                self._grant(fd, connection, message, fds, flags)
        finally:
            for left in fds:
                os.close(left)

    def _grant(self, fd: int, connection: socket.socket, message: bytes, fds: list[int], flags: int) -> None:
        try:
            if flags & socket.MSG_TRUNC or (fds and flags & socket.MSG_CTRUNC):
                raise ProtocolError("the message is too long, or has more than one descriptor")
            wanted = protocol.parse(message)
            if not isinstance(wanted, protocol.Lease):
                raise ProtocolError("the first message must be a lease")
            if not fds:
                raise InvalidRequest("no socket came with the lease: the daemon has no file descriptor left")
            sock = socket.socket(fileno=fds[0])
            del fds[0]  # it is the socket's now
            lease = self._leases.grant(wanted, sock, peer_credentials(connection).pid)
        except (ProtocolError, GangwayError, ExceptionGroup, OSError) as error:
            self._log.warning("lease refused: %s", error, event="lease-refused")
            self._answer(connection, protocol.encode_refusal(str(error)))
            self._end(fd)
            return
        self._connections[fd] = connection, lease
        self._answer(connection, protocol.encode_answer())
        self._log.write(audit.lease_granted(lease.mappings[0], audit.client_of(connection)))
        self._changed()

    def _end(self, fd: int) -> None:
        connection, lease = self._connections.pop(fd)
        self._epoll.unregister(fd)
        try:
            if lease is not None:
                self._leases.end(lease)
                self._log.write(audit.lease_ended(lease.mappings[0]))
        except (GangwayError, ExceptionGroup) as error:
            self._log.warning("lease ended, but not everything was removed: %s", error)
        finally:
            connection.close()  # the launcher waits for this: the port is free now
        self._changed()

    def _answer(self, connection: socket.socket, answer: bytes) -> None:
        with suppress(OSError):  # it has exited; epoll reports the closed connection
            connection.send(answer)
