"""The one owner of every host setting that gangway changes: sysctls, the policy of a chain, lists.

A setting is recorded when it is first changed: its value before, and the value that gangway wrote.  When no user of it
is left it is restored, unless another program has changed it since; then the newer value stays.  A record is stored
before the setting is written, so a daemon that was killed at any point finds what it has to restore.

Records are valid for one boot and one network namespace.  After a reboot, or in a later namespace that uses the same
storage, the settings have never been changed by gangway, so records from elsewhere are discarded.
"""

import json
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, Protocol

from gangway.errors import GangwayError, HostRefused
from gangway.host import probe, sysctl
from gangway.runtime import netns_cookie

_KEY = "saved settings"


class Storage(Protocol):
    """Texts by name that survive the process; `state.database.Database` is one."""

    def remember(self, what: str, value: str) -> None:
        """Store a text under a name."""

    def recall(self, what: str) -> str | None:
        """Return the text under a name; None if there is none."""

    def forget(self, what: str) -> None:
        """Delete the text under a name, if there is one."""


def _unless_changed(before: str, _written: str, now: str) -> str:
    """Keep the value that another program has set."""
    return now


class Setting(NamedTuple):
    """A setting, how to read and write it, and when to restore it."""

    name: str
    read: Callable[[], str | None]
    """Return the value; None if the host has no such setting."""
    write: Callable[[str], None]
    """HostRefused: the value was not changed."""
    without_ours: Callable[[str, str, str], str] = _unless_changed
    """Given the values before, written by gangway, and now, which differs from the one written: return the value to
    restore."""
    dependents: Callable[[], Collection[str]] = tuple
    """Return what relies on the setting now.  If there is more than when gangway changed it, it is not restored."""
    reason_to_stay: str = "left unchanged: {} relies on it"
    """What is logged then, after the setting's name; {} is replaced by the new dependents."""


class _Record(NamedTuple):
    before: str
    written: str | None
    """None: not known yet; `before` is restored whatever the value is."""
    restored_with: str = ""
    """The setting that this one is restored with."""
    dependents: Collection[str] = ()


class SavedSettings:
    """The settings that gangway has changed in the calling thread's network namespace.

    `warn` logs what could not be restored, and why.  A name that was not registered is a sysctl's.  Thread-safe:
    changes of one setting are made one after the other; none waits for another setting, which a tool may have to write.
    """

    def __init__(self, storage: Storage, warn: Callable[[str], None]) -> None:
        self._lock = RLock()
        """Guards what is recorded.  It is not held while a setting is read or written."""
        self._changing: dict[str, Any] = defaultdict(RLock)
        self._storage = storage
        self._warn = warn
        self._settings: dict[str, Setting] = {}
        self._users: dict[str, set[str]] = defaultdict(set)
        self._scope = _boot_and_namespace()
        scope, records = json.loads(storage.recall(_KEY) or '["", {}]')
        self._records = {name: _Record(*record) for name, record in records.items()} if scope == self._scope else {}

    def register(self, setting: Setting) -> None:
        """Make a setting known that is not an ordinary sysctl."""
        self._settings[setting.name] = setting

    def set(
        self, name: str, value: str, user: str = "", *, side_effects: Iterable[str] = (), restored_with: str = ""
    ) -> None:
        """Set one for a user.  One that the host does not have is skipped.

        `side_effects` are sysctls that the kernel changes along with it: they are recorded, and restored with it.
        `restored_with` names another setting that this one is to be restored with.  HostRefused: it was not changed,
        and nothing more is recorded.
        """
        setting = self._setting(name)
        with self._exclusively(name):
            if setting.read() not in (None, value):
                self._change(name, value, partial(setting.write, value), tuple(side_effects), restored_with)
            self._users[name].add(user)

    def extend(self, name: str, text: str, user: str = "") -> None:
        """Add to a sysctl that is a list.  HostRefused: it was not changed."""
        with self._exclusively(name):
            expected = ",".join(filter(None, (self._setting(name).read(), text)))
            self._change(name, expected, partial(sysctl.extend, name, text))
            self._users[name].add(user)

    def restore(self, name: str, user: str = "") -> None:
        """Restore a setting, and all that is restored with it, unless it has another user.

        HostRefused: it was not restored, and stays recorded.
        """
        with self._exclusively(name):
            self._users[name].discard(user)
            if self._users[name]:
                return
            names = [other for other in self._records if name in (other, self._records[other].restored_with)]
            names.sort(key=lambda other: other != name)
            if not self._has_new_dependents(name):
                self._write_back(names)
            if names:
                self._record(dict.fromkeys(names))

    def restore_all(self, needed: Collection[str] = ()) -> None:
        """Restore all settings but those that are needed, whoever their users were; log those that could not be."""
        for name in dict.fromkeys(record.restored_with or name for name, record in reversed(self._records.items())):
            if name not in needed:
                self._users.pop(name, None)
                try:
                    self.restore(name)
                except HostRefused as error:
                    self._warn(f"{name} could not be restored: {error}")

    def names(self) -> tuple[str, ...]:
        """Return the settings that gangway has changed, without those that are restored with another one."""
        return tuple(name for name, record in self._records.items() if not record.restored_with)

    def is_changed(self, name: str) -> bool:
        """True if gangway has changed the setting and not restored it."""
        return name in self._records

    def is_intact(self, name: str) -> bool:
        """True if no other program has changed the setting since gangway did, if it did."""
        return name not in self._records or self._setting(name).read() == self._records[name].written

    def original(self, name: str) -> str | None:
        """Return the value that the setting would have without gangway; None if the host has no such setting."""
        setting, record = self._setting(name), self._records.get(name)
        now = setting.read()
        if now is None or record is None:
            return now
        if record.written in (None, now):
            return record.before
        return setting.without_ours(record.before, record.written or "", now)

    def _change(
        self,
        name: str,
        expected: str,
        write: Callable[[], None],
        side_effects: Iterable[str] = (),
        restored_with: str = "",
    ) -> None:
        known = self._records.get(name)
        own = known or _Record("", None, restored_with, sorted(self._setting(name).dependents()))
        beside = {
            side: _Record(value, None, name)
            for side in side_effects
            if side not in self._records and (value := sysctl.read(side)) is not None
        }
        own = own._replace(before=self.original(name) or "", written=expected)
        with self._recording({**beside, name: own}):
            write()
        # What the kernel made of it: it may spell a value in another way.
        changed = [other for other in (name, *side_effects) if other in self._records]
        self._record({other: self._records[other]._replace(written=self._read(other)) for other in changed})

    def _write_back(self, names: Collection[str]) -> None:
        """Restore settings, the first one first: it may change the others."""
        now = {name: self._read(name) for name in names}
        wanted = {name: value for name in names if (value := self.original(name)) is not None}
        for name, value in wanted.items():
            if now[name] == value != self._records[name].before:
                self._warn(f"{name} was changed by another program: left as it is")
        # A daemon that dies in between has to write all of them, whatever it finds then.
        unknown = {name: self._records[name]._replace(before=value, written=None) for name, value in wanted.items()}
        with self._recording(unknown):
            for number, (name, value) in enumerate(wanted.items()):
                with suppress(*([HostRefused] if number else [])):  # the interface may have been removed meanwhile
                    if self._read(name) != value:
                        self._setting(name).write(value)

    def _has_new_dependents(self, name: str) -> bool:
        record = self._records.get(name)
        setting = self._setting(name)
        found = sorted(set(setting.dependents()) - set(record.dependents)) if record is not None else []
        if found:
            self._warn(f"{name} {setting.reason_to_stay.format(', '.join(found))}")
        return bool(found)

    @contextmanager
    def _recording(self, records: dict[str, _Record]) -> Iterator[None]:
        """Store records before the block changes what they are about; discard them if that fails."""
        former = {name: self._records.get(name) for name in records}
        try:
            self._record(records)
            yield
        except GangwayError:
            with suppress(GangwayError):
                self._record(former)
            raise

    def _read(self, name: str) -> str | None:
        return self._setting(name).read()

    def _setting(self, name: str) -> Setting:
        return self._settings.get(name) or Setting(name, partial(sysctl.read, name), partial(sysctl.write, name))

    def _exclusively(self, name: str) -> Any:
        with self._lock:
            return self._changing[name]

    def _record(self, records: Mapping[str, _Record | None]) -> None:
        """Replace some records, or delete them, and store all."""
        with self._lock:
            merged = {**self._records, **records}
            self._records = {name: record for name, record in merged.items() if record is not None}
            if self._records:
                self._storage.remember(_KEY, json.dumps((self._scope, self._records)))
            else:
                self._storage.forget(_KEY)


def _boot_and_namespace() -> str:
    """Return what tells this boot and network namespace from any other: a cookie is not used again before a reboot."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            namespace = f"cookie {netns_cookie(sock)}"
        except OSError:  # before Linux 5.14
            namespace = f"inode {os.stat('/proc/thread-self/ns/net').st_ino}"
    return f"{probe.boot_id()} {namespace}"
