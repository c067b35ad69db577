"""The daemon's runtime folder (gangway/runtime.py): its lock, its sockets, and their modes."""

import fcntl
import os
import signal
import socket
import stat
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from gangway import runtime
from gangway.daemon import supervisor
from gangway.errors import Conflict, HostRefused, InvalidRequest
from gangway.relay.sockets import unlink_socket

BACKLOG = 4096
# The names of the sockets that a service manager keeps for the next daemon.
_NAMES = _API, _READING, _LEASES = "api", "reading", "leases"
_ON_DEMAND = "on demand"  # in the lock's file: a command or a launcher has started the daemon
_END_S, _LOOK_S = 15.0, 0.02  # how long such a daemon may take to end, and how often to look


class Home:
    """The runtime folder of this network namespace, locked for as long as the daemon runs.

    `socket_path`: where API clients connect, if not in the folder; the first of `groups` may, too, and the second may
    read.  A daemon that was started on demand gives way to one that was not.  A service manager keeps the sockets for
    the next daemon (`supervisor`).  Conflict: another daemon has the namespace, or the socket.
    """

    api: socket.socket
    reading: socket.socket  # for clients that may only read
    leases: socket.socket

    def __init__(self, socket_path: str | None, groups: tuple[int, int], on_demand: bool = False) -> None:
        self.folder = Path(runtime.folder())
        self.api_path = Path(socket_path).absolute() if socket_path else self.folder / runtime.API_SOCKET
        self.read_path, self.lease_path = self.folder / runtime.READ_SOCKET, self.folder / runtime.LEASE_SOCKET
        self.relay_path = self.folder / runtime.RELAY_SOCKET
        self.on_demand = on_demand
        self.is_abandoned = False  # nothing is left to manage: the folder is removed, unless an operator's options stay
        self.is_left_for_good = False  # an operator has removed everything: they do not stay
        self._group, self._read_group = groups if os.geteuid() == 0 else (-1, -1)
        self._passed: dict[Path, socket.socket] = {}  # by the service manager, and not used yet
        self._are_kept = supervisor.is_supervised()  # the sockets, when this daemon ends
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as scope:
            try:
                self._make_folder()
                lock = self._lock(scope)
            except FileNotFoundError:
                raise Conflict(f"a daemon that ends has just removed {self.folder}: try again") from None
            scope.callback(self._remove_folder)  # while it is locked
            _unlink_link(self.folder / runtime.API_SOCKET)  # another daemon may use its target by now
            self._take_passed()
            former = _former_sockets(self.folder.parent)
            self.api = self._listen(scope, _API, self.api_path, socket.SOCK_STREAM, former)
            self._record(lock, former)
            self.reading = self._listen(scope, _READING, self.read_path, socket.SOCK_STREAM, former)
            self.leases = self._listen(scope, _LEASES, self.lease_path, socket.SOCK_SEQPACKET, former)
            os.chmod(self.lease_path, 0o600)
            for path, group in self._by_group():
                os.chown(path, -1, group)
                os.chmod(path, 0o660)
            self._link(scope)
            self._scope = scope.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()

    def leave_for_good(self) -> None:
        """Keep nothing for a next daemon: an operator has removed everything."""
        self.is_left_for_good, self._are_kept = True, False
        for name in _NAMES:
            supervisor.forget(name)

    def set_groups(self, groups: tuple[int, int]) -> None:
        """Let other groups use the API socket, and the socket for reading."""
        if os.geteuid() == 0:
            self._group, self._read_group = groups
            for path, group in ((self.folder, self._group), *self._by_group()):
                os.chown(path, -1, group)

    def _by_group(self) -> tuple[tuple[Path, int], ...]:
        """Return the sockets that groups may use."""
        return (self.api_path, self._group), (self.read_path, self._read_group)

    def _make_folder(self) -> None:
        """Create the folder, or give an existing one (a launcher may have made it) its modes."""
        try:
            for folder, mode in ((self.folder.parent, runtime.BASE_MODE), (self.folder, runtime.FOLDER_MODE)):
                folder.mkdir(parents=True, exist_ok=True, mode=mode)
                found = folder.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                    advice = "remove it" if os.geteuid() == 0 else "run it as root, or set XDG_RUNTIME_DIR"
                    raise HostRefused(f"{folder} belongs to another user (uid {found.st_uid}): {advice}")
                os.chmod(folder, mode)
            os.chown(self.folder, -1, self._group)
        except FileNotFoundError:
            raise
        except OSError as error:
            advice = "; run as root" if isinstance(error, PermissionError) else ""
            raise HostRefused(f"the runtime folder {self.folder} cannot be used: {error.strerror}{advice}") from None

    def _lock(self, scope: ExitStack) -> TextIO:
        path = self.folder / runtime.LOCK
        while True:
            lock = scope.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+"))
            self._take(lock)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    break  # else its last owner removed the file in between
        return lock

    def _take(self, lock: TextIO) -> None:
        """Lock the file.  A daemon on demand is ended, again and again: launchers start another one."""
        deadline_s = time.monotonic() + _END_S
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                first, *others = lock.read().splitlines() or [""]
                pid, _, at = first.partition(" ")
                is_to_stay = first and _ON_DEMAND not in others  # nothing: it has yet to write what it is
                if self.on_demand or is_to_stay or time.monotonic() > deadline_s:
                    text = f"a daemon (pid {pid}, socket {at}) already manages this network namespace"
                    raise Conflict(text) from None
                if first:
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGTERM)
                time.sleep(_LOOK_S)

    def _record(self, lock: TextIO, former: dict[Path, str]) -> None:
        """Record this daemon's pid and API socket in place of the last daemon's.

        If that one's socket is stale, it is removed: from now on nothing shows that it was ours.
        """
        lock.seek(0)
        at = Path(lock.readline().strip().partition(" ")[2])
        with suppress(Conflict, HostRefused):
            if at != self.api_path and former.get(at) == _identity(at) and _is_stale(at):
                unlink_socket(at)
        lock.seek(0)
        lock.truncate()
        kind = f"{_ON_DEMAND}\n" if self.on_demand else ""
        lock.write(f"{os.getpid()} {self.api_path}\n{_identity(self.api_path)}\n{kind}")
        lock.flush()

    def _take_passed(self) -> None:
        """Take the sockets that the service manager has kept, or made, where this daemon listens.

        One that an earlier daemon had elsewhere is removed: its clients would wait in vain.
        """
        for name, sock in supervisor.passed_sockets():
            path = Path(os.fsdecode(sock.getsockname())) if sock.family == socket.AF_UNIX else Path()
            if path in (self.api_path, self.read_path, self.lease_path) and path.is_socket():
                self._passed[path] = sock
            else:
                sock.close()
                if name in _NAMES:
                    unlink_socket(path)

    def _listen(self, scope: ExitStack, name: str, path: Path, kind: int, former: dict[Path, str]) -> socket.socket:
        """Return a socket of mode 0600 that listens at `path` until the end of `scope`, which removes it unless it is
        kept.

        Conflict: another process listens there.  InvalidRequest, HostRefused: something else is there; it stays.
        """
        reason = runtime.socket_path_error(str(path))
        if reason is not None:
            raise InvalidRequest(reason)
        if path in self._passed:
            scope.callback(self._unlink, path, _identity(path))
            return scope.enter_context(self._passed.pop(path))
        if _is_stale(path, kind):
            if path.parent != self.folder and former.get(path) != _identity(path):
                raise HostRefused(
                    f"the socket {path} was left by another program: remove it, or choose another --socket"
                )
            unlink_socket(path)
        sock = scope.enter_context(socket.socket(socket.AF_UNIX, kind))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            umask = os.umask(0o177)  # at no time may others connect
            try:
                sock.bind(str(path))
            finally:
                os.umask(umask)
            sock.listen(BACKLOG)
        except OSError as error:
            raise HostRefused(f"the socket {path} cannot be created: {error.strerror or error}") from None
        if self._are_kept:
            supervisor.store(name, sock)
        scope.callback(self._unlink, path, _identity(path))
        return sock

    def _unlink(self, path: Path, identity: str) -> None:
        """Remove our socket, unless it is kept, or another program has put its own there."""
        if not self._are_kept and _identity(path) == identity:
            unlink_socket(path)

    def _link(self, scope: ExitStack) -> None:
        """Create a link in the folder, where clients look, to a socket that is elsewhere."""
        here = self.folder / runtime.API_SOCKET
        if self.api_path == here:
            return
        unlink_socket(here)  # of a daemon that was killed: the folder is locked
        try:
            here.symlink_to(self.api_path)
        except OSError as error:
            raise HostRefused(f"the link {here} cannot be created: {error.strerror}") from None
        scope.callback(lambda: None if self._are_kept else _unlink_link(here))

    def _remove_folder(self) -> None:
        if self.is_abandoned:
            state = (f"{runtime.STATE}{end}" for end in ("", "-wal", "-shm"))
            start = (runtime.START,) if self.is_left_for_good else ()
            relays = (path.name for path in self.folder.glob(f"{runtime.RELAY_SOCKET}*"))
            for name in (runtime.LOCK, *relays, *state, *start):
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):
                (self.folder / runtime.DECLARED).rmdir()
            with suppress(OSError):  # start.json stays; or a launcher is about to start another daemon
                self.folder.rmdir()


def _is_stale(path: Path, kind: int = socket.SOCK_STREAM) -> bool:
    """True if there is a socket at `path` that no process listens on.

    Conflict: a process listens on it.  HostRefused: it cannot be told.
    """
    try:
        with socket.socket(socket.AF_UNIX, kind) as probing:
            probing.connect(str(path))
    except FileNotFoundError:
        return False
    except ConnectionRefusedError:
        return True
    except OSError as error:
        raise HostRefused(f"the socket {path} cannot be used: {error.strerror or error}") from None
    raise Conflict(f"another daemon listens on {path}: choose another --socket")


def _former_sockets(base: Path) -> dict[Path, str]:
    """Return the API sockets of the daemons of all network namespaces that were recorded, and their identities."""
    found = {}
    for lock in base.glob(f"netns-*/{runtime.LOCK}"):
        with suppress(OSError, UnicodeDecodeError):
            first, identity, *_ = [*lock.read_text().splitlines(), "", ""]
            found[Path(first.partition(" ")[2])] = identity
    return found


def _identity(path: Path) -> str:
    """Return what tells a file from another one with its name; empty if there is none."""
    try:
        found = path.lstat()
    except OSError:
        return ""
    return f"{found.st_dev} {found.st_ino}"


def _unlink_link(path: Path) -> None:
    """Remove a link; any other file is left alone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
