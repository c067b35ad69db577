"""What is wanted, on disk: SQLite.

A row is written before the host is changed for it, and removed when nothing of it is left on the host.  So the next
daemon finds what a killed one has left unfinished.  A range is one row.  The table `memory` holds what is needed to
restore the host: what a setting was before it was changed, which rules were written.

WAL with synchronous=NORMAL (sqlite.org/pragma.html): a commit survives the daemon's end and costs no fsync; after a
power failure the last commits may be missing, but then the kernel's state is lost, too.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from ipaddress import ip_address, ip_network
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from gangway.errors import HostRefused
from gangway.model import Endpoint, Network, PortMapping, PortRange, Protocol

_TABLES = """
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
"""


class Place(NamedTuple):
    """Where a container's namespace is: its path, and the inode number, which a later one there does not have."""

    namespace: str
    inode: int


class Database:
    """The database at `path`, created if it does not exist.  HostRefused: it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self._lock = RLock()  # leases use it from a thread of their own
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it 0644
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise HostRefused(f"the database {path} cannot be opened: {error}") from None

    def close(self) -> None:
        """Close the database.  A daemon that is killed before loses nothing."""
        self._database.close()

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
        for name, bridge, subnets, gateways, *policy, mtu, on_demand in self._all("networks"):
            addresses = tuple(map(ip_network, subnets.split())), tuple(map(ip_address, gateways.split()))
            masquerade, icc, internal = map(bool, policy)
            yield Network(name, bridge, *addresses, masquerade, icc, internal, mtu), bool(on_demand)

    def endpoints(self) -> Iterator[tuple[Endpoint, Place]]:
        """Yield each endpoint, and where its container is."""
        for container, network, addresses, namespace, inode in self._all("endpoints"):
            yield Endpoint(container, network, tuple(map(ip_address, addresses.split()))), Place(namespace, inode)

    def mappings(self) -> Iterator[PortMapping]:
        """Yield each mapping."""
        for container, protocol, address, *ports in self._all("mappings"):
            host, inner = PortRange(*ports[:2]), PortRange(*ports[2:])
            yield PortMapping(container, Protocol(protocol), _address(address), host, inner)

    def add_network(self, network: Network, on_demand: bool) -> None:
        policy = network.masquerade, network.icc, network.internal, network.mtu, on_demand
        row = network.name, network.bridge, _words(network.subnets), _words(network.gateways), *policy
        self._insert("networks", row)

    def remove_network(self, name: str) -> None:
        self._execute("DELETE FROM networks WHERE name = ?", (name,))

    def add_endpoint(self, endpoint: Endpoint, place: Place) -> None:
        self._insert("endpoints", (endpoint.container, endpoint.network, _words(endpoint.addresses), *place))

    def remove_endpoint(self, container: str) -> None:
        """Remove an endpoint and its mappings."""
        with self.transaction():
            self._execute("DELETE FROM mappings WHERE container = ?", (container,))
            self._execute("DELETE FROM endpoints WHERE container = ?", (container,))

    def add_mappings(self, mappings: Iterable[PortMapping]) -> None:
        with self.transaction():
            for one in mappings:
                ports = one.host_ports.first, one.host_ports.last, one.container_ports.first, one.container_ports.last
                self._insert("mappings", (one.container, one.protocol.value, str(one.host_address), *ports))

    def remove_mappings(self, mappings: Iterable[PortMapping]) -> None:
        with self.transaction():
            for one in mappings:
                key = one.protocol.value, str(one.host_address), one.host_ports.first
                self._execute("DELETE FROM mappings WHERE protocol = ? AND host_address = ? AND host_first = ?", key)

    def remember(self, what: str, value: str) -> None:
        self._execute("INSERT OR REPLACE INTO memory VALUES (?, ?)", (what, value))

    def recall(self, what: str) -> str | None:
        with self._lock:
            row = self._database.execute("SELECT value FROM memory WHERE what = ?", (what,)).fetchone()
        return None if row is None else str(row[0])

    def forget(self, what: str) -> None:
        self._execute("DELETE FROM memory WHERE what = ?", (what,))

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> None:
        try:
            with self._lock:
                self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise HostRefused(f"the database cannot be written: {error}") from None

    def _all(self, table: str) -> Iterator[tuple]:  # type: ignore[type-arg]  # whatever the columns are
        return iter(self._database.execute(f"SELECT * FROM {table}").fetchall())

    def _insert(self, table: str, row: tuple[object, ...]) -> None:
        self._execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


# Most mappings are of 0.0.0.0 or ::.
_address = lru_cache(ip_address)


def _words(values: Iterable[object]) -> str:
    return " ".join(map(str, values))
