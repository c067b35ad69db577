"""Whether a connection to Docker's socket would start dockerd.

Debian's docker.socket has systemd listen there, and dockerd gets the socket from it.  When dockerd was stopped, systemd
listens on: the next connection starts dockerd again (systemd.socket(5)).  An operator who stops it does not want that.
"""

import os
from contextlib import suppress
from pathlib import Path

from gangway.docker.running import find_process

_SYSTEMD_PID = 1
_LISTENS = 0x10000  # include/linux/net.h: __SO_ACCEPTCON, a flag in /proc/net/unix


def would_start_dockerd(path: str) -> bool:
    """True if systemd listens at this socket, and no dockerd runs."""
    return listens_at(path, _SYSTEMD_PID) and find_process() is None


def listens_at(path: str, pid: int) -> bool:
    """True if a process has the socket that listens at `path`; False also if it cannot be looked into."""
    wanted = os.path.realpath(path)  # /var/run is a link
    with suppress(OSError):
        rows = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
        listening = [row for row in rows if len(row) == 8 and int(row[3], 16) & _LISTENS]
        sockets = {f"socket:[{row[6]}]" for row in listening if os.path.realpath(row[7]) == wanted}
        for descriptor in os.listdir(f"/proc/{pid}/fd") if sockets else ():
            with suppress(OSError):  # it has been closed
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in sockets:
                    return True
    return False
