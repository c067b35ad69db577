"""The database's file: what becomes of an old, a newer, a damaged, and somebody else's one."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gangway.errors import HostRefused
from gangway.model import Endpoint, Network, Source
from gangway.state.database import Database, Place
from tests.unit.samples import WEB, mapping

BOX = Endpoint("box", "web", (ip_address("172.30.0.2"),))
PLACE = Place("/run/netns/box", 4026532000, "boot 7", "boot 12 34567", "3fa9")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database with a network, an endpoint and two mappings."""
    found = tmp_path / "state.db"
    _fill(found)
    return found


def _fill(path: Path) -> None:
    with closing(Database(path)) as database:
        database.add_network(WEB, on_demand=False)
        database.add_endpoint(BOX, PLACE)
        database.add_mappings([mapping("0.0.0.0", "80", container="box"), mapping("::", "80", container="box")])


def _content(database: Database) -> tuple[list[Network], list[tuple[Endpoint, Place]], int]:
    found = [network for network, _ in database.networks()], list(database.endpoints())
    return *found, len(list(database.mappings()))


def _execute(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(script)


def _opened(path: Path) -> tuple[tuple[list[Network], list[tuple[Endpoint, Place]], int], list[str]]:
    """Return the content of a database, and what was logged."""
    log: list[str] = []
    with closing(Database(path, log.append)) as database:
        return _content(database), log


def test_everything_is_kept(path: Path) -> None:
    assert _opened(path) == (([WEB], [(BOX, PLACE)], 2), [])


_ADDED = (
    ("endpoints", "cookie"),
    ("endpoints", "owner"),
    ("networks", "source"),
    ("networks", "routed"),
    ("mappings", "source"),
    ("mappings", "is_held"),
    ("mappings", "admitted"),
    ("mappings", "is_routed"),
    ("networks", "has_rules"),
    ("endpoints", "docker_id"),
    ("endpoints", "source"),
    ("endpoints", "is_first"),
)
"""The columns that version 1 did not have."""


def test_a_file_without_a_version_is_migrated(path: Path) -> None:
    for table, column in _ADDED:
        _execute(path, f"ALTER TABLE {table} DROP COLUMN {column};")
    _execute(path, "PRAGMA user_version = 0; PRAGMA application_id = 0;")
    assert _opened(path) == (([WEB], [(BOX, Place(PLACE.namespace, PLACE.inode))], 2), [])
    assert _opened(path)[1] == []


def test_a_container_of_version_7_is_on_its_first_network(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    _fill(path)
    _execute(
        path,
        """
        DROP TABLE endpoints;
        CREATE TABLE endpoints (
            container TEXT PRIMARY KEY, network TEXT, addresses TEXT, namespace TEXT, inode INTEGER,
            cookie TEXT DEFAULT '', owner TEXT DEFAULT '', docker_id TEXT DEFAULT '', source TEXT DEFAULT 'api');
        INSERT INTO endpoints VALUES
            ('box', 'web', '172.30.0.2', '/run/netns/box', 4026532000, 'boot 7', 'boot 12 34567', '3fa9', 'declared'),
            ('other', 'web', '172.30.0.3', '/run/netns/other', 4026532001, '', '', '', 'api');
        PRAGMA user_version = 7;
        """,
    )
    with closing(Database(path)) as database:
        other = Endpoint("other", "web", (ip_address("172.30.0.3"),))
        place = Place("/run/netns/other", 4026532001)
        assert list(database.endpoints()) == [(replace(BOX, source=Source.DECLARED), PLACE), (other, place)]
        assert len(list(database.mappings())) == 2
        database.add_endpoint(replace(other, network="back", is_first=False), place)
        assert [one.is_first for one, _ in database.endpoints()] == [True, True, False]


def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    _execute(path, "PRAGMA user_version = 99;")
    before = path.read_bytes()
    with pytest.raises(HostRefused, match="has version 99, and this gangway knows 8: install the newer one"):
        Database(path)
    assert path.read_bytes() == before


def test_a_column_more_does_no_harm(path: Path) -> None:
    _execute(path, "ALTER TABLE networks ADD COLUMN colour TEXT;")
    assert _opened(path) == (([WEB], [(BOX, PLACE)], 2), [])


def _truncate(path: Path) -> None:
    os.truncate(path, 5000)


def _overwrite(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def _garble(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(os.path.getsize(path) - 4096))


def _drop_column(path: Path) -> None:
    _execute(path, "ALTER TABLE networks DROP COLUMN on_demand;")


@pytest.mark.parametrize("damage", [_truncate, _overwrite, _garble, _drop_column])
def test_a_damaged_file_is_kept_aside_and_named(path: Path, damage: Callable[[Path], None]) -> None:
    damage(path)
    damaged = path.read_bytes()
    content, (text,) = _opened(path)
    assert content == ([], [], 0)
    (kept,) = path.parent.glob("state.db.damaged-*")
    assert f"database {path} is damaged (" in text
    assert f"kept as {kept}" in text
    assert kept.read_bytes() == damaged
    _fill(path)
    assert _opened(path) == (([WEB], [(BOX, PLACE)], 2), [])


def test_two_damaged_files_are_both_kept(path: Path) -> None:
    for _ in range(2):
        _overwrite(path)
        _opened(path)
    assert len(list(path.parent.glob("state.db.damaged-*"))) == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_is_more_than_a_refusal(path: Path, data: st.DataObject) -> None:
    """Some bytes anywhere in the file are replaced."""
    path.unlink()
    _fill(path)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(content)
    with suppress(HostRefused):  # it may look like another program's, or like a newer one
        _opened(path)


def test_another_programs_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    notes, theirs = tmp_path / "notes", tmp_path / "theirs.db"
    notes.write_text("important")
    _execute(theirs, "CREATE TABLE songs (name TEXT); INSERT INTO songs VALUES ('one');")
    for path, message in ((notes, "is not a database of gangway's"), (theirs, "is another program's database")):
        before = path.read_bytes()
        with pytest.raises(HostRefused, match=message):
            Database(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "left", "reason"),
    [
        ("UPDATE mappings SET host_address = 'x' WHERE host_address = '0.0.0.0'", (1, 1, 1), "'x' does not appear"),
        ("UPDATE mappings SET host_first = 'many' WHERE host_address = '::'", (1, 1, 1), "mappings"),
        ("UPDATE mappings SET protocol = 'icmp' WHERE host_address = '::'", (1, 1, 1), "'icmp'"),
        ("UPDATE mappings SET admitted = 'all' WHERE host_address = '::'", (1, 1, 1), "'all'"),
        ("UPDATE networks SET subnets = NULL", (0, 0, 0), "networks"),
        ("UPDATE endpoints SET addresses = '1.2.3'", (1, 0, 0), "1.2.3"),
        ("UPDATE endpoints SET network = 'other'", (1, 0, 0), "it belongs to nothing"),
    ],
)
def test_rows_that_make_no_sense_are_removed_and_the_file_is_copied(
    path: Path, change: str, left: tuple[int, int, int], reason: str
) -> None:
    _execute(path, change)
    (networks, endpoints, mappings), log = _opened(path)
    assert (len(networks), len(endpoints), mappings) == left
    (kept,) = path.parent.glob("state.db.damaged-*")
    assert reason in log[0]
    assert all(f"copy: {kept}" in text for text in log)
    assert _opened(path) == ((networks, endpoints, mappings), [])
    with closing(sqlite3.connect(kept)) as copy:
        assert copy.execute("SELECT count(*) FROM mappings").fetchone() == (2,)
