"""What the commands that are about the daemon itself print."""

from typing import Any

import pytest

from gangway import __version__
from gangway.cli.lifecycle import described, mismatches, versions

STATUS: dict[str, Any] = {
    "version": __version__,
    "pid": 12,
    "started": 1000.0,
    "is_service": True,
    "on_demand": False,
    "folder": "/run/gangway/netns-1",
    "socket": "/run/gangway/netns-1/gangway.sock",
    "relay_version": __version__,
    "relay_pid": 34,
    "networks": 1,
    "containers": 2,
    "mappings": 3,
    "leases": 4,
}
WITHOUT_RELAY = {"relay_pid": None, "relay_version": ""}


def test_status() -> None:
    assert described(STATUS, 1000.0 + 3 * 3600 + 125) == [
        f"daemon      {__version__}  pid 12, for 3 h 2 min",
        "started by  a service manager",
        "socket      /run/gangway/netns-1/gangway.sock",
        f"relay       {__version__}  pid 34",
        "networks    1",
        "containers  2",
        "mappings    3",
        "leases      4",
    ]
    assert "relay       not running" in described(STATUS | WITHOUT_RELAY, 1000.0)


@pytest.mark.parametrize(
    ("age_s", "text"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (86_400, "1 d"), (90_061, "1 d 1 h"), (-5, "0 s")]
)
def test_how_long_a_daemon_runs(age_s: int, text: str) -> None:
    (line, *_) = described(STATUS, 1000.0 + age_s)
    assert line.endswith(f"pid 12, for {text}")


def test_versions() -> None:
    assert [*versions(None)] == [f"client  {__version__}", "daemon  not running", "relay   not running"]
    found = STATUS | {"version": "0.0.9", "relay_version": ""}
    assert [*versions(found)] == [f"client  {__version__}", "daemon  0.0.9  pid 12", "relay   unknown  pid 34"]


def test_version_mismatches() -> None:
    assert [*mismatches(None)] == [*mismatches(STATUS)] == [*mismatches(STATUS | WITHOUT_RELAY)] == []
    (daemon, relay) = mismatches(STATUS | {"version": "0.0.9"})
    assert daemon.endswith(f"daemon 0.0.9, command {__version__}; replace the daemon: systemctl restart gangway")
    assert f"relay {__version__}, daemon 0.0.9; the next daemon replaces the relay: systemctl" in relay
    (daemon, _) = mismatches(STATUS | {"version": "0.0.9", "is_service": False})
    assert daemon.endswith("gangway daemon restart")
