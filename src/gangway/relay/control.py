"""The relay's control socket: connections from daemons, and the requests that come over them.

What this file must not know: what a request does.

Only processes of the user that made the socket are accepted (SO_PEERCRED, unix(7)), even if its folder let others in.
"""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from gangway import __version__
from gangway.errors import InvalidRequest
from gangway.limits import exhausted
from gangway.log import Log
from gangway.peers import peer_credentials
from gangway.relay import protocol
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.ports import ServedPorts
from gangway.relay.protocol import Hello, ProtocolError

_DESCRIPTORS_LOST = f"not all descriptors arrived: the relay has none left, or over {protocol.MAX_DESCRIPTORS} came"
_Result = TypeVar("_Result")
RETRY_S = 0.1  # when a relay without descriptors looks again for new connections


class Control:
    """The control connections of a relay process; `disconnected` is called when the last one has ended."""

    def __init__(self, loop: Loop, listener: socket.socket, log: Log, disconnected: Callable[[], None]) -> None:
        self._loop, self._listener, self._log, self._disconnected = loop, listener, log, disconnected
        self._uid = peer_credentials(listener).uid
        self._greeted: dict[socket.socket, bool] = {}
        self.ports: ServedPorts
        self._spare: socket.socket | None = None
        """Holds a descriptor and a watch for a daemon that connects when none is left: it would kill a relay that does
        not answer."""
        self._reserve()
        listener.setblocking(False)
        loop.add(listener.fileno(), self._accept, READABLE)

    def is_connected(self) -> bool:
        """True if a daemon is connected."""
        return any(self._greeted.values())

    def __len__(self) -> int:
        return len(self._greeted)

    def _accept(self, _events: int) -> None:
        try:
            daemon = self._with_spare(lambda: self._listener.accept()[0])
        except OSError as error:
            if reason := exhausted(error):
                self._log.lasting(f"the daemon waits to connect: {reason}")
                self._loop.modify(self._listener.fileno(), 0)
                self._loop.call_in(RETRY_S, lambda: self._loop.modify(self._listener.fileno(), READABLE))
            return
        if peer_credentials(daemon).uid != self._uid:
            self._log.warning("control connection refused: it is from a process of another user")
            daemon.close()
            return
        daemon.setblocking(False)
        self._greeted[daemon] = False
        self._watch(daemon)

    def _watch(self, daemon: socket.socket) -> None:
        """Wait for a daemon's requests; if nothing more can be watched, try it again."""
        try:
            self._with_spare(lambda: self._loop.add(daemon.fileno(), partial(self._receive, daemon), READABLE))
        except OSError as error:
            self._log.lasting(f"the daemon waits for an answer: {exhausted(error) or error.strerror}")
            self._loop.call_in(RETRY_S, partial(self._watch, daemon))

    def _with_spare(self, call: Callable[[], _Result]) -> _Result:
        """Call something that needs a descriptor or a watch, and if there is none, again with the spare one's."""
        try:
            return call()
        except OSError as error:
            if self._spare is None or not exhausted(error):
                raise
            self._loop.forget(self._spare.fileno())
            self._spare.close()
            self._spare = None
            return call()

    def _reserve(self) -> None:
        """Open the spare descriptor, unless it is there or there is still none left."""
        if self._spare is None:
            with suppress(OSError):
                self._spare = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._loop.add(self._spare.fileno(), lambda _events: None, 0)

    def _receive(self, daemon: socket.socket, _events: int) -> None:
        fds: list[int] = []
        try:
            message, fds, flags, _ = socket.recv_fds(daemon, protocol.MAX_REQUEST_BYTES, protocol.MAX_DESCRIPTORS)
            if not message:
                return self._close(daemon)
            if flags & socket.MSG_TRUNC:
                raise ProtocolError(f"message longer than {protocol.MAX_REQUEST_BYTES} bytes")
            request = protocol.parse(message)
            if flags & socket.MSG_CTRUNC:  # the kernel has closed those that did not fit
                return self._refuse(daemon, _DESCRIPTORS_LOST)
            return self._carry_out(daemon, request, fds)
        except ProtocolError as error:
            self._log.warning("control connection closed: %s", error)
            self._refuse(daemon, str(error))
            return self._close(daemon)
        except OSError:
            return self._close(daemon)
        except Exception as error:
            self._log.unexpected(error, "the daemon's request was refused")
            return self._refuse(daemon, f"internal error: {error!r}; the relay's log has the details")
        finally:
            for fd in fds:
                os.close(fd)

    def _carry_out(self, daemon: socket.socket, request: protocol.Request, fds: list[int]) -> None:
        if isinstance(request, Hello):
            self._greeted[daemon] = True
            return self._answer(daemon, f"{protocol.VERSION} {__version__}")
        if not self._greeted[daemon]:
            raise ProtocolError("the first message must be hello")
        try:
            self.ports.carry_out(request, fds, partial(self._answer, daemon))
        except OSError as error:
            self._refuse(daemon, exhausted(error) or str(error))
        except (InvalidRequest, ValueError) as error:  # ValueError: a descriptor is not what it should be
            self._refuse(daemon, str(error))

    def _answer(self, daemon: socket.socket, text: str, fds: Sequence[int] = ()) -> None:
        with suppress(OSError):  # it has exited; the loop reports the closed connection
            socket.send_fds(daemon, [protocol.encode_answer(text)], fds)

    def _refuse(self, daemon: socket.socket, reason: str) -> None:
        with suppress(OSError):
            daemon.send(protocol.encode_refusal(reason))

    def _close(self, daemon: socket.socket) -> None:
        if self._greeted.pop(daemon, None) is not None:
            self._loop.close_later(daemon.fileno(), daemon.close)
            self._loop.call_soon(lambda _events: self._reserve(), 0)
        if not self.is_connected():
            self.ports.daemon_left()
        if not self:
            self._disconnected()
