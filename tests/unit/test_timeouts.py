"""Timeouts by iptables: what is found out about them by trying, and when."""

from typing import Any

import pytest

from gangway.errors import HostRefused, TimedOut, Unsupported
from gangway.firewall.iptables import timeouts


class Tool:
    """iptables-restore; `error` is what it fails with."""

    family = 4

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.applied: list[str] = []

    def apply(self, text: str) -> None:
        if self.error is not None:
            raise self.error
        self.applied.append(text)


def unavailable(tool: Any) -> str:
    return timeouts.unavailable([tool])


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "create", lambda: None)


def test_the_rule_that_is_tried_is_removed() -> None:
    tool = Tool()
    assert not unavailable(tool)
    written, removed = tool.applied
    assert "-A GANGWAY-PROBE -p tcp -j CT --timeout gw-4\n" in written
    assert "-F GANGWAY-PROBE\n-X GANGWAY-PROBE\n" in removed


def test_a_kernel_without_the_target() -> None:
    assert unavailable(Tool(HostRefused("no target CT"))) == "no target CT"


def test_a_lock_that_another_program_holds_says_nothing_about_the_kernel() -> None:
    with pytest.raises(TimedOut):
        unavailable(Tool(TimedOut("cron holds the lock")))


def test_a_kernel_without_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Unsupported("none")

    monkeypatch.setattr(timeouts, "create", fail)
    tool = Tool()
    assert unavailable(tool) == "none"
    assert not tool.applied
