"""Kernel settings that the daemon changes, and puts back.

What this file knows: what a setting was before, which the store remembers.  What it must not know: what it is for.

What was before is good for this start of the machine only: after another one the setting is whatever the machine's
configuration says.
"""

from gangway.host import probe, sysctl
from gangway.state.database import Database


class SavedSettings:
    """The settings that are changed at the moment."""

    def __init__(self, store: Database) -> None:
        self._database = store

    def set(self, name: str, value: str) -> None:
        """Sets one, unless it is so already.  HostRefused: the kernel does not let us."""
        before = sysctl.read(name)
        if before == value or before is None:
            return
        if not self.has(name):
            self.remember(name, before)
        sysctl.write(name, value)

    def extend(self, name: str, value: str) -> None:
        """Adds to one that is a list."""
        if not self.has(name):
            self.remember(name, sysctl.read(name) or "")
        sysctl.extend(name, value)

    def remember(self, name: str, before: str) -> None:
        """What it is to be put back to, if that is not what was there when it was changed first."""
        self._database.remember(_key(name), f"{probe.boot_id()} {before}")

    def has(self, name: str) -> bool:
        """Whether it is we who changed it."""
        return self.before(name) is not None

    def before(self, name: str) -> str | None:
        """What it was before we changed it; None if we have not."""
        boot, _, value = (self._database.recall(_key(name)) or "").partition(" ")
        return value if boot == probe.boot_id() else None

    def put_back(self, name: str) -> None:
        """As it was before, if we changed it."""
        before = self.before(name)
        if before is not None and sysctl.read(name) not in (None, before):
            sysctl.write(name, before)
        self.keep(name)

    def keep(self, name: str) -> None:
        """It stays as it is, and is not ours any more."""
        self._database.forget(_key(name))


def _key(name: str) -> str:
    return f"setting {name}"
