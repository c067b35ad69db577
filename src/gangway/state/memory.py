"""What a database remembers (`Database.remember`), read without a daemon, and without changing any file."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote


class Memory:
    """A copy of what the database at `path` remembers; nothing if there is none, or if it is damaged."""

    def __init__(self, path: Path) -> None:
        # SQLite would make files beside a database that was closed; one that is open, or was not closed, has them.
        wal = Path(f"{path}-wal")
        mode = "mode=ro" if wal.exists() and wal.stat().st_size else "mode=ro&immutable=1"
        try:
            with closing(sqlite3.connect(f"file:{quote(str(path))}?{mode}", uri=True)) as database:
                self._texts = dict(database.execute("SELECT what, value FROM memory"))
        except sqlite3.Error:
            self._texts = {}

    def recall(self, what: str) -> str | None:
        return self._texts.get(what)

    def remember(self, what: str, value: str) -> None:
        self._texts[what] = value

    def forget(self, what: str) -> None:
        self._texts.pop(what, None)
