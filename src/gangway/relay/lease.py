"""Leases: how a port comes to the relay, and how it goes.

What this file knows: the protocol between whoever holds a port's socket (a launcher) and the relay.  What it must not
know: what is done with a connection, other processes.

How it works.  A holder connects to the relay's unix socket, hands over the port's socket and says where its clients
are to be taken.  The lease lasts as long as that connection: when the holder ends it, or dies, the port and all its
connections end at once, and then the relay's end of the connection is closed, so a holder can wait for that.

    holder → relay   lease PROTO CONTAINER-IP CONTAINER-PORT     with the port's socket (SCM_RIGHTS)
    relay → holder   ok        or        error TEXT

The daemon, which may end and come again while ports stay published, has another kind of port (`kept.py`), over the same
connection.

Each message is one datagram of a SOCK_SEQPACKET socket.  Only holders of the user that made the unix socket are heard
(SO_PEERCRED, unix(7)): the directory that it lies in keeps others away, this keeps them away should it not.
"""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from gangway.errors import InvalidRequest
from gangway.log import Log
from gangway.relay.core.loop import READABLE, Loop
from gangway.relay.kept import MOST_HELD, VERBS, Kept, Published, Shared, parse_backend
from gangway.relay.sockets import OUT_OF_DESCRIPTORS, Backend, peer_credentials

_MESSAGE_BYTES = 256  # of a holder's
# After this a relay without descriptors looks again whether it can hear a new holder.
RETRY_S = 0.1


def parse(message: str) -> Backend:
    """What a holder's message asks for.  InvalidRequest: it is not of the form above."""
    try:
        verb, protocol, address, port = message.split()
        if verb != "lease":
            raise ValueError(verb)
        return parse_backend(protocol, address, port)
    except ValueError:
        raise InvalidRequest(f"not a lease: {message!r}") from None


class Leases:
    """The leases of a relay process.

    `publish` makes a port of a backend and a socket; `withdraw` ends it, and calls what it is given when nothing is
    left; `unused` is called when the last lease has ended.  `shared` serves the daemon's ports that have no socket of
    their own.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        log: Log,
        publish: Callable[[Backend, socket.socket], Published],
        withdraw: Callable[[Published, Callable[[], None]], None],
        unused: Callable[[], None],
        shared: Shared,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._log = log
        self._publish = publish
        self._withdraw = withdraw
        self._unused = unused
        self.kept = Kept(publish, withdraw, shared)
        self._uid = peer_credentials(listener).uid
        self._holders: dict[socket.socket, Published | None] = {}
        listener.setblocking(False)
        loop.add(listener.fileno(), self._accept, READABLE)

    def __len__(self) -> int:
        return len(self._holders) + len(self.kept)

    def _accept(self, _events: int) -> None:
        try:
            holder, _ = self._listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                self._log.warning("out of file descriptors: a port waits to be published")
                self._loop.modify(self._listener.fileno(), 0)
                self._loop.call_in(RETRY_S, lambda: self._loop.modify(self._listener.fileno(), READABLE))
            return
        if peer_credentials(holder).uid != self._uid:
            self._log.warning("a process of another user asked for a lease, and was sent away")
            holder.close()
            return
        holder.setblocking(False)
        self._holders[holder] = None
        self._loop.add(holder.fileno(), lambda _events: self._hear(holder), READABLE)

    def _hear(self, holder: socket.socket) -> None:
        try:
            message, fds, _flags, _address = socket.recv_fds(holder, _MESSAGE_BYTES, MOST_HELD)
        except OSError:
            message, fds = b"", []
        if not message.strip() or self._holders[holder] is not None:
            for fd in fds:
                os.close(fd)
            return self._end(holder)
        text = message.decode(errors="replace")
        if text.split()[0] in VERBS:
            return self.kept.hear(text, fds, lambda answer, fds: self._answer(holder, answer, fds))
        return self._grant(holder, text, fds)

    def _grant(self, holder: socket.socket, message: str, fds: list[int]) -> None:
        try:
            backend = parse(message)
            if not fds:
                raise InvalidRequest("no socket came with the lease, or the relay has no file descriptor left for it")
            sock = socket.socket(fileno=fds[-1])
            fds.pop()  # from here on it is the socket's to close
            self._holders[holder] = self._publish(backend, sock)
        except (InvalidRequest, OSError) as error:
            self._answer(holder, f"error {error}")
            self._end(holder)
        else:
            self._answer(holder, "ok")
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, holder: socket.socket, text: str, fds: Sequence[int] = ()) -> None:
        with suppress(OSError):  # it is gone, and its end of the connection will say so
            socket.send_fds(holder, [text.encode()], fds)

    def _end(self, holder: socket.socket) -> None:
        published = self._holders[holder]
        self._loop.forget(holder.fileno())
        if published is None:
            self._close(holder)
        else:
            self._withdraw(published, lambda: self._close(holder))

    def _close(self, holder: socket.socket) -> None:
        self._loop.close_later(holder)  # after the port's socket, which is closed at the end of this batch, too
        del self._holders[holder]
        if not self:
            self._unused()
