"""The relay's settings: which values they may have, and how mistakes are reported."""

import tomllib

import pytest

from gangway.errors import InvalidRequest
from gangway.relay.settings import TABLE, Settings, checked

FILE = "/etc/gangway.toml"


def parsed(text: str) -> Settings:
    """Return the settings in a text."""
    return checked(tomllib.loads(text), FILE)


def refusal(text: str) -> str:
    """Return the error that a text causes; it always names the file."""
    with pytest.raises(InvalidRequest) as refused:
        parsed(text)
    assert str(refused.value).startswith(f"{FILE}: ")
    return str(refused.value)


def test_every_setting_has_a_default() -> None:
    assert parsed("# nothing\n") == Settings()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("workers = 1", "workers", 1),
        ("workers = 16", "workers", 16),
        ("connect_timeout_s = 0.1", "connect_timeout_s", 0.1),
        ("connect_timeout_s = 3600", "connect_timeout_s", 3600),
        ("keepalive_s = 1", "keepalive_s", 1),
        ("keepalive_s = 32767", "keepalive_s", 32767),
        ("drain_timeout_s = 1", "drain_timeout_s", 1),
        ("drain_timeout_s = 604_800", "drain_timeout_s", 604_800),
        ("udp_timeout_s = 1", "udp_timeout_s", 1),
        ("udp_timeout_s = 86400.0", "udp_timeout_s", 86400.0),
        ("udp_clients = 1", "udp_clients", 1),
        ("udp_clients = 1_000_000", "udp_clients", 1_000_000),
        ("tcp_tw_reuse = false", "tcp_tw_reuse", False),
        ("tcp_tw_reuse = true", "tcp_tw_reuse", True),
        ("redirect = false", "redirect", False),
        ("redirect = true", "redirect", True),
    ],
)
def test_a_key_changes_nothing_else(text: str, key: str, value: object) -> None:
    assert parsed(text)._asdict() == {**Settings()._asdict(), key: value}


def test_every_key_can_be_set_to_its_default() -> None:
    shown = {True: "true", False: "false"}
    lines = [
        f"{key} = {shown[value] if isinstance(value, bool) else repr(value)}"
        for key, value in Settings().table().items()
    ]
    assert parsed("\n".join(lines)) == Settings()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", "0"),
        ("workers", "17"),
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
    ],
)
def test_an_invalid_value_is_reported_with_its_key(key: str, value: str) -> None:
    assert f": {key} must be " in refusal(f"{key} = {value}")


def test_the_error_says_which_values_are_allowed() -> None:
    assert refusal("workers = 0").endswith("workers must be a whole number from 1 to 16, not 0")
    assert "a number from 0.1 to 3600" in refusal("connect_timeout_s = 0")
    assert "true or false" in refusal("tcp_tw_reuse = 1")


def test_an_unknown_key_is_reported_with_those_that_exist() -> None:
    text = refusal("worker = 2")
    assert "unknown key 'worker'" in text
    assert all(key in text for key in TABLE)
    assert "unknown key 'log_level'" in refusal('log_level = "debug"')


def test_a_table_is_an_unknown_key() -> None:
    assert "unknown key 'relay'" in refusal("[relay]\nworkers = 2")
