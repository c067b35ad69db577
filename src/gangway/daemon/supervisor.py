"""Notifies the service manager that has started the daemon: sd_notify(3), and the watchdog of systemd.service(5).

A service manager passes the socket and the watchdog's interval in the environment; without them nothing is sent.
"""

import os
import socket
import time
from contextlib import suppress

_PATIENCE_S = 1.0  # for a service manager that has many messages to read
_SOCKET, _INTERVAL, _PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"


def is_supervised() -> bool:
    """True if a service manager has started this process, and starts it again."""
    return _SOCKET in os.environ


def notify(*states: str) -> None:
    """Send states to the service manager; none has to listen."""
    address = os.environ.get(_SOCKET, "")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE_S)
            sock.sendto("\n".join(states).encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def reloading() -> str:
    """Return the state of a daemon that begins to read its settings; systemd 253 compares its time (sd_notify(3))."""
    return f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def watchdog_s() -> float | None:
    """Return how often to send `ALIVE`: twice in the watchdog's interval (sd_watchdog_enabled(3)); None: never."""
    if os.environ.get(_PID, str(os.getpid())) != str(os.getpid()):
        return None
    try:
        return int(os.environ.get(_INTERVAL, "")) / 2e6
    except ValueError:
        return None
