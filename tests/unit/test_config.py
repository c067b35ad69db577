"""The daemon's settings: what a file and options may say, which comes first, and how a mistake is named."""

from pathlib import Path
from typing import Any

import pytest

from gangway.daemon.config import Config, load
from gangway.errors import InvalidRequest
from gangway.relay.settings import Settings

EVERYTHING = """\
firewall = "iptables"
ip-forward = false
chain-prefix = "DOCKER"
state = "/var/lib/other.db"

[relay]
workers = 2
udp_timeout_s = 30
log = "/var/log/gangway.log"
"""


BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
# A chain of a target's name is refused, or takes the target's place in the rules.
TARGETS = ("ACCEPT", "DROP", "RETURN", "QUEUE", "MASQUERADE", "DNAT")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gangway.toml"


def refusal(file: Path, text: str) -> str:
    """How `text` is refused."""
    file.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        load(file, {})
    return str(refused.value)


def test_without_anything_there_are_the_defaults(file: Path) -> None:
    assert load(None, {}) == Config()
    assert (Config().firewall, Config().ip_forward, Config().chain_prefix) == ("auto", True, "GANGWAY")
    assert Config().relay_settings == Settings()
    file.write_text("")
    assert load(file, {}) == Config()


def test_a_file_says_what_it_says(file: Path) -> None:
    file.write_text(EVERYTHING)
    found = load(file, {})
    assert (found.firewall, found.ip_forward, found.chain_prefix) == ("iptables", False, "DOCKER")
    assert found.state == "/var/lib/other.db"
    assert found.relay_settings == Settings(workers=2, udp_timeout_s=30, log="/var/log/gangway.log")


@pytest.mark.parametrize(
    ("options", "attribute"),
    [
        ({"firewall": "none"}, "firewall"),
        ({"ip-forward": True}, "ip_forward"),
        ({"chain-prefix": "MINE"}, "chain_prefix"),
        ({"state": "/tmp/state.db"}, "state"),
    ],
)
def test_an_option_comes_before_the_file_and_changes_nothing_else(
    file: Path, options: dict[str, Any], attribute: str
) -> None:
    file.write_text(EVERYTHING)
    from_file, found = load(file, {}), load(file, options)
    assert getattr(found, attribute) == next(iter(options.values()))
    others = {"firewall", "ip_forward", "chain_prefix", "state", "relay"} - {attribute}
    assert all(getattr(found, other) == getattr(from_file, other) for other in others)
    assert getattr(load(None, options), attribute) == next(iter(options.values()))


@pytest.mark.parametrize("firewall", ["auto", "nftables", "iptables", "none"])
def test_the_firewalls_that_there_are(firewall: str) -> None:
    assert load(None, {"firewall": firewall}).firewall == firewall


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('firewall = "ufw"', "unknown firewall 'ufw': auto, nftables, iptables, none"),
        ("firewall = 1", "firewall"),
        ('ip-forward = "no"', "ip-forward"),
        ("ip_forward = false", "ip_forward"),
        ("state = 1", "state"),
        ("fire-wall = 1", "fire-wall"),
        ("relay = 1", "relay"),
        ("[relay]\nworker = 2", "unknown key 'worker'"),
        ("[relay]\nworkers = 0", "workers must be a whole number from 1 to 64, not 0"),
        ('[relay]\nlog = "here"', "log must be"),
        ("firewall", "(at "),
        ('firewall = "none"\nfirewall = "none"', "(at "),
    ],
)
def test_a_mistake_in_the_file_is_named(file: Path, text: str, why: str) -> None:
    assert why in refusal(file, text)


@pytest.mark.parametrize("text", ["firewall = 1", "firewall", "[other]", 'firewall = "ufw"', "[relay]\nworkers = 0"])
def test_the_file_with_the_mistake_is_named(file: Path, text: str) -> None:
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
def test_a_mistake_in_the_options_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(None, options)
    assert str(refused.value).startswith("options: ")
    assert next(iter(options)) in str(refused.value)


def test_a_file_that_is_no_text(file: Path) -> None:
    file.write_bytes(b"state = '\xff\xfe'")
    with pytest.raises(InvalidRequest, match="utf-8"):
        load(file, {})


def test_a_file_that_is_not_there_or_cannot_be_read(file: Path) -> None:
    for path in (file, file.parent):
        with pytest.raises(InvalidRequest) as refused:
            load(path, {})
        assert str(refused.value).startswith(f"{path}: ")
