"""Forwarding: what the kernel changes along with it, who relies on it since, and failures."""

from typing import Any

import pytest

from gangway.errors import HostRefused
from gangway.host.forwarding import ForwardingSwitch
from gangway.host.saved_settings import SavedSettings
from tests.unit.fake_host import IPV4, IPV6, REDIRECTS, FakeHost, FakeStorage

DEFAULT6 = "net.ipv6.conf.default.forwarding"
ETH0, ETH1, RA = "net.ipv4.conf.eth0.forwarding", "net.ipv4.conf.eth1.forwarding", "net.ipv6.conf.eth0.accept_ra"
SETTINGS = {
    IPV4: "0",
    "net.ipv4.conf.default.forwarding": "0",
    ETH0: "0",
    ETH1: "1",
    REDIRECTS: "0",
    IPV6: "0",
    DEFAULT6: "1",
    "net.ipv6.conf.eth0.forwarding": "0",
    RA: "1",
}


class FakeLinks:
    """Interfaces that have received a router advertisement."""

    def interfaces_with_advertised_routes(self) -> frozenset[str]:
        return frozenset({"eth0"})


class Scene:
    """A host, and a daemon that may be replaced by another one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.host = FakeHost(patch, dict(SETTINGS))
        self.filters = {4: ["theirs"], 6: []}
        self.storage = FakeStorage()
        self.log: list[str] = []
        self.switch = self.daemon()

    def daemon(self) -> ForwardingSwitch:
        self.saved = SavedSettings(self.storage, self.log.append)
        links: Any = FakeLinks()
        return ForwardingSwitch(self.saved, links, lambda family: self.filters[family])


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


@pytest.mark.parametrize("is_later_daemon", [False, True])
def test_everything_is_restored(scene: Scene, is_later_daemon: bool) -> None:
    scene.switch.switch({4, 6})
    assert [scene.host.settings[name] for name in (IPV4, IPV6, DEFAULT6, ETH0, RA)] == ["1", "1", "1", "1", "2"]
    switch = scene.daemon() if is_later_daemon else scene.switch
    assert switch.enabled_by_us == {4, 6}
    switch.switch({4})
    assert switch.enabled_by_us == {4}
    assert (scene.host.settings[IPV4], scene.host.settings[IPV6]) == ("1", "0")
    switch.switch(())
    assert (scene.host.settings, scene.storage.texts, scene.log) == (SETTINGS, {}, [])


def test_a_family_that_was_forwarded_before_is_left_alone(scene: Scene) -> None:
    scene.host.write(IPV4, "1")
    before = dict(scene.host.settings)
    scene.switch.switch({4})
    assert scene.switch.enabled_by_us == frozenset()
    scene.switch.switch(())
    assert scene.host.settings == before


def test_an_interface_that_another_program_changed_since_keeps_its_value(scene: Scene) -> None:
    scene.switch.switch({4})
    scene.host.settings[ETH1] = "0"
    scene.switch.switch(())
    assert scene.host.settings == SETTINGS | {ETH1: "0"}
    assert scene.log == [f"{ETH1.replace('.', '/')} was changed by another program: left as it is"]


def test_an_interface_that_was_removed_is_forgotten(scene: Scene) -> None:
    scene.switch.switch({4})
    del scene.host.settings[ETH1]
    scene.switch.switch(())
    assert (scene.host.settings[IPV4], scene.storage.texts, scene.log) == ("0", {}, [])


def test_forwarding_stays_enabled_for_a_new_filter(scene: Scene) -> None:
    scene.switch.switch({4, 6})
    scene.filters[6].append("ip6 filter FORWARD")
    scene.switch.switch(())
    assert [scene.host.settings[name] for name in (IPV4, IPV6, RA)] == ["0", "1", "2"]
    assert scene.log == [f"{IPV6} left enabled: ip6 filter FORWARD now filters forwarded traffic"]
    assert (scene.switch.enabled_by_us, scene.storage.texts) == (frozenset(), {})


def test_forwarding_that_another_program_disabled_is_enabled_again(scene: Scene) -> None:
    scene.switch.switch({4})
    scene.host.write(IPV4, "0")
    scene.switch.switch({4})
    assert (scene.host.settings[IPV4], scene.switch.enabled_by_us) == ("1", frozenset({4}))
    scene.switch.switch(())
    assert scene.host.settings == SETTINGS


@pytest.mark.parametrize("refused", [IPV4, IPV6, RA])
def test_a_failure_changes_nothing(scene: Scene, refused: str) -> None:
    scene.host.refused = {refused}
    with pytest.raises(HostRefused):
        scene.switch.switch({4, 6})
    assert (scene.host.settings, scene.storage.texts) == (SETTINGS, {})


def test_a_failure_to_restore_keeps_what_was_enabled(scene: Scene) -> None:
    scene.switch.switch({4})
    scene.host.refused = {IPV4}
    with pytest.raises(HostRefused):
        scene.switch.switch({6})
    assert (scene.host.settings[IPV4], scene.host.settings[IPV6]) == ("1", "0")
    assert scene.switch.enabled_by_us == {4}
    scene.host.refused = set()
    scene.switch.switch(())
    assert scene.host.settings == SETTINGS
