"""The daemon's settings: what files and options may contain, which of them wins, and how mistakes are reported."""

import grp
from pathlib import Path
from typing import Any

import pytest

from gangway.daemon import config
from gangway.daemon.config import Config
from gangway.errors import InvalidRequest
from gangway.relay.settings import Settings

EVERYTHING = """\
firewall = "iptables"
ip-forward = false
chain-prefix = "DOCKER"
state = "/var/lib/other.db"
group = "root"
log = "/var/log/gangway.log"
log-level = "debug"
log-format = "json"

[docker]
socket = "/run/other.sock"

[relay]
workers = 2
udp_timeout_s = 30
"""


BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
# iptables refuses a chain with such a name, or uses it instead of the target.
TARGETS = ("ACCEPT", "DROP", "RETURN", "QUEUE", "MASQUERADE", "DNAT")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file; those in /etc are this test's own, and do not exist yet."""
    monkeypatch.setattr(config, "SETTINGS", tmp_path / "etc.toml")
    monkeypatch.setattr(config, "OLD_SETTINGS", tmp_path / "docker-proxy.toml")
    return tmp_path / "gangway.toml"


def load(path: Path | None, options: dict[str, Any]) -> Config:
    """Return settings that cause no warnings."""
    found = config.load(path, options, {})
    assert found.warnings == []
    return found.config


def refusal(file: Path, text: str) -> str:
    """Return the error that `text` causes."""
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        load(file, {})
    return str(refused.value)


def test_log_that_cannot_be_written_is_refused(file: Path) -> None:
    text = refusal(file, 'log = "/nowhere/log"\n')
    assert text == f"{file}: log cannot be written to '/nowhere/log': there is no folder /nowhere"
    assert 'it must be "auto", "syslog" or a file\'s absolute path' in refusal(file, 'log = "here"')


def test_log_in_the_table_of_the_relay_is_deprecated(file: Path) -> None:
    file.write_text('[relay]\nlog = "syslog"\nworkers = 2\n')
    found, warnings, sources = config.load(file, {}, {})
    assert (found.log, found.relay_settings.workers) == ("syslog", 2)
    assert warnings == [f"{file}: log in the table [relay] is deprecated: move it before the first table"]
    assert sources["log"] == f"{file}:2"
    file.write_text('log = "auto"\n[relay]\nlog = "syslog"\n')
    assert config.load(file, {}, {}).config.log == "auto"


def test_everything_has_a_default(file: Path) -> None:
    assert load(None, {}) == Config()
    assert (Config().firewall, Config().ip_forward, Config().chain_prefix) == ("auto", True, "GANGWAY")
    assert Config().relay_settings == Settings()
    file.write_text("")
    assert load(file, {}) == Config()


def test_a_file_sets_every_key(file: Path) -> None:
    file.write_text(EVERYTHING)
    found = load(file, {})
    assert (found.firewall, found.ip_forward, found.chain_prefix) == ("iptables", False, "DOCKER")
    assert (found.state, found.group, found.docker.socket) == ("/var/lib/other.db", "root", "/run/other.sock")
    log = {"log": "/var/log/gangway.log", "log_level": "debug", "log_format": "json"}
    assert found.relay_settings == Settings(workers=2, udp_timeout_s=30, **log)  # type: ignore[arg-type]
    assert (found.log, found.log_level, found.log_format) == tuple(log.values())


@pytest.mark.parametrize(
    ("options", "attribute"),
    [
        ({"firewall": "none"}, "firewall"),
        ({"ip-forward": True}, "ip_forward"),
        ({"chain-prefix": "MINE"}, "chain_prefix"),
        ({"state": "/tmp/state.db"}, "state"),
        ({"log-level": "warning"}, "log_level"),
        ({"log-format": "text"}, "log_format"),
    ],
)
def test_an_option_overrides_the_file_and_changes_nothing_else(
    file: Path, options: dict[str, Any], attribute: str
) -> None:
    file.write_text(EVERYTHING)
    from_file, found = load(file, {}), load(file, options)
    assert getattr(found, attribute) == next(iter(options.values()))
    others = {*Config.__struct_fields__} - {attribute}
    assert all(getattr(found, other) == getattr(from_file, other) for other in others)
    assert getattr(load(None, options), attribute) == next(iter(options.values()))


@pytest.mark.parametrize("firewall", ["auto", "nftables", "iptables", "none"])
def test_every_firewall_is_accepted(firewall: str) -> None:
    assert load(None, {"firewall": firewall}).firewall == firewall


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('firewall = "ufw"', "unknown firewall 'ufw': auto, nftables, iptables, none"),
        ("firewall = 1", "firewall"),
        ('log-level = "loud"', "unknown log-level 'loud': debug, info, warning, error"),
        ('log-format = "xml"', "unknown log-format 'xml': text, json"),
        ('ip-forward = "no"', "ip-forward"),
        ("ip_forward = false", "ip_forward"),
        ("state = 1", "state"),
        ("fire-wall = 1", "fire-wall"),
        ("group = 0", "group"),
        ('group = "no-such-group"', "invalid group 'no-such-group'"),
        ('read-group = "no-such-group"', "invalid read-group 'no-such-group'"),
        ("docker = 1", "docker"),
        ('[docker]\nsocket = "docker.sock"', "docker: socket must be an absolute path, not 'docker.sock'"),
        ('[docker]\nsokcet = "/run/docker.sock"', "sokcet"),
        ("[docker]\nenabled = 1", "docker.enabled"),
        ("relay = 1", "relay"),
        ("[relay]\nworker = 2", "unknown key 'worker'"),
        ("[relay]\nworkers = 0", "workers must be a whole number from 1 to 16, not 0"),
        ('[relay]\nlog = "here"', "log cannot be written to 'here': it must be"),
        ("firewall", "(at "),
        ('firewall = "none"\nfirewall = "none"', "(at "),
    ],
)
def test_a_mistake_in_the_file_is_reported(file: Path, text: str, why: str) -> None:
    assert why in refusal(file, text)


@pytest.mark.parametrize("text", ["firewall = 1", "firewall", "[other]", 'firewall = "ufw"', "[relay]\nworkers = 0"])
def test_the_error_names_the_file(file: Path, text: str) -> None:
    assert refusal(file, text).startswith(f"{file}: ")


@pytest.mark.parametrize("prefix", ["G", "DOCKER", "Chain7", "A" * 20])
def test_a_prefix_is_letters_and_digits(prefix: str) -> None:
    assert load(None, {"chain-prefix": prefix}).chain_prefix == prefix


@pytest.mark.parametrize(
    "prefix",
    ["", "A" * 21, "A B", "A-B", "-A", "A\n", "Ä", *BUILT_IN, *TARGETS],
)
def test_any_other_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(None, {"chain-prefix": prefix})
    assert repr(prefix) in str(refused.value)


@pytest.mark.parametrize("options", [{"firewall": 1}, {"ip-forward": "no"}, {"until-idle": True}])
def test_a_mistake_in_the_options_is_reported(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(None, options)
    assert str(refused.value).startswith("options: ")
    assert next(iter(options)) in str(refused.value)


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"state = '\xff\xfe'")
    with pytest.raises(InvalidRequest, match="utf-8"):
        load(file, {})


def test_a_missing_or_unreadable_file_is_refused(file: Path) -> None:
    for path in (file, file.parent):
        with pytest.raises(InvalidRequest) as refused:
            load(path, {})
        assert str(refused.value).startswith(f"{path}: ")


def test_the_settings_in_etc_are_read_unless_another_file_is_named(file: Path) -> None:
    config.SETTINGS.write_text('firewall = "none"')
    assert load(None, {}).firewall == "none"
    assert load(None, {"firewall": "auto"}).firewall == "auto"
    file.write_text("")
    assert load(file, {}).firewall == "auto"
    config.SETTINGS.write_text("fire = 1")
    with pytest.raises(InvalidRequest, match=f"^{config.SETTINGS}: .*fire"):
        load(None, {})


def test_an_option_that_is_a_table_leaves_the_tables_other_keys(file: Path) -> None:
    file.write_text('[docker]\nsocket = "/run/other.sock"')
    for path, socket in ((None, "/var/run/docker.sock"), (file, "/run/other.sock")):
        assert load(path, {}).docker == config.Docker(False, socket)
        assert load(path, {"docker": {"enabled": True}}).docker == config.Docker(True, socket)


def test_the_old_file_is_read_as_relay_settings_with_a_warning(file: Path) -> None:
    config.OLD_SETTINGS.write_text("workers = 3\nudp_timeout_s = 5")
    file.write_text("[relay]\nworkers = 2")
    for path, workers in ((None, 3), (file, 2)):
        found, warnings, sources = config.load(path, {}, {})
        assert found.relay_settings == Settings(workers=workers, udp_timeout_s=5)
        assert sources["relay.udp_timeout_s"] == f"{config.OLD_SETTINGS}:2"
        assert sources["relay.workers"] == (f"{file}:2" if path else f"{config.OLD_SETTINGS}:1")
        assert len(warnings) == 1
        assert str(config.OLD_SETTINGS) in warnings[0]
        assert f"is deprecated: move its keys to the table [relay] of {config.SETTINGS}" in warnings[0]


@pytest.mark.parametrize("text", ["workers = ", "workers = 0", "wrokers = 1", "[relay]\nworkers = 1"])
def test_a_mistake_in_the_old_file_is_reported(text: str) -> None:
    config.OLD_SETTINGS.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        config.load(None, {}, {})
    assert str(refused.value).startswith(f"{config.OLD_SETTINGS}: ")


def test_an_old_file_that_cannot_be_read_is_refused() -> None:
    config.OLD_SETTINGS.mkdir()
    with pytest.raises(InvalidRequest, match=f"^{config.OLD_SETTINGS}: Is a directory$"):
        config.load(None, {}, {})


def test_the_group_of_the_api_socket_defaults_to_gangway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "GROUP", "no-such-group")
    monkeypatch.setattr(config, "READ_GROUP", "no-such-group")
    assert Config().group_ids == (0, 0)
    monkeypatch.setattr(config, "GROUP", "tty")
    monkeypatch.setattr(config, "READ_GROUP", "games")
    tty, games, daemon = (grp.getgrnam(name).gr_gid for name in ("tty", "games", "daemon"))
    assert Config().group_ids == (tty, games)
    assert Config(group="daemon").group_ids == (daemon, games)
    assert Config(read_group="daemon").group_ids == (tty, daemon)
