"""The road that a client really got, from the kernel's own tables and never from what gangway reports.

redirect    the client's socket sends to another address than it connected to (the table of sockets)
nat         the destination was translated on the way (the connection tracking table)
relay       neither, and yet the client got an answer
"""

import socket
from typing import NamedTuple

from lab import echo_server
from lab.conntrack import was_translated
from lab.netns import Namespace
from lab.redirect import actual_peer


class ObservedRoad(NamedTuple):
    """A road, and the source address that the container saw."""

    road: str
    peer: str


def observe_road(host: Namespace, client_space: Namespace, protocol: str, address: str, port: int) -> ObservedRoad:
    """Send a request from `client_space` to a port of `host`, with an echo server behind it, and return its road.

    echo_server.NoAnswer: nothing answers.
    """
    bare = address.partition("%")[0]
    peers, own = {(bare, port)}, ("", 0)

    def connected(client: socket.socket) -> None:
        nonlocal own
        own = client.getsockname()[:2]
        if protocol != "sctp":  # SCTP sockets run no eBPF program, and are listed in another table
            peers.add(actual_peer(client))

    try:
        with client_space.entered():
            answer = echo_server.request_here(protocol, address, port, connected=connected)
    finally:  # deletes the entry, so that the next request does not find it
        is_translated = bool(own[0]) and was_translated(host, protocol, own, bare, port)
    return ObservedRoad("redirect" if len(peers) > 1 else "nat" if is_translated else "relay", answer.peer)
