"""`gangway log`: follows the daemon's events, as the API's stream has them."""

from __future__ import annotations

import json
from contextlib import suppress

from gangway.cli.client import Refused, connect
from gangway.cli.views import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from typing import Any

# HTTP 1.0: the events are not cut into chunks, and the connection's end is the stream's.
_REQUEST = b"GET /events HTTP/1.0\r\nHost: gangway\r\n\r\n"
_DATA = b"data: "


def follow(path: str, as_json: bool) -> None:
    """Print events, those that the daemon has kept first, until it ends or the user interrupts.

    NoDaemon: there is none.  Refused: it does not answer.
    """
    with connect(path, is_reading=True) as sock, suppress(KeyboardInterrupt):
        with suppress(ConnectionError):  # then there is no answer
            sock.sendall(_REQUEST)
        for data in events(_received(sock, path)):
            print(data if as_json else line_of(json.loads(data)), flush=True)
        say("the daemon has ended")


def events(lines: Iterator[bytes]) -> Iterator[str]:
    """Yield the data of each event in an answer.  Refused: it is an error."""
    status = next(lines, b"")
    if status.split()[1:2] != [b"200"]:
        raise _refusal([*lines])
    for line in lines:
        if line.startswith(_DATA):
            yield line.removeprefix(_DATA).decode(errors="replace")


def _refusal(lines: list[bytes]) -> Refused:
    """Return the error that an answer has in its last line."""
    try:
        found = json.loads(lines[-1])
        return Refused(found["kind"], found["error"])
    except (IndexError, ValueError, KeyError, TypeError):
        return Refused("HostRefused", "no valid answer from the daemon: is it another program's socket?")


def line_of(event: dict[str, Any]) -> str:
    """Return an event as a line for people."""
    level = f"{event['level']}: " if event["level"] != "info" else ""
    return f"{event['time']} {level}{event['message']}"


def _received(sock: socket.socket, path: str) -> Iterator[bytes]:
    """Yield the lines of an answer."""
    left = b""
    while True:
        try:
            part = sock.recv(65536)
        except BlockingIOError:
            raise Refused("HostRefused", f"the daemon at {path} does not answer") from None
        except ConnectionError:
            part = b""
        if not part:
            break
        *lines, left = (left + part).split(b"\n")
        yield from (line.rstrip(b"\r") for line in lines)
    if left:
        yield left
