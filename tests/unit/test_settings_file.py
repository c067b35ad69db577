"""dockerd's settings file: backup, replacement as a whole, and what an error leaves."""

import os
from pathlib import Path

import pytest

from gangway.docker.settings_file import SettingsFile
from gangway.errors import Conflict, GangwayError, HostRefused

BEFORE = '{\n\t"debug": true\n}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "docker" / "daemon.json"


@pytest.fixture
def file(path: Path) -> SettingsFile:
    """A file that exists."""
    path.parent.mkdir()
    path.write_text(BEFORE)
    return SettingsFile(path)


def test_enable_and_disable_leave_the_file_as_it_was(file: SettingsFile, path: Path) -> None:
    path.chmod(0o640)
    assert file.enable({}) == ("iptables", "ip6tables", "userland-proxy")
    assert file.settings() == {"debug": True, "iptables": False, "ip6tables": False, "userland-proxy": False}
    assert file.backup.read_text() == BEFORE
    assert [one.stat().st_mode & 0o777 for one in (path, file.backup)] == [0o640] * 2
    assert file.disable().keys == ("iptables", "ip6tables", "userland-proxy")
    assert path.read_text() == BEFORE
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_did_not_exist_is_gone_again(path: Path) -> None:
    file = SettingsFile(path)
    file.enable({})
    assert file.settings()["iptables"] is False
    assert path.stat().st_mode & 0o777 == 0o644
    file.disable()
    assert os.listdir(path.parent) == []


def test_an_empty_file_stays_empty(file: SettingsFile, path: Path) -> None:
    path.write_text("")
    file.enable({})
    file.disable()
    assert path.read_text() == ""


def test_the_backup_is_the_file_without_gangway_also_after_a_second_edit(file: SettingsFile, path: Path) -> None:
    file.enable({})
    assert file.enable({}) == ()
    path.write_text(path.read_text().replace('"iptables": false', '"iptables": true, "mtu": 1400'))
    assert file.enable({}) == ("iptables",)
    assert file.disable().changed_since == ()
    assert file.settings() == {"debug": True, "iptables": True, "mtu": 1400}


def test_disable_without_a_backup_is_refused(file: SettingsFile, path: Path) -> None:
    path.write_text('{"iptables": false}')
    with pytest.raises(Conflict, match="was not changed by gangway docker enable"):
        file.disable()
    assert path.read_text() == '{"iptables": false}'


def test_disable_does_not_create_a_file_that_was_deleted(file: SettingsFile, path: Path) -> None:
    file.enable({})
    path.unlink()
    assert file.disable().keys == ()
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [(b'{\n "a": 1,\n}', "line 3, column 1"), (b"\xff\xfe{\0}\0", "not UTF-8"), (b'{"a": 1, "a": 2}', "twice")],
)
def test_an_invalid_file_is_left_alone(file: SettingsFile, path: Path, content: bytes, why: str) -> None:
    path.write_bytes(content)
    for action in (file.settings, lambda: file.enable({})):
        with pytest.raises(Conflict, match=why) as error:
            action()
        assert str(path) in str(error.value)
        assert "nothing was changed" in str(error.value)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_a_damaged_backup_is_named_and_changes_nothing(file: SettingsFile, path: Path) -> None:
    file.enable({})
    made = path.read_text()
    file.backup.write_text("{")
    with pytest.raises(Conflict, match=f"{file.backup}: line 1, column 2"):
        file.disable()
    assert path.read_text() == made
    path.write_text(BEFORE)
    with pytest.raises(Conflict, match=f"{file.backup}: line 1, column 2"):
        file.enable({})
    assert path.read_text() == BEFORE


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text(" " * (1 << 20) + "{}")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "long", Path("/dev/zero")):
        with pytest.raises(Conflict, match="is no regular file of at most 1048576 bytes"):
            SettingsFile(path).enable({})
    with pytest.raises(HostRefused, match="No such file or directory"):
        SettingsFile(tmp_path / "no" / "such" / "daemon.json").enable({})
    with pytest.raises(HostRefused, match="Not a directory"):
        SettingsFile(Path("/dev/null/daemon.json")).enable({})


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_failure_leaves_what_was_there(
    file: SettingsFile, path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The n-th call fails: while the backup is written, or the file."""
    real, calls = getattr(os, call), 0

    def fails(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(28, "No space left on device")
        return real(*given)

    monkeypatch.setattr(os, call, fails)
    message = ""
    try:
        file.enable({})
    except GangwayError as error:
        message = str(error)
    monkeypatch.undo()
    assert not message or ("No space left on device" in message and str(path) in message)
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    if not message:
        file.disable()
    assert path.read_text() == BEFORE
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_one(file: SettingsFile, path: Path, tmp_path: Path) -> None:
    link = tmp_path / "daemon.json"
    link.symlink_to(path)
    SettingsFile(link).enable({})
    assert link.is_symlink()
    assert file.settings()["iptables"] is False
    SettingsFile(link).disable()
    assert path.read_text() == BEFORE
