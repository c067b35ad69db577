"""What is wanted, on disk: SQLite.

A row is written before the host is changed for it, and removed when nothing of it is left on the host.  So the next
daemon finds what a killed one has left unfinished.  A range is one row.  The table `memory` holds what is needed to
restore the host: what a setting was before it was changed, which rules were written.

WAL with synchronous=NORMAL (sqlite.org/pragma.html): a commit survives the daemon's end and costs no fsync; after a
power failure the last commits may be missing, but then the kernel's state is lost, too.

A file that is damaged is renamed, and a new one takes its place; the kernel's state stays until somebody decides about
it (`gangway cleanup`).  A row that makes no sense is removed, after the file was copied.  Both are logged.
"""

import glob
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from ipaddress import ip_address, ip_network
from itertools import count
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple, TypeVar

from gangway.errors import GangwayError, HostRefused
from gangway.model import Endpoint, Network, PortMapping, PortRange, Protocol, Source

_APPLICATION = 0x676E6777  # "gngw", in the file's header (sqlite.org/pragma.html: application_id)
_MAGIC = b"SQLite format 3\0"
_MIGRATIONS = (
    # Version 1, which was not numbered at first.
    """
    CREATE TABLE IF NOT EXISTS networks (
        name TEXT PRIMARY KEY, bridge TEXT, subnets TEXT, gateways TEXT,
        masquerade INTEGER, icc INTEGER, internal INTEGER, mtu INTEGER, on_demand INTEGER);
    CREATE TABLE IF NOT EXISTS endpoints (
        container TEXT PRIMARY KEY, network TEXT, addresses TEXT, namespace TEXT, inode INTEGER);
    CREATE TABLE IF NOT EXISTS mappings (
        container TEXT, protocol TEXT, host_address TEXT, host_first INTEGER, host_last INTEGER,
        container_first INTEGER, container_last INTEGER,
        PRIMARY KEY (protocol, host_address, host_first)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS memory (what TEXT PRIMARY KEY, value TEXT);
    """,
    """
    ALTER TABLE endpoints ADD COLUMN cookie TEXT DEFAULT '';
    ALTER TABLE endpoints ADD COLUMN owner TEXT DEFAULT '';
    """,
    """
    ALTER TABLE networks ADD COLUMN source TEXT DEFAULT 'api';
    ALTER TABLE networks ADD COLUMN routed TEXT DEFAULT '';
    ALTER TABLE mappings ADD COLUMN source TEXT DEFAULT 'api';
    ALTER TABLE mappings ADD COLUMN is_held INTEGER DEFAULT 0;
    """,
    "ALTER TABLE mappings ADD COLUMN admitted TEXT DEFAULT '';",
    "ALTER TABLE mappings ADD COLUMN is_routed INTEGER DEFAULT 0;",
    """
    ALTER TABLE networks ADD COLUMN has_rules INTEGER DEFAULT 1;
    ALTER TABLE endpoints ADD COLUMN docker_id TEXT DEFAULT '';
    """,
    "ALTER TABLE endpoints ADD COLUMN source TEXT DEFAULT 'api';",
    # A container may be on several networks; where it is stands in each of its rows.
    """
    CREATE TABLE endpoints_of_networks (
        container TEXT, network TEXT, addresses TEXT, namespace TEXT, inode INTEGER, cookie TEXT, owner TEXT,
        docker_id TEXT, source TEXT, is_first INTEGER,
        PRIMARY KEY (container, network));
    INSERT INTO endpoints_of_networks
        SELECT container, network, addresses, namespace, inode, cookie, owner, docker_id, source, 1 FROM endpoints;
    DROP TABLE endpoints;
    ALTER TABLE endpoints_of_networks RENAME TO endpoints;
    """,
)
"""What makes each version (`user_version`) of the one before."""
_COLUMNS = {
    "networks": "name, bridge, subnets, gateways, masquerade, icc, internal, mtu, on_demand, source, routed, has_rules",
    "endpoints": "container, network, addresses, namespace, inode, cookie, owner, docker_id, source, is_first",
    "mappings": "container, protocol, host_address, host_first, host_last, container_first, container_last, "
    "source, is_held, admitted, is_routed",
    "memory": "what, value",
}
# Rows that belong to nothing.
_STRAYS = {"endpoints": "network NOT IN (SELECT name FROM networks)"}
_STRAYS["mappings"] = "container NOT IN (SELECT container FROM endpoints)"
# SQLITE_ERROR: a table or column is missing.
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}


_Made = TypeVar("_Made")


class _Damaged(Exception):
    """The file is no database, or not all of it can be read."""


class Place(NamedTuple):
    """Where a container's network namespace is, and what a later one there does not have."""

    namespace: str  # its path
    inode: int
    cookie: str = ""  # `netns.cookie_at`; empty: not known
    owner: str = ""  # the process at whose end the container is detached (`netns.process_identity`); empty: none
    docker_id: str = ""  # of a container of Docker's


class Database:
    """The database at `path`, created if it does not exist.  `warn` logs what was damaged.

    HostRefused: it cannot be opened, or it is not gangway's.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda _text: None) -> None:
        self.path, self._warn = path, warn
        self._copy: Path | None = None  # of the file, before invalid rows were removed
        self._lock = RLock()  # leases use it from a thread of their own
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it 0644
            try:
                self._database = _opened(path)
            except _Damaged as error:
                kept = self._set_aside()
                warn(f"database {path} is damaged ({error}): kept as {kept}, started with an empty one")
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
                self._database = _opened(path)
            self._remove_strays()
        except (OSError, sqlite3.Error, _Damaged) as error:
            reason = getattr(error, "strerror", None) or error
            raise HostRefused(f"the database {path} cannot be opened: {reason}") from None

    def _set_aside(self) -> Path:
        """Rename a damaged file of gangway's, with what SQLite keeps beside it; return the new name."""
        found = self.path.stat()
        if found.st_mode & 0o077 or found.st_uid != os.geteuid():  # gangway makes its file private
            raise HostRefused(f"{self.path} is not a database of gangway's: name another one with --state")
        kept = _unused(self.path)
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.rename(f"{self.path}{end}", f"{kept}{end}")
        return kept

    def _remove_strays(self) -> None:
        for convert in (self.networks, self.endpoints):  # the registry reads the mappings
            deque(convert(), 0)  # which removes rows that make no sense
        for table, condition in _STRAYS.items():
            for row in self._all(table, f"WHERE {condition}"):
                self._discard(table, row, "it belongs to nothing")

    def _discard(self, table: str, row: tuple[object, ...], reason: object) -> None:
        """Remove a row that makes no sense; before the first one, copy the file."""
        if self._copy is None:
            self._copy = _unused(self.path)
            os.close(os.open(self._copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            with closing(sqlite3.connect(self._copy)) as copy:
                self._database.backup(copy)
        self._warn(f"database {self.path}: removed an invalid row of {table} ({reason}): {row}; copy: {self._copy}")
        condition = " AND ".join(f"{name} IS ?" for name in _COLUMNS[table].split(", "))
        self._execute(f"DELETE FROM {table} WHERE {condition}", row)

    def close(self) -> None:
        """Close the database.  A daemon that is killed before loses nothing."""
        self._database.close()

    def delete(self) -> None:
        """Close the database, and delete its file, but no copies of it.  Whatever is to be written later fails."""
        self.close()
        try:
            for end in ("", "-wal", "-shm"):
                Path(f"{self.path}{end}").unlink(missing_ok=True)
        except OSError as error:
            raise HostRefused(f"the database {self.path} cannot be deleted: {error.strerror}") from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all of the block's changes, or none."""
        with self._lock:
            self._execute("BEGIN IMMEDIATE")
            try:
                yield
                self._execute("COMMIT")
            except BaseException:
                with suppress(HostRefused):  # SQLite has rolled it back by itself, if it was the disk
                    self._execute("ROLLBACK")
                raise

    def networks(self) -> Iterator[tuple[Network, bool]]:
        """Yield each network, and whether it was made on demand."""
        return self._converted("networks", _network)

    def endpoints(self) -> Iterator[tuple[Endpoint, Place]]:
        """Yield each endpoint, and where its container is; the first ones of all containers first."""
        return self._converted("endpoints", _endpoint, "ORDER BY is_first DESC, rowid")

    def mappings(self) -> Iterator[PortMapping]:
        """Yield each mapping."""
        return self._converted("mappings", _mapping)

    def _converted(self, table: str, convert: Callable[..., _Made], order: str = "") -> Iterator[_Made]:
        for row in self._all(table, order):
            try:
                made = convert(*row)
            except (GangwayError, ValueError, TypeError, AttributeError) as error:
                self._discard(table, row, error)
            else:
                yield made

    def add_network(self, network: Network, on_demand: bool) -> None:
        policy = network.masquerade, network.icc, network.internal, network.mtu, on_demand
        row = network.name, network.bridge, _words(network.subnets), _words(network.gateways), *policy
        self._insert("networks", (*row, network.source.value, _words(sorted(network.routed)), network.has_rules))

    def remove_network(self, name: str) -> None:
        self._execute("DELETE FROM networks WHERE name = ?", (name,))

    def add_endpoint(self, endpoint: Endpoint, place: Place) -> None:
        row = endpoint.container, endpoint.network, _words(endpoint.addresses), *place
        self._insert("endpoints", (*row, endpoint.source.value, endpoint.is_first))

    def rename_endpoint(self, container: str, name: str) -> None:
        """Give a container another name, which no other one has."""
        with self.transaction():
            for table in ("endpoints", "mappings"):
                self._execute(f"UPDATE {table} SET container = ? WHERE container = ?", (name, container))

    def remove_endpoint(self, container: str, network: str) -> None:
        self._execute("DELETE FROM endpoints WHERE container = ? AND network = ?", (container, network))

    def remove_container(self, container: str) -> None:
        """Remove a container's endpoints and mappings."""
        with self.transaction():
            self._execute("DELETE FROM mappings WHERE container = ?", (container,))
            self._execute("DELETE FROM endpoints WHERE container = ?", (container,))

    def add_mappings(self, mappings: Iterable[PortMapping]) -> None:
        with self.transaction():
            for one in mappings:
                ports = one.host_ports.first, one.host_ports.last, one.container_ports.first, one.container_ports.last
                row = one.container, one.protocol.value, str(one.host_address), *ports
                self._insert("mappings", (*row, one.source.value, one.is_held, _words(one.admitted), one.is_routed))

    def remove_mappings(self, mappings: Iterable[PortMapping]) -> None:
        with self.transaction():
            for one in mappings:
                key = one.protocol.value, str(one.host_address), one.host_ports.first
                self._execute("DELETE FROM mappings WHERE protocol = ? AND host_address = ? AND host_first = ?", key)

    def remember(self, what: str, value: str) -> None:
        if self.recall(what) == value:
            return  # a full disk must not keep the rules from being restored
        self._execute("INSERT OR REPLACE INTO memory VALUES (?, ?)", (what, value))

    def recall(self, what: str) -> str | None:
        with self._reading(), self._lock:
            row = self._database.execute("SELECT value FROM memory WHERE what = ?", (what,)).fetchone()
        return None if row is None else str(row[0])

    def forget(self, what: str) -> None:
        self._execute("DELETE FROM memory WHERE what = ?", (what,))

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> None:
        try:
            with self._lock:
                self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise HostRefused(f"the database {self.path} cannot be written: {error}") from None

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise HostRefused(f"the database {self.path} cannot be read: {error}") from None

    def _all(self, table: str, clauses: str = "") -> list[tuple]:  # type: ignore[type-arg]  # whatever the columns are
        with self._reading():
            return self._database.execute(f"SELECT {_COLUMNS[table]} FROM {table} {clauses}").fetchall()

    def _insert(self, table: str, row: tuple[object, ...]) -> None:
        self._execute(f"INSERT INTO {table} ({_COLUMNS[table]}) VALUES ({', '.join('?' * len(row))})", row)


def copies_of(path: Path) -> list[Path]:
    """Return the copies of a database that were made before something damaged was removed."""
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.damaged-*"))


def _opened(path: Path) -> sqlite3.Connection:
    """Open a database, and bring it to the current version.  HostRefused: it is not ours to change."""
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) not in (b"", _MAGIC):
            raise _Damaged("not a database")
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.text_factory = lambda text: text.decode(errors="replace")
    try:
        (check,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if check != "ok":
            raise _Damaged(check.splitlines()[-1])
        _check_version(database, path)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        _migrate(database)
        for table, columns in _COLUMNS.items():
            database.execute(f"SELECT {columns} FROM {table} LIMIT 0")
    except UnicodeDecodeError:  # SQLite's message quotes the damaged text
        database.close()
        raise _Damaged("its schema is unreadable") from None
    except (sqlite3.Error, _Damaged, HostRefused) as error:
        database.close()
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF in _DAMAGE:  # without the extended code
            raise _Damaged(error) from None
        raise
    return database


def _check_version(database: sqlite3.Connection, path: Path) -> None:
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    is_foreign = application not in (0, _APPLICATION) or (application == 0 and tables - set(_COLUMNS))
    if is_foreign:
        raise HostRefused(f"{path} is another program's database: name another one with --state")
    if version > len(_MIGRATIONS):
        raise HostRefused(
            f"database {path} has version {version}, and this gangway knows {len(_MIGRATIONS)}: install the newer one "
            "that wrote it, or name another database with --state"
        )


def _migrate(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    for number, statements in enumerate(_MIGRATIONS[version:], version + 1):
        database.executescript(
            f"BEGIN; {statements} PRAGMA user_version = {number}; PRAGMA application_id = {_APPLICATION}; COMMIT;"
        )


def _unused(path: Path) -> Path:
    """Return a name beside `path` that no file has."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (Path(f"{path}.damaged-{stamp}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _network(
    name: str, bridge: str, subnets: str, gateways: str, masquerade: int, icc: int, internal: int, *rest: Any
) -> tuple[Network, bool]:
    addresses = tuple(map(ip_network, subnets.split())), tuple(map(ip_address, gateways.split()))
    mtu, on_demand, source, routed, has_rules = rest
    policy = bool(masquerade), bool(icc), bool(internal), mtu
    families = frozenset(map(int, routed.split()))
    made = Network(name, bridge, *addresses, *policy, Source(source), families, bool(has_rules))
    return made, bool(on_demand)


def _endpoint(
    container: str, network: str, addresses: str, namespace: str, inode: int, *rest: Any
) -> tuple[Endpoint, Place]:
    *identities, source, is_first = rest
    place = Place(namespace, int(inode), *map(str, identities))
    found = tuple(map(ip_address, addresses.split()))
    return Endpoint(container, network, found, Source(source), bool(is_first)), place


def _mapping(container: str, protocol: str, host_address: str, *rest: Any) -> PortMapping:
    *ports, source, is_held, admitted, is_routed = rest
    host, inner = PortRange(*ports[:2]), _container_ports(*ports[2:])
    of = Source(source), bool(is_held), tuple(map(ip_network, admitted.split())), bool(is_routed)
    return PortMapping(container, Protocol(protocol), _address(host_address), host, inner, *of)


# Most mappings are of 0.0.0.0 or ::, and lead to the same few ports.
_address, _container_ports = lru_cache(ip_address), lru_cache(PortRange)


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))
