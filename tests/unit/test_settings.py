"""The settings file: what it may say, and how it is told what it may not."""

from pathlib import Path

import pytest

from gangway.docker_proxy import load_settings
from gangway.errors import InvalidRequest
from gangway.relay.settings import Settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "docker-proxy.toml"


def refusal(file: Path, text: str) -> str:
    """How `text` is refused; the file is always named."""
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        load_settings(file)
    assert str(refused.value).startswith(f"{file}: ")
    return str(refused.value)


def test_without_a_file_there_are_the_defaults(file: Path) -> None:
    assert load_settings(file) == Settings()


def test_an_empty_file_changes_nothing(file: Path) -> None:
    file.write_text("# nothing\n")
    assert load_settings(file) == Settings()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("workers = 1", "workers", 1),
        ("workers = 64", "workers", 64),
        ("connect_timeout_s = 0.1", "connect_timeout_s", 0.1),
        ("connect_timeout_s = 3600", "connect_timeout_s", 3600),
        ("keepalive_s = 1", "keepalive_s", 1),
        ("keepalive_s = 32767", "keepalive_s", 32767),
        ("udp_timeout_s = 1", "udp_timeout_s", 1),
        ("udp_timeout_s = 86400.0", "udp_timeout_s", 86400.0),
        ("udp_clients = 1", "udp_clients", 1),
        ("udp_clients = 1_000_000", "udp_clients", 1_000_000),
        ("tcp_tw_reuse = false", "tcp_tw_reuse", False),
        ("tcp_tw_reuse = true", "tcp_tw_reuse", True),
        ("redirect = false", "redirect", False),
        ("redirect = true", "redirect", True),
        ('log = "syslog"', "log", "syslog"),
        ('log = "/var/log/gangway.log"', "log", "/var/log/gangway.log"),
    ],
)
def test_a_key_sets_itself_alone(file: Path, text: str, key: str, value: object) -> None:
    file.write_text(text)
    assert load_settings(file)._asdict() == {**Settings()._asdict(), key: value}


def test_every_key_can_be_set_to_its_default(file: Path) -> None:
    shown = {True: "true", False: "false"}
    lines = [
        f"{key} = {shown[value] if isinstance(value, bool) else repr(value)}"
        for key, value in Settings()._asdict().items()
    ]
    file.write_text("\n".join(lines))
    assert load_settings(file) == Settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", "0"),
        ("workers", "65"),
        ("workers", "2.0"),
        ("workers", "true"),
        ("workers", '"2"'),
        ("connect_timeout_s", "0.09"),
        ("connect_timeout_s", "3600.1"),
        ("connect_timeout_s", "false"),
        ("connect_timeout_s", "nan"),
        ("connect_timeout_s", "inf"),
        ("keepalive_s", "0"),
        ("keepalive_s", "32768"),
        ("keepalive_s", "1.5"),
        ("udp_timeout_s", "0"),
        ("udp_timeout_s", "-90"),
        ("udp_timeout_s", "86401"),
        ("udp_timeout_s", "2000-01-01"),
        ("udp_clients", "0"),
        ("udp_clients", "1000001"),
        ("udp_clients", "[1]"),
        ("tcp_tw_reuse", "1"),
        ("tcp_tw_reuse", '"true"'),
        ("redirect", "0"),
        ("redirect", '"off"'),
        ("log", "1"),
        ("log", "true"),
        ("log", '"relative/path"'),
        ("log", '""'),
        ("log", "{ path = 1 }"),
    ],
)
def test_a_bad_value_is_named_with_its_key(file: Path, key: str, value: str) -> None:
    assert f": {key} must be " in refusal(file, f"{key} = {value}")


def test_the_message_says_what_would_be_right(file: Path) -> None:
    assert refusal(file, "workers = 0").endswith("workers must be a whole number from 1 to 64, not 0")
    assert "a number from 0.1 to 3600" in refusal(file, "connect_timeout_s = 0")
    assert "true or false" in refusal(file, "tcp_tw_reuse = 1")
    assert "absolute path" in refusal(file, 'log = "here"')


def test_an_unknown_key_is_named_with_those_that_are_known(file: Path) -> None:
    text = refusal(file, "worker = 2")
    assert "unknown key 'worker'" in text
    assert all(key in text for key in Settings._fields)


def test_a_table_is_an_unknown_key(file: Path) -> None:
    assert "unknown key 'relay'" in refusal(file, "[relay]\nworkers = 2")


@pytest.mark.parametrize("text", ["workers = ", "workers 2", "workers = 1\nworkers = 2", "= 1", '"'])
def test_broken_toml_is_told_with_its_place(file: Path, text: str) -> None:
    assert "line" in refusal(file, text) or "end of document" in refusal(file, text)


def test_a_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b"log = '\xff\xfe'")
    with pytest.raises(InvalidRequest, match="utf-8"):
        load_settings(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=str(tmp_path)):
        load_settings(tmp_path)
