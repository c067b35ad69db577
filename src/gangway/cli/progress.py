"""Waits for another process, and says so on a terminal once that takes more than a second."""

from __future__ import annotations

import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

_STEP_S = 1.0


def wait_readable(source: int | socket.socket, limit_s: float, what: str) -> bool:
    """Wait until a descriptor or socket is readable; False: it is not within `limit_s`.

    If standard error is a terminal, a line there shows `what` it waits for, and for how long, until the end.
    """
    began_s = time.monotonic()
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    shown = 0
    try:
        while (left_s := began_s + limit_s - time.monotonic()) > 0:
            if select.select([source], [], [], min(left_s, _STEP_S) if is_terminal else left_s)[0]:
                return True
            if is_terminal:
                text = f"gangway: {what}: {time.monotonic() - began_s:.0f} s"
                shown = len(text)
                print(f"\r{text}", end="", file=sys.stderr, flush=True)
        return False
    finally:
        if shown:
            print(f"\r{' ' * shown}\r", end="", file=sys.stderr, flush=True)
