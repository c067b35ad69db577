"""net.ipv4.tcp_tw_reuse: set while the relay runs, and restored in every order in which processes end."""

import re
import signal
from collections.abc import Callable

import pytest

from lab.gangwayd import GANGWAY
from lab.netns import Container, Host
from lab.processes import suspend
from lab.waiting import wait_until
from tests.kernel.ground import PATIENCE_S
from tests.kernel.launcher.launchers import (
    Launcher,
    are_replaced,
    daemon_and_relay,
    kill,
    publish,
    serves,
    stop,
    wait_until_clean,
)
from tests.kernel.published import processes

pytestmark = pytest.mark.any_kernel  # processes, not the kernel, decide

TW_REUSE = "net.ipv4.tcp_tw_reuse"


class Scene:
    """A host where a launcher publishes a port, with default settings."""

    def __init__(self, host: Host, box: Container, port: int, before: tuple[str, ...]) -> None:
        self.host = host
        self.box = box
        self.port = port
        self.before = before

    def publish(self) -> Launcher:
        """Start a launcher."""
        return publish(self.host, self.box, self.port, before=self.before)

    def setting(self) -> str:
        """Return the setting."""
        return self.host.sysctl(TW_REUSE)

    def end_all(self, launcher: Launcher) -> None:
        """Kill everything, so that no process restores anything; the relay exits by itself."""
        suspend(launcher.pid)  # it would start another daemon
        kill(*daemon_and_relay(self.host), launcher.pid)  # the daemon first: it would restore what the launcher needed
        launcher.wait()
        wait_until(lambda: not any(processes(self.host)), "the end of the killed processes", PATIENCE_S)


@pytest.fixture
def scene(fresh: tuple[Host, Container], port: int, with_settings: Callable[..., tuple[str, ...]]) -> Scene:
    host, box = fresh
    host.sysctl(TW_REUSE, 2)
    return Scene(host, box, port, with_settings(""))


@pytest.mark.parametrize("before", ["0", "2"])
def test_set_while_the_relay_runs(scene: Scene, before: str) -> None:
    scene.host.sysctl(TW_REUSE, before)
    launcher = scene.publish()
    assert scene.setting() == "1"
    assert stop(launcher) == 0
    wait_until_clean(scene.host)
    assert scene.setting() == before


@pytest.mark.parametrize("victim", [0, 1], ids=["daemon", "relay"])
def test_restored_after_a_process_was_replaced(scene: Scene, victim: int) -> None:
    launcher = scene.publish()
    killed = daemon_and_relay(scene.host)[victim]
    kill(killed)
    wait_until(lambda: are_replaced(scene.host, killed), "a new process", PATIENCE_S)
    assert serves(scene.host, scene.port)
    assert scene.setting() == "1"
    assert stop(launcher) == 0
    wait_until_clean(scene.host)
    assert scene.setting() == "2"


def test_restored_when_the_launcher_is_killed_first(scene: Scene) -> None:
    launcher = scene.publish()
    assert stop(launcher, signal.SIGKILL) == -signal.SIGKILL
    wait_until_clean(scene.host)
    assert scene.setting() == "2"


def test_restored_when_the_last_lease_ends(scene: Scene) -> None:
    """The daemon and its relay stay for some seconds, and may be killed."""
    launcher = scene.publish()
    assert scene.setting() == "1"
    assert stop(launcher) == 0
    assert scene.setting() == "2"


def test_restored_by_the_next_lease_after_all_were_killed(scene: Scene) -> None:
    scene.end_all(scene.publish())
    assert scene.setting() == "1"
    assert stop(scene.publish()) == 0
    wait_until_clean(scene.host)
    assert scene.setting() == "2"


def test_restored_by_the_next_command_after_all_were_killed(scene: Scene) -> None:
    """Its daemon has nothing to look after, but what an earlier one has changed."""
    scene.end_all(scene.publish())
    scene.host.run(*scene.before, str(GANGWAY), "ls")
    wait_until_clean(scene.host)
    assert scene.setting() == "2"


def test_left_alone_if_another_program_has_changed_it(scene: Scene) -> None:
    launcher = scene.publish()
    scene.host.sysctl(TW_REUSE, 0)
    assert stop(launcher) == 0
    wait_until_clean(scene.host)
    assert scene.setting() == "0"


def test_left_alone_by_the_next_daemon_if_another_program_has_changed_it(scene: Scene) -> None:
    launcher = scene.publish()
    daemon, _ = daemon_and_relay(scene.host)
    kill(daemon)
    scene.host.sysctl(TW_REUSE, 0)
    wait_until(lambda: are_replaced(scene.host, daemon), "a new daemon", PATIENCE_S)
    assert serves(scene.host, scene.port)
    assert stop(launcher) == 0
    wait_until_clean(scene.host)
    assert scene.setting() == "0"


def test_left_alone_if_the_settings_say_so(scene: Scene, with_settings: Callable[..., tuple[str, ...]]) -> None:
    scene.before = with_settings("[relay]\ntcp_tw_reuse = false")
    launcher = scene.publish()
    assert scene.setting() == "2"
    assert serves(scene.host, scene.port)
    assert stop(launcher) == 0
    wait_until_clean(scene.host)
    assert scene.setting() == "2"


def test_old_settings_file_is_read_with_a_warning(
    scene: Scene, with_settings: Callable[..., tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("log") / "log"
    scene.before = with_settings(f'tcp_tw_reuse = false\nlog = "{log}"', "docker-proxy.toml")
    launcher = scene.publish()
    assert scene.setting() == "2"
    logged = log.read_text()
    assert "/etc/gangway/docker-proxy.toml is deprecated: move its keys to the table [relay]" in logged
    said = (
        rf"lease granted: 0\.0\.0\.0:{scene.port} -> [\d.]+:\d+/tcp, by gangway-docker- \(pid {launcher.pid}, uid 0\)"
    )
    assert re.search(said, logged)
    assert stop(launcher) == 0
