"""The runtime folder: where the daemon of a network namespace has its sockets and files.

    /run/gangway                    0755
    /run/gangway/netns-COOKIE       0751   owned by root and the API's group; others may only open what they know
        gangway.sock                0660   the HTTP API, for root and the group
        gangway-ro.sock             0660   the same API for reading, for root and another group
        relay.sock                  0600   the relay's control socket; relay.sock.PID: of one that was replaced
        lease.sock                  0600   where docker-proxy launchers take leases
        daemon.lock                 0600   locked by the daemon for as long as it runs; holds its pid and API socket,
                                           and after its death shows which stale socket was ours
        start.json                  0600   the options with which an operator last started the daemon
        state.db                    0600   the database, unless this is the machine's own network namespace
        conf.d                      0755   what is declared, unless this is the machine's own network namespace

A namespace is identified by its cookie (SO_NETNS_COOKIE, Linux 5.14), which is not reused before the next boot; on
older kernels by its inode number.  Without root the base is $XDG_RUNTIME_DIR/gangway.  launcher/daemon.c computes the
same paths and creates a missing folder with the same modes.

This module is imported by every command, so it imports almost nothing.
"""

import os
import socket
import stat
import sys

BASE = "/run/gangway"
BASE_MODE, FOLDER_MODE = 0o755, 0o751
API_SOCKET, READ_SOCKET, LEASE_SOCKET, RELAY_SOCKET = "gangway.sock", "gangway-ro.sock", "lease.sock", "relay.sock"
LOCK, START, STATE, DECLARED = "daemon.lock", "start.json", "state.db", "conf.d"
HOST_STATE = "/var/lib/gangway/state.db"
"""The database of the daemon in the machine's own network namespace (that of pid 1): it survives a reboot."""
CACHE = "/var/cache/gangway"
"""Where root's daemon and relay keep compiled Python files, also those of Python's own library."""
HOST_DECLARED = "/etc/gangway/conf.d"
"""What is declared in the machine's own network namespace."""

_MAX_PATH_BYTES = 107  # unix(7): sun_path has 108, one of them the closing zero
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_OWN_NETNS = "/proc/thread-self/ns/net"


def netns_cookie(sock: socket.socket) -> int:
    """Return the cookie of a socket's network namespace.  OSError: the kernel has none (before Linux 5.14)."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def folder() -> str:
    """Return the runtime folder of this user's daemon in the calling thread's network namespace; it need not exist."""
    own_base = os.environ.get("XDG_RUNTIME_DIR") if os.geteuid() else None
    return os.path.join(BASE if own_base is None else os.path.join(own_base, "gangway"), f"netns-{netns_identity()}")


def create_folder() -> str:
    """Create the runtime folder, and the one that it is in, if missing; return its path.  OSError: that failed."""
    path = folder()
    for name, mode in ((os.path.dirname(path), BASE_MODE), (path, FOLDER_MODE)):
        if not os.path.isdir(name):
            os.makedirs(name, mode, exist_ok=True)
            os.chmod(name, mode)  # the umask has limited the mode so far
    return path


def default_socket() -> str:
    """Return the path of this network namespace's API socket: root's, if there is one and this user has no daemon."""
    own = os.path.join(folder(), API_SOCKET)
    of_root = os.path.join(BASE, os.path.basename(folder()), API_SOCKET)
    return own if os.path.exists(own) or not os.path.isdir(os.path.dirname(of_root)) else of_root


def read_socket(path: str) -> str:
    """Return the path of the socket for reading of the daemon that has its API socket at `path`.

    It is always in the runtime folder.  If the API socket is elsewhere, the folder has a link to it.
    """
    linked = default_socket()
    is_linked = os.path.realpath(linked) == os.path.realpath(path)
    return os.path.join(os.path.dirname(linked if is_linked else path), READ_SOCKET)


def socket_path_error(path: str) -> str | None:
    """Return why a socket cannot be at `path`; None if it can, or if only its folder can tell."""
    size = len(os.fsencode(path))
    if size > _MAX_PATH_BYTES:
        return f"the socket's path is too long ({size} bytes, at most {_MAX_PATH_BYTES}): {path}"
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISSOCK(mode):
        return None
    kind = "folder" if stat.S_ISDIR(mode) else "file"
    return f"{path} is a {kind}, not a socket: name another one with --socket or GANGWAY_SOCKET"


def default_state() -> str:
    """Return the path of this network namespace's database."""
    return HOST_STATE if _is_machines_own() else os.path.join(folder(), STATE)


def default_declared() -> str:
    """Return the path of the folder with what is declared in this network namespace."""
    return HOST_DECLARED if _is_machines_own() else os.path.join(folder(), DECLARED)


def _is_machines_own() -> bool:
    """True if the calling thread's network namespace is that of pid 1."""
    try:
        return os.path.samefile("/proc/1/ns/net", _OWN_NETNS)
    except OSError:  # only root may look at that of pid 1
        return False


def python_flags() -> list[str]:
    """Return the interpreter's flags for daemon and relay.  launcher/daemon.c has the same.

    -I: they run as root, and must not import modules from the current directory.  -OO: without docstrings the daemon
    takes 8 MB less.  Few programs use -OO: what Python compiles for it would stay in Python's own folders.
    """
    cache = [] if os.geteuid() else [f"-Xpycache_prefix={CACHE}"]
    return ["-I", "-OO", *cache]


def netns_identity() -> str:
    """Return what identifies the calling thread's network namespace until the next boot."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            return str(netns_cookie(sock))
        except OSError:
            return f"inode-{os.stat(_OWN_NETNS).st_ino}"
