"""Edits dockerd's settings file: a backup beside it, and each file replaced as a whole or not at all."""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp

from gangway.docker.daemon_json import Restored, enabled, restored, to_change, values
from gangway.errors import Conflict, GangwayError, HostRefused, InvalidRequest

DEFAULT = Path("/etc/docker/daemon.json")
_SUFFIX = ".gangway-backup"
_NO_FILE = "null\n"  # the backup of a file that did not exist; no settings look like that
_MODE = 0o644
_MOST_BYTES = 1 << 20


class SettingsFile:
    """A daemon.json.  Every error says what was not changed; a link is followed, and the file that it names changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = Path(os.path.realpath(path))
        self.backup = self._file.with_name(self._file.name + _SUFFIX)

    def __str__(self) -> str:
        return str(self.path) + " (it does not exist)" * (not self._file.exists())

    def settings(self) -> dict[str, object]:
        """Return what the file says; nothing if there is none.  Conflict: it is not valid."""
        return _parsed(self.path, self._read(self._file) or "")

    def changed_s(self) -> float:
        """Return when the file was last changed, in seconds since 1970; 0 if there is none."""
        with suppress(OSError):
            return self._file.stat().st_mtime
        return 0.0

    def enable(self, flags: Mapping[str, str]) -> tuple[str, ...]:
        """Leave ports to gangway; return the keys that were changed.  `flags` are those of dockerd's command line.

        The backup is what the file would say without gangway, if a former edit is still in it.
        """
        now, backup = self._read(self._file), self._read(self.backup)
        keys = to_change(_parsed(self.path, now or ""), flags)
        if keys:
            before = now
            if backup is not None:
                _parsed(self.backup, _without_mark(backup) or "")
                before = restored(now or "", _without_mark(backup)).text
            self._replace(self.backup, _NO_FILE if before is None else before)
            try:
                self._replace(self._file, enabled(before or "", flags))
            except GangwayError:
                if backup is None:
                    self.backup.unlink(missing_ok=True)
                raise
        return keys

    def disable(self) -> Restored:
        """Restore the keys that `enable` has changed, and remove the backup.  Conflict: there is none."""
        now, backup = self._read(self._file), self._read(self.backup)
        if backup is None:
            raise Conflict(
                f"{self.path} was not changed by gangway docker enable ({self.backup} does not exist): nothing was "
                "changed; delete iptables, ip6tables and userland-proxy from it by hand if they are to go"
            )
        _parsed(self.path, now or "")
        _parsed(self.backup, _without_mark(backup) or "")
        found = restored(now or "", _without_mark(backup))
        if now is not None and found.text is None:
            self._remove(self._file, "nothing was changed")
        elif now is not None and found.text != now:
            self._replace(self._file, found.text or "")
        self._remove(self.backup, f"{self.path} was restored")
        return found

    def _read(self, path: Path) -> str | None:
        """Return a file's text; None if there is no such file."""
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
                raise Conflict(f"{path} is no regular file of at most {_MOST_BYTES} bytes: nothing was changed")
            return path.read_bytes().decode()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HostRefused(f"{path} cannot be read: {error.strerror}; nothing was changed") from None
        except UnicodeDecodeError as error:
            raise Conflict(f"{path} is not UTF-8 (byte {error.start}): nothing was changed") from None

    def _replace(self, path: Path, text: str) -> None:
        """Write a file as a whole, with the settings file's mode and owner.  HostRefused: it is as it was."""
        temporary = ""
        try:
            path.parent.mkdir(exist_ok=True)
            descriptor, temporary = mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with open(descriptor, "wb") as file:
                self._copy_mode(descriptor)
                file.write(text.encode())
                file.flush()
                os.fsync(descriptor)
            os.rename(temporary, path)
            _sync(path.parent)
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise HostRefused(f"{path} cannot be written: {error.strerror}; {self.path} was not changed") from None

    def _copy_mode(self, descriptor: int) -> None:
        """Give a new file the settings file's mode, owner and attributes (SELinux's label is one), if there is one."""
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return os.fchmod(descriptor, _MODE)
        os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
        with suppress(OSError):  # the file system may have none
            for name in os.listxattr(self._file):
                os.setxattr(descriptor, name, os.getxattr(self._file, name))

    def _remove(self, path: Path, otherwise: str) -> None:
        try:
            path.unlink()
            _sync(path.parent)
        except OSError as error:
            raise HostRefused(f"{path} cannot be deleted: {error.strerror}; {otherwise}") from None


def _parsed(path: Path, text: str) -> dict[str, object]:
    try:
        return values(text)
    except InvalidRequest as error:
        raise Conflict(f"{path}: {error}; nothing was changed") from None


def _without_mark(backup: str) -> str | None:
    """Return the text that a backup holds; None: there was no file."""
    return None if backup == _NO_FILE else backup


def _sync(folder: Path) -> None:
    """Make a change of a folder last, where the file system can: fsync(2)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # the change itself is made
        os.fsync(descriptor)
    os.close(descriptor)
