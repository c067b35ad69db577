"""What the lab observes of a client's connection."""

import socket
import struct

import pytest

from lab import echo_server
from lab.redirect import actual_peer

_RESET = struct.pack("ii", 1, 0)  # closing a socket with this SO_LINGER resets its connection (socket(7))


def test_a_connection_that_was_reset_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def reset(client: socket.socket) -> None:
            assert actual_peer(client) == ("127.0.0.1", port)
            accepted, _ = server.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            accepted.close()
            actual_peer(client)

        with pytest.raises(echo_server.NoAnswer, match="the connection was reset"):
            echo_server.request_here("tcp", "127.0.0.1", port, connected=reset)
