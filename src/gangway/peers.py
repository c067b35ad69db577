"""Which process is at the other end of a unix socket.  Every part may import this."""

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("iII")  # struct ucred, unix(7)


class PeerCredentials(NamedTuple):
    """The process at the other end of a unix socket; for a listening socket, the process that called listen."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """Return the peer of a connected unix socket (SO_PEERCRED); for a listening socket, the process that listens."""
    return PeerCredentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
