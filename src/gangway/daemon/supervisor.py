"""Talks to the service manager that has started the daemon: sd_notify(3), and the watchdog of systemd.service(5).

A service manager passes the socket and the watchdog's interval in the environment; without them nothing is sent.  It
keeps the daemon's listening sockets while the service is restarted, and passes them to the next daemon
(sd_pid_notify_with_fds(3), sd_listen_fds(3)), as it does those of a socket unit.  Clients wait in their queues.
"""

import os
import socket
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress

_PATIENCE_S = 1.0  # for a service manager that has many messages to read
_SOCKET, _INTERVAL, _PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"
_LISTEN_PID, _LISTEN_FDS, _LISTEN_NAMES = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"
_FIRST_FD = 3  # SD_LISTEN_FDS_START
READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"


def is_supervised() -> bool:
    """True if a service manager has started this process, and starts it again."""
    return _SOCKET in os.environ


def notify(*states: str, fds: Sequence[int] = ()) -> None:
    """Send states to the service manager, and descriptors that belong to them; none has to listen."""
    address = os.environ.get(_SOCKET, "")
    if address:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE_S)
            place = f"\0{address[1:]}" if address.startswith("@") else address
            sock.sendmsg(["\n".join(states).encode()], rights, 0, place)


def store(name: str, sock: socket.socket) -> None:
    """Have the service manager keep a listening socket for the next daemon, in place of the last one with this name."""
    forget(name)
    notify("FDSTORE=1", f"FDNAME={name}", fds=[sock.fileno()])


def forget(name: str) -> None:
    """Have the service manager close the socket that it keeps by this name."""
    notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def passed_sockets() -> Iterator[tuple[str, socket.socket]]:
    """Yield the sockets that the service manager has passed to this process, with their names, once.

    The names are those of `store`; sockets of a socket unit have its name, or the one that it gives them.
    """
    is_ours = os.environ.pop(_LISTEN_PID, "") == str(os.getpid())
    count, names = os.environ.pop(_LISTEN_FDS, ""), os.environ.pop(_LISTEN_NAMES, "").split(":")
    for number in range(int(count) if is_ours and count.isdecimal() else 0):
        with suppress(OSError):  # not a socket: it is not ours
            sock = socket.socket(fileno=_FIRST_FD + number)
            sock.set_inheritable(False)
            yield names[number] if number < len(names) else "", sock


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
