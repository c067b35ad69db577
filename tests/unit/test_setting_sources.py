"""Where settings come from: which source wins, and what each is called."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway import runtime
from gangway.cli.main import parse
from gangway.daemon import config
from gangway.daemon.config import Config, Loaded, by_name, load, variable
from gangway.daemon.in_force import in_force
from gangway.daemon.start import Start
from gangway.errors import InvalidRequest
from gangway.relay.settings import Settings

OTHERS: dict[str, tuple[str, Any]] = {
    "firewall": ("none", "none"),
    "ip-forward": ("false", False),
    "obey-input": ("true", True),
    "chain-prefix": ("MINE", "MINE"),
    "state": ("/tmp/other.db", "/tmp/other.db"),
    "group": ("daemon", "daemon"),
    "read-group": ("games", "games"),
    "exclude": ("10.0.0.5, eth1", ("10.0.0.5", "eth1")),
    "docker.enabled": ("true", True),
    "docker.socket": ("/run/other.sock", "/run/other.sock"),
    "relay.workers": ("3", 3),
    "relay.connect_timeout_s": ("2", 2.0),
    "relay.keepalive_s": ("20", 20),
    "relay.drain_timeout_s": ("60", 60),
    "relay.udp_timeout_s": ("1.5", 1.5),
    "relay.udp_clients": ("100", 100),
    "relay.udp_clients_per_port": ("10", 10),
    "relay.tcp_tw_reuse": ("false", False),
    "relay.redirect": ("false", False),
    "log": ("/tmp/gangway.log", "/tmp/gangway.log"),
    "log-level": ("debug", "debug"),
    "log-format": ("json", "json"),
}
"""For each setting another value than its default: as a variable, and as it is loaded."""


@pytest.fixture(autouse=True)
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file that is read if no other one is named; it does not exist yet."""
    monkeypatch.setattr(config, "SETTINGS", tmp_path / "etc.toml")
    monkeypatch.setattr(config, "OLD_SETTINGS", tmp_path / "old.toml")
    return tmp_path / "etc.toml"


def test_every_setting_has_a_variable() -> None:
    assert set(OTHERS) == set(by_name(Config()))
    assert variable("ip-forward") == "GANGWAY_IP_FORWARD"
    assert variable("relay.udp_timeout_s") == "GANGWAY_RELAY_UDP_TIMEOUT_S"


@pytest.mark.parametrize("name", OTHERS)
def test_variable_sets_its_setting_and_no_other(name: str) -> None:
    text, value = OTHERS[name]
    found = load(None, {}, {variable(name): text, "PATH": "/bin"})
    assert by_name(found.config) == by_name(Config()) | {name: value}
    assert (found.sources, found.warnings) == ({name: f"environment {variable(name)}"}, [])


@given(st.sets(st.sampled_from(["file", "environment", "option"])))
def test_option_wins_over_environment_over_file(given_by: set[str]) -> None:
    path = Path("/dev/null") if "file" not in given_by else None
    config.SETTINGS.write_text("# the first line\nfirewall = 'nftables'\n")
    options = {"firewall": "none"} if "option" in given_by else {}
    environment = {"GANGWAY_FIREWALL": "iptables"} if "environment" in given_by else {}
    found = load(path, options, environment)
    wanted = next(
        pair
        for by, pair in (
            ("option", ("none", "option")),
            ("environment", ("iptables", "environment GANGWAY_FIREWALL")),
            ("file", ("nftables", f"{config.SETTINGS}:2")),
            ("", ("auto", None)),
        )
        if not by or by in given_by
    )
    assert (found.config.firewall, found.sources.get("firewall")) == wanted


def test_tables_are_overridden_key_by_key(etc: Path) -> None:
    etc.write_text("[relay]\nworkers = 2\nkeepalive_s = 5\n")
    found = load(None, {"docker": {"enabled": True}}, {"GANGWAY_RELAY_WORKERS": "3", "GANGWAY_DOCKER_SOCKET": "/s"})
    assert found.config.relay_settings == Settings(workers=3, keepalive_s=5)
    assert (found.config.docker.enabled, found.config.docker.socket) == (True, "/s")
    assert found.sources == {
        "relay.workers": "environment GANGWAY_RELAY_WORKERS",
        "relay.keepalive_s": f"{etc}:3",
        "docker.enabled": "option",
        "docker.socket": "environment GANGWAY_DOCKER_SOCKET",
    }


def test_line_is_left_out_where_a_setting_has_none_of_its_own(etc: Path) -> None:
    etc.write_text("relay = {workers = 2}\ndocker.enabled = true\n")
    assert load(None, {}, {}).sources == {"relay.workers": str(etc), "docker.enabled": f"{etc}:2"}


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("GANGWAY_IP_FORWARD", "no", "GANGWAY_IP_FORWARD must be true or false, not 'no'"),
        ("GANGWAY_RELAY_WORKERS", "many", "GANGWAY_RELAY_WORKERS must be a whole number, not 'many'"),
        ("GANGWAY_RELAY_WORKERS", "99", "GANGWAY_RELAY_WORKERS: relay: workers must be a whole number from 1 to 16"),
        ("GANGWAY_RELAY_UDP_TIMEOUT_S", "x", "GANGWAY_RELAY_UDP_TIMEOUT_S must be a number, not 'x'"),
        ("GANGWAY_RELAY_UDP_TIMEOUT_S", "nan", "udp_timeout_s must be a number from 1 to 86400"),
        ("GANGWAY_FIREWALL", "ufw", "GANGWAY_FIREWALL: unknown firewall 'ufw'"),
        ("GANGWAY_EXCLUDE", "10.0.0.0/8", "GANGWAY_EXCLUDE: invalid exclude '10.0.0.0/8'"),
    ],
)
def test_mistake_in_the_environment_names_the_variable(name: str, text: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(None, {}, {name: text})
    assert why in str(refused.value)


def test_unknown_variable_is_a_warning_and_an_empty_one_is_none() -> None:
    found = load(None, {}, {"GANGWAY_FIREWAL": "none", "GANGWAY_SOCKET": "/run/g.sock", "GANGWAY_FIREWALL": ""})
    assert (found.config, found.sources) == (Config(), {})
    (warning,) = found.warnings
    assert warning.startswith("GANGWAY_FIREWAL in the environment names no setting")


def _loaded(**given_by_option: Any) -> Loaded:
    return load(None, {name.replace("_", "-"): value for name, value in given_by_option.items()}, {})


def test_settings_in_force() -> None:
    found = {one.name: one for one in in_force(_loaded(), _loaded(firewall="iptables"), is_relay_former=False)}
    assert list(found) == list(by_name(Config()))
    assert (found["firewall"].value, found["firewall"].source, found["firewall"].note) == ("iptables", "option", "")
    assert (found["ip-forward"].value, found["ip-forward"].source) == (True, "default")


def test_what_takes_effect_later_is_shown_as_it_is_now() -> None:
    started, now = _loaded(), _loaded(chain_prefix="MINE", relay={"workers": 9})
    for is_relay_former in (True, False):
        found = {one.name: one for one in in_force(started, now, is_relay_former)}
        prefix, workers = found["chain-prefix"], found["relay.workers"]
        assert (prefix.value, prefix.source) == ("GANGWAY", "default")
        assert prefix.note == '"MINE" (option) from the daemon\'s next start'
        if is_relay_former:
            assert (workers.value, workers.note) == (Settings().workers, "9 (option) from the relay's next start")
        else:
            assert (workers.value, workers.source, workers.note) == (9, "option", "")


def test_daemon_on_demand_is_started_like_the_operators_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "folder", lambda: str(tmp_path))
    own = {"GANGWAY_FIREWALL": "none", "GANGWAY_RELAY_WORKERS": "2", "SECRET": "1"}
    Start(socket="/run/own.sock", options={"ip-forward": False}).record(own)
    assert "SECRET" not in json.loads((tmp_path / "start.json").read_text())["environment"]
    later = Start(until_idle=True)
    later.apply_last()
    found = later.load({"GANGWAY_RELAY_WORKERS": "3"})
    assert later.socket == "/run/own.sock"
    assert (found.config.firewall, found.config.ip_forward) == ("none", False)
    assert found.config.relay_settings.workers == 3


def test_how_a_daemon_was_started_is_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["daemon", "--firewall", "none", "--no-ip-forward", "--exclude", "eth1", "--exclude", "10.0.0.5"]
    words += ["--docker", "--state", "/srv/a b.db", "--config", "/srv/gangway.toml", "--socket", "/run/own.sock"]
    executed: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _program, command: executed.append(command))
    function, given_by_option = parse(words)
    function(**given_by_option)
    started = msgspec.json.decode(executed[0][-1], type=Start)
    assert parse(shlex.split(started.command_line())[1:]) == (function, given_by_option)
