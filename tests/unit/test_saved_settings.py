"""Settings that gangway changes: recorded once, restored when nothing needs them, left alone if others changed them."""

from itertools import permutations

import pytest

from gangway.errors import HostRefused
from gangway.host import sysctl
from gangway.host.saved_settings import SavedSettings, Setting
from tests.unit.fake_host import FakeHost, FakeStorage

NAME, OTHER = "net.ipv4.tcp_tw_reuse", "net.core.somaxconn"


class Scene:
    """A host, a storage, and a daemon that may be replaced by another one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.host = FakeHost(patch, {NAME: "2", OTHER: "4096", "beside": "0"})
        self.storage = FakeStorage()
        self.log: list[str] = []
        self.saved = self.daemon()

    def daemon(self) -> SavedSettings:
        return SavedSettings(self.storage, self.log.append)

    def is_unchanged(self) -> bool:
        return self.host.settings == {NAME: "2", OTHER: "4096", "beside": "0"} and not self.storage.texts


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_a_setting_is_restored(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    assert scene.host.settings[NAME] == "1"
    assert (scene.saved.is_changed(NAME), scene.saved.original(NAME)) == (True, "2")
    scene.saved.restore(NAME)
    assert scene.is_unchanged()
    assert (scene.saved.is_changed(NAME), scene.log) == (False, [])


def test_a_setting_is_recorded_once(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    scene.saved.set(NAME, "1")
    scene.saved.set(NAME, "0")
    assert scene.saved.original(NAME) == "2"
    scene.saved.restore(NAME)
    assert scene.is_unchanged()


def test_a_setting_that_has_the_value_already_is_not_recorded(scene: Scene) -> None:
    scene.saved.set(NAME, "2")
    assert scene.is_unchanged()
    scene.saved.restore(NAME)
    assert scene.is_unchanged()


def test_a_setting_that_the_host_does_not_have_is_skipped(scene: Scene) -> None:
    scene.saved.set("net.unknown", "1")
    assert scene.is_unchanged()


def test_a_setting_that_another_program_changed_is_left_alone(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    scene.host.settings[NAME] = "0"
    assert not scene.saved.is_intact(NAME)
    scene.saved.restore(NAME)
    assert (scene.host.settings[NAME], scene.saved.is_changed(NAME), scene.storage.texts) == ("0", False, {})
    assert scene.log == [f"{NAME} was changed by another program: left as it is"]


def test_a_setting_that_another_program_restored_is_forgotten_silently(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    scene.host.settings[NAME] = "2"
    scene.saved.restore(NAME)
    assert scene.is_unchanged()
    assert scene.log == []


def test_a_value_that_gangway_overwrote_again_is_the_one_to_restore(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    scene.host.settings[NAME] = "0"
    scene.saved.set(NAME, "1")
    assert scene.saved.is_intact(NAME)
    scene.saved.restore(NAME)
    assert (scene.host.settings[NAME], scene.log) == ("0", [])


def test_a_later_daemon_restores(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    later = scene.daemon()
    assert later.is_changed(NAME)
    later.set(NAME, "1")
    later.restore(NAME)
    assert scene.is_unchanged()


@pytest.mark.parametrize(("boot", "cookie"), [("another boot", 1), ("a boot", 2)])
def test_another_boot_or_namespace_forgets(scene: Scene, boot: str, cookie: int) -> None:
    scene.saved.set(NAME, "1")
    scene.host.boot, scene.host.cookie = boot, cookie
    later = scene.daemon()
    assert not later.is_changed(NAME)
    later.restore(NAME)
    assert scene.host.settings[NAME] == "1"
    later.set(OTHER, "1")
    assert [scene.daemon().is_changed(name) for name in (NAME, OTHER)] == [False, True]


ENDS = [("set", "a"), ("set", "b"), ("restore", "a"), ("restore", "b")]
ORDERS = [
    order for order in permutations(ENDS) if all(order.index(("set", u)) < order.index(("restore", u)) for u in "ab")
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_setting_is_restored_in_any_order_of_two_daemons(scene: Scene, order: tuple[tuple[str, str], ...]) -> None:
    daemons = {user: SavedSettings(FakeStorage(), scene.log.append) for user in "ab"}
    for verb, user in order:
        if verb == "set":
            daemons[user].set(NAME, "1")
        else:
            daemons[user].restore(NAME)
    assert scene.is_unchanged()


def test_a_write_that_fails_leaves_nothing_recorded(scene: Scene) -> None:
    scene.host.refused = {NAME}
    with pytest.raises(HostRefused):
        scene.saved.set(NAME, "1", side_effects=["beside"])
    assert scene.is_unchanged()
    assert not scene.saved.is_changed(NAME)


def test_a_write_that_fails_leaves_the_former_record(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    scene.host.refused = {NAME}
    with pytest.raises(HostRefused):
        scene.saved.set(NAME, "0")
    scene.host.refused = set()
    scene.daemon().restore(NAME)
    assert scene.is_unchanged()


def test_a_setting_that_cannot_be_restored_stays_recorded(scene: Scene) -> None:
    scene.saved.set(NAME, "1")
    scene.host.refused = {NAME}
    with pytest.raises(HostRefused):
        scene.saved.restore(NAME)
    assert (scene.saved.is_changed(NAME), scene.saved.is_intact(NAME)) == (True, True)
    scene.host.refused = set()
    scene.daemon().restore(NAME)
    assert scene.is_unchanged()


def test_setting_that_is_read_only_meanwhile_is_restored_later(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, _value: str) -> None:
        raise sysctl.ReadOnly(f"{name}: Read-only file system")

    scene.saved.set(NAME, "1")
    with monkeypatch.context() as patch:
        patch.setattr(sysctl, "write", write)
        for _ in range(3):
            scene.saved.restore(NAME)
    assert len(scene.log) == 1
    assert "Read-only file system: it keeps the value" in scene.log[0]
    scene.daemon().restore(NAME)
    assert scene.is_unchanged()


def other_setting(scene: Scene, dependents: list[str]) -> Setting:
    value = ["ACCEPT"]
    setting = Setting(
        "policy",
        lambda: value[0],
        lambda text: value.__setitem__(0, text),
        dependents=lambda: dependents,
        reason_to_stay="left at DROP: {} needs it",
    )
    scene.saved.register(setting)
    return setting


def test_a_registered_setting_is_restored(scene: Scene) -> None:
    setting = other_setting(scene, ["a program"])
    scene.saved.set("policy", "DROP")
    assert setting.read() == "DROP"
    scene.saved.restore("policy")
    assert (setting.read(), scene.storage.texts, scene.log) == ("ACCEPT", {}, [])


def test_a_setting_with_new_dependents_is_left_alone(scene: Scene) -> None:
    dependents = ["a program"]
    setting = other_setting(scene, dependents)
    scene.saved.set("policy", "DROP")
    scene.saved.set(OTHER, "1", restored_with="policy")
    dependents.append("another program")
    scene.saved.restore("policy")
    assert (setting.read(), scene.host.settings[OTHER]) == ("DROP", "1")
    assert (scene.storage.texts, scene.log) == ({}, ["policy left at DROP: another program needs it"])
    scene.saved.restore("policy")
    assert len(scene.log) == 1


def test_a_setting_is_restored_with_another_one(scene: Scene) -> None:
    scene.saved.set(OTHER, "1", restored_with=NAME)
    scene.saved.set(NAME, "1")
    assert scene.host.settings[OTHER] == "1"
    scene.saved.restore(NAME)
    assert scene.is_unchanged()


def test_a_daemon_that_dies_while_it_restores_is_completed_by_the_next(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.saved.set(OTHER, "1", restored_with=NAME)
    scene.saved.set(NAME, "1")

    class Killed(BaseException):
        pass

    def write(name: str, value: str) -> None:
        if name == OTHER:
            raise Killed
        FakeHost.write(scene.host, name, value)

    with monkeypatch.context() as patch:
        patch.setattr("gangway.host.sysctl.write", write)
        with pytest.raises(Killed):
            scene.daemon().restore(NAME)
    assert (scene.host.settings[NAME], scene.host.settings[OTHER]) == ("2", "1")
    scene.daemon().restore(NAME)
    assert scene.is_unchanged()


def test_the_real_host_has_a_namespace_and_a_boot() -> None:
    storage = FakeStorage()
    saved = SavedSettings(storage, lambda _text: None)
    setting = Setting("mine", lambda: "0", lambda _text: None)
    saved.register(setting)
    saved.set("mine", "1")
    assert SavedSettings(storage, lambda _text: None).is_changed("mine")


def test_what_is_to_be_restored_is_listed_with_what_is_restored_with_it(scene: Scene) -> None:
    scene.saved.set(NAME, "1", side_effects=["beside"])
    scene.saved.set(OTHER, "1", restored_with=NAME)
    scene.host.settings["beside"] = "1"
    assert scene.saved.unrestored() == {NAME: {NAME: "2", OTHER: "4096"}}
    assert scene.daemon().unrestored() == scene.saved.unrestored()
    scene.host.settings[NAME] = "3"  # by another program, which keeps it
    assert scene.saved.unrestored() == {NAME: {OTHER: "4096"}}
    scene.saved.restore(NAME)
    assert scene.saved.unrestored() == {}
