"""The one owner of every host setting that gangway changes: sysctls, the policy of a chain, lists.

A setting is recorded when it is first changed: its value before, and the value that gangway wrote.  It is restored to
the former unless another program has changed it since; then the newer value stays.  A record is stored before the
setting is written, so a daemon that was killed at any point finds what it has to restore.

Records are valid for one boot and one network namespace; those from elsewhere are discarded.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, Protocol

from gangway.errors import GangwayError, HostRefused
from gangway.host import probe, sysctl
from gangway.runtime import netns_identity

_KEY = "saved settings"


class Storage(Protocol):
    """Texts by name that survive the process; `state.database.Database` is one."""

    def remember(self, what: str, value: str) -> None:
        """Store a text under a name."""

    def recall(self, what: str) -> str | None:
        """Return the text under a name; None if there is none."""

    def forget(self, what: str) -> None:
        """Delete the text under a name, if there is one."""


class Setting(NamedTuple):
    """A setting, how to read and write it, and when to restore it."""

    name: str
    read: Callable[[], str | None]  # return the value; None if the host has no such setting
    write: Callable[[str], None]  # HostRefused: the value was not changed
    without_ours: Callable[[str, str, str], str] = lambda _before, _written, now: now
    """Given the values before, written by gangway, and now, which differs from the one written: return the value to
    restore.  As a rule the one that another program has set stays."""
    dependents: Callable[[], Collection[str]] = tuple
    """Return what relies on the setting now.  If there is more than when gangway changed it, it is not restored."""
    reason_to_stay: str = "left unchanged: {} relies on it"
    """What is logged then, after the setting's name; {} is replaced by the new dependents."""


class _Record(NamedTuple):
    before: str
    written: str | None  # None: not known yet; `before` is restored whatever the value is
    restored_with: str = ""  # the setting that this one is restored with
    dependents: Collection[str] = ()


class SavedSettings:
    """The settings that gangway has changed in the calling thread's network namespace.  Thread-safe.

    `warn` logs what could not be restored, and why.  A name that was not registered is a sysctl's.  Changes of one
    setting are made one after the other; none waits for another setting, which a tool may have to write.
    """

    def __init__(self, storage: Storage, warn: Callable[[str], None]) -> None:
        self._storage, self.warn = storage, warn
        self._lock = RLock()
        """Guards what is recorded.  It is not held while a setting is read or written."""
        self._unrestored: set[str] = set()  # what could not be restored, which was logged
        self._changing: dict[str, Any] = defaultdict(RLock)
        self._settings: dict[str, Setting] = {}
        self._scope = f"{probe.boot_id()} {netns_identity()}"
        scope, records = json.loads(storage.recall(_KEY) or '["", {}]')
        self._records = {name: _Record(*record) for name, record in records.items()} if scope == self._scope else {}

    def register(self, setting: Setting) -> None:
        """Make a setting known that is not an ordinary sysctl."""
        self._settings[setting.name] = setting

    def set(self, name: str, value: str, side_effects: Iterable[str] = (), restored_with: str = "") -> None:
        """Set a value.  A setting that the host does not have is skipped.

        `side_effects` are sysctls that the kernel changes along with it: they are recorded, and restored with it.
        `restored_with` names another setting that this one is to be restored with.  HostRefused: it was not changed,
        and nothing more is recorded.
        """
        setting = self._setting(name)
        with self._exclusively(name):
            now = setting.read()
            if now is not None and (now != value or not self.is_intact(name)):
                self._change(name, partial(setting.write, value), tuple(side_effects), restored_with)

    def extend(self, name: str, text: str) -> None:
        """Add to a sysctl that is a list.  HostRefused: it was not changed."""
        with self._exclusively(name):
            self._change(name, partial(sysctl.extend, name, text))

    def restore(self, name: str) -> None:
        """Restore a setting, and all that is restored with it.  HostRefused: it was not, and stays recorded.

        Where settings cannot be written at all, that is logged instead, and it stays recorded, too.
        """
        with self._exclusively(name):
            names = [other for other in self._records if name in (other, self._records[other].restored_with)]
            names.sort(key=lambda other: other != name)
            if names:
                if not self._has_new_dependents(name) and not self._try_to_write_back(names):
                    return
                self._unrestored.discard(name)
                self._record(dict.fromkeys(names))

    def is_changed(self, name: str) -> bool:
        """True if gangway has changed the setting and not restored it."""
        return name in self._records

    def unrestored(self) -> dict[str, dict[str, str]]:
        """Return the settings that gangway has changed and that are to be restored, by name.

        Each comes with the values to write, in that order: its own, and those of what is restored with it.
        """
        found: dict[str, dict[str, str]] = {}
        for name in sorted(self._records, key=lambda one: bool(self._records[one].restored_with)):
            value = self.original(name)
            if value not in (None, self._setting(name).read()):
                found.setdefault(self._records[name].restored_with or name, {})[name] = value or ""
        return found

    def is_intact(self, name: str) -> bool:
        """True if no other program has changed the setting since gangway did, if it did."""
        return name not in self._records or self._records[name].written in (None, self._setting(name).read())

    def original(self, name: str) -> str | None:
        """Return the value that the setting would have without gangway; None if the host has no such setting."""
        setting, record = self._setting(name), self._records.get(name)
        now = setting.read()
        if now is None or record is None:
            return now
        is_ours = record.written in (None, now)
        return record.before if is_ours else setting.without_ours(record.before, record.written or "", now)

    def _change(
        self, name: str, write: Callable[[], None], side_effects: Iterable[str] = (), restored_with: str = ""
    ) -> None:
        own = self._records.get(name) or _Record("", None, restored_with, sorted(self._setting(name).dependents()))
        beside = {
            side: _Record(value, None, name)
            for side in side_effects
            if side not in self._records and (value := sysctl.read(side)) is not None
        }
        own = own._replace(before=self.original(name) or "", written=None)
        with self._recording({**beside, name: own}):
            write()
        # What the kernel made of it: it may spell a value in another way.
        changed = [other for other in (name, *side_effects) if other in self._records]
        self._record({other: self._records[other]._replace(written=self._setting(other).read()) for other in changed})

    def _try_to_write_back(self, names: Sequence[str]) -> bool:
        """Restore settings; False if they cannot be written at all."""
        try:
            self._write_back(names)
        except sysctl.ReadOnly as error:
            if names[0] not in self._unrestored:
                self.warn(f"{error}: it keeps the value that gangway has set, and is restored when it can be written")
            self._unrestored.add(names[0])
            return False
        return True

    def _write_back(self, names: Collection[str]) -> None:
        """Restore settings, the first one first: it may change the others."""
        now = {name: self._setting(name).read() for name in names}
        wanted = {name: value for name in names if (value := self.original(name)) is not None}
        for name, value in wanted.items():
            if now[name] == value != self._records[name].before:
                self.warn(f"{name} was changed by another program: left as it is")
        # A daemon that dies in between has to write all of them, whatever it finds then.
        unknown = {name: self._records[name]._replace(before=value, written=None) for name, value in wanted.items()}
        with self._recording(unknown):
            for number, (name, value) in enumerate(wanted.items()):
                with suppress(*([HostRefused] if number else [])):  # the interface may have been removed meanwhile
                    if self._setting(name).read() != value:
                        self._setting(name).write(value)

    def _has_new_dependents(self, name: str) -> bool:
        record, setting = self._records.get(name), self._setting(name)
        found = sorted(set(setting.dependents()) - set(record.dependents)) if record is not None else []
        if found:
            self.warn(f"{name} {setting.reason_to_stay.format(', '.join(found))}")
        return bool(found)

    @contextmanager
    def _recording(self, records: dict[str, _Record]) -> Iterator[None]:
        """Store records before the block changes the settings; discard them if that fails."""
        former = {name: self._records.get(name) for name in records}
        try:
            self._record(records)
            yield
        except GangwayError:
            with suppress(GangwayError):
                self._record(former)
            raise

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
