"""The road that a client really got, by the kernel's own records.

What this file knows: where the kernel keeps them.  What it must not know: what gangway says.

    redirect    the client's socket sends to another address than it asked (the table of sockets)
    nat         the destination was translated on the way (the table of tracked connections)
    relay       neither, and yet it was answered
"""

import socket
from typing import NamedTuple

from lab import echo_server
from lab.conntrack import was_translated
from lab.netns import Namespace
from lab.redirect import actual_peer


class ObservedRoad(NamedTuple):
    """A road, and the source that the container saw."""

    road: str
    peer: str


def observe_road(host: Namespace, space: Namespace, protocol: str, address: str, port: int) -> ObservedRoad:
    """Asks a mirror's port that `host` has published, from `space`.  echo_server.NoAnswer: nothing answers."""
    bare = address.partition("%")[0]
    aims = {(bare, port)}

    def connected(client: socket.socket) -> None:
        if protocol != "sctp":  # whose sockets run no program, and are in another table
            aims.add(actual_peer(client))

    try:
        with space.entered():
            answer = echo_server.request_here(protocol, address, port, connected=connected)
    finally:  # what was recorded is not to be taken for the next one's
        is_translated = was_translated(host, protocol, bare, port)
    return ObservedRoad("redirect" if len(aims) > 1 else "nat" if is_translated else "relay", answer.peer)
