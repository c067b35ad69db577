"""The daemon's runtime folder (gangway/runtime.py): its lock, its sockets, and their modes."""

import fcntl
import os
import socket
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from gangway import runtime
from gangway.errors import Conflict, HostRefused

_BACKLOG = 4096


class Home:
    """The runtime folder of this network namespace, locked for as long as the daemon runs.

    `socket_path`: where API clients connect, if not in the folder; the group with the number `group` may, too.
    Conflict: another daemon has the namespace, or the socket.
    """

    api: socket.socket
    leases: socket.socket

    def __init__(self, socket_path: str | None, group: int) -> None:
        self.folder = Path(runtime.folder())
        self.api_path = Path(socket_path).absolute() if socket_path else self.folder / runtime.API_SOCKET
        self.relay_path = self.folder / runtime.RELAY_SOCKET
        self.is_abandoned = False  # nothing is left to manage: the folder is removed, unless an operator's options stay
        self._group = group if os.geteuid() == 0 else -1
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as scope:
            try:
                self._make_folder()
                self._lock(scope)
            except FileNotFoundError:
                raise Conflict(f"a daemon that ends has just removed {self.folder}: try again") from None
            scope.callback(self._remove_folder)  # while it is locked
            self._unlink_former_link()
            self.api = scope.enter_context(_listen(self.api_path, socket.SOCK_STREAM))
            scope.callback(_unlink_socket, self.api_path)
            self.leases = scope.enter_context(_listen(self.folder / runtime.LEASE_SOCKET, socket.SOCK_SEQPACKET))
            scope.callback(_unlink_socket, self.folder / runtime.LEASE_SOCKET)
            os.chmod(self.folder / runtime.LEASE_SOCKET, 0o600)
            os.chown(self.api_path, -1, self._group)
            os.chmod(self.api_path, 0o660)
            self._link(scope)
            self._scope = scope.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()

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

    def _lock(self, scope: ExitStack) -> None:
        path = self.folder / runtime.LOCK
        while True:
            lock = scope.enter_context(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid, _, at = lock.read().strip().partition(" ")
                raise Conflict(f"a daemon (pid {pid}, socket {at}) already manages this network namespace") from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    break  # else its last owner removed the file in between
        lock.truncate(0)
        lock.write(f"{os.getpid()} {self.api_path}\n")
        lock.flush()

    def _unlink_former_link(self) -> None:
        """Remove the link of a daemon that was killed: another daemon may use its target by now."""
        here = self.folder / runtime.API_SOCKET
        if here.is_symlink():
            here.unlink()

    def _link(self, scope: ExitStack) -> None:
        """Create a link in the folder, where clients look, to a socket that is elsewhere."""
        here = self.folder / runtime.API_SOCKET
        if self.api_path != here:
            here.unlink(missing_ok=True)
            here.symlink_to(self.api_path)
            scope.callback(here.unlink, missing_ok=True)

    def _remove_folder(self) -> None:
        if self.is_abandoned:
            state = (f"{runtime.STATE}{end}" for end in ("", "-wal", "-shm"))
            for name in (runtime.LOCK, runtime.RELAY_SOCKET, *state):
                with suppress(OSError):
                    (self.folder / name).unlink()
            with suppress(OSError):  # start.json stays; or a launcher is about to start another daemon
                self.folder.rmdir()


def _listen(path: Path, kind: int) -> socket.socket:
    """Return a listening socket.  Conflict: another process listens there already."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with socket.socket(socket.AF_UNIX, kind) as probing:
            probing.connect(str(path))
        raise Conflict(f"another daemon listens on {path}: choose another --socket")
    except (FileNotFoundError, ConnectionRefusedError):
        _unlink_socket(path)
    except OSError as error:
        sock.close()
        raise HostRefused(f"the socket {path} cannot be used: {error.strerror or error}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise HostRefused(f"the socket {path} cannot be created: {error.strerror or error}") from None
    return sock


def _unlink_socket(path: Path) -> None:
    """Remove a socket that no process listens on; any other file is left alone."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
