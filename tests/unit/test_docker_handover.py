"""What `docker check`, `enable` and `cleanup` say and refuse, of a dockerd that is described."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from gangway.cli.views import print_change, print_docker
from gangway.daemon import docker_rules, handover
from gangway.daemon.config import Config, Docker
from gangway.daemon.docker_rules import DockerRules
from gangway.daemon.handover import Handover
from gangway.daemon.messages import CheckAnswer, DockerChange
from gangway.docker.running import Engine, Process
from gangway.docker.settings_file import SettingsFile
from gangway.errors import Conflict, HostRefused, InvalidRequest
from gangway.host.saved_settings import SavedSettings
from tests.unit.fake_host import FakeStorage

NOW = 2_000_000_000.0  # later than any file of the test
ENGINE = Engine("28.5.2", 7, False, False, False)
PROCESS = Process(7, {}, Path("/"), "docker.service", NOW)
OFF = '{"iptables": false, "ip6tables": false, "userland-proxy": false}'


class FakeRules(DockerRules):
    """Rules that are there or not."""

    def __init__(self) -> None:
        self.there = True
        self.localnet: list[str] = []

    def localnet_settings(self) -> list[str]:
        return self.localnet

    def checks(self) -> Iterator[CheckAnswer]:
        yield CheckAnswer("dockerd's rules", not self.there)

    def remove(self, forward_accept: bool) -> DockerChange:
        self.there = False
        return DockerChange(["removed"], [])

    def user_chains(self) -> list[str]:
        return ["ip6tables"]


class Scene:
    """A dockerd, its settings and rules."""

    def __init__(self, patch: pytest.MonkeyPatch, path: Path) -> None:
        self.engine: Engine | None = ENGINE
        self.process: Process | None = PROCESS
        self.path, self.rules = path, FakeRules()
        self.config = Config(docker=Docker(enabled=True))
        self.is_serving = True
        self.handover = Handover(lambda: self.config, self.rules, lambda: self.is_serving)
        patch.setattr(handover, "DEFAULT", path)
        patch.setattr(handover, "read_engine", self._read)
        self.would_start = False
        patch.setattr(handover, "would_start_dockerd", lambda _: self.would_start)
        patch.setattr(handover, "find_process", lambda _: self.process)

    def _read(self, path: str) -> Engine:
        if self.engine is None:
            raise HostRefused(f"Docker's API at {path} cannot be read: No such file or directory")
        return self.engine

    def flags(self, **flags: str) -> None:
        """Let dockerd have these flags."""
        self.process = PROCESS._replace(flags={name.replace("_", "-"): value for name, value in flags.items()})

    def failing(self) -> dict[str, str]:
        """Return what does not hold, and the notes."""
        return {one.check: one.note for one in self.handover.check().checks if not one.holds}


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scene:
    return Scene(monkeypatch, tmp_path / "daemon.json")


def test_all_is_well_once_everything_is_done(scene: Scene) -> None:
    scene.path.write_text(OFF)
    scene.rules.there = False
    report = scene.handover.check()
    assert [one.check for one in report.checks if not one.holds] == []
    assert report.advice == []


def test_a_settings_file_that_does_not_exist_is_called_so(scene: Scene) -> None:
    for is_there in (False, True):
        notes = {one.check: one.note for one in scene.handover.check().checks}
        assert notes["daemon.json"] == str(scene.path) + " (it does not exist)" * (not is_there)
        scene.path.write_text(OFF)


def test_the_lines_to_change_are_printed(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.path.write_text('{"iptables": false, "ip": "10.0.0.1", "live-restore": true}')
    scene.config, scene.is_serving = Config(), False
    report = scene.handover.check()
    assert report.advice == [
        f"set in {scene.path}, or let gangway docker enable do it:",
        '  "ip6tables": false,',
        '  "userland-proxy": false',
        "add to gangway.toml, and restart gangway's daemon (or start it with --docker):",
        "  [docker]",
        "  enabled = true",
        "restart dockerd: systemctl restart docker.service; all containers end, and those with a restart policy are "
        "started again",
        "then remove dockerd's rules: gangway docker cleanup",
    ]
    notes = {one.check: one.note for one in report.checks}
    assert notes["daemon.json: ip"] == '"10.0.0.1": the host address of ports that are published without one'
    assert notes["daemon.json: ip6tables"] == "not set"
    assert notes["dockerd: started with these settings"] == "it was started with ip6tables and userland-proxy on"
    print_docker({"checks": [{"check": "a", "holds": False, "note": "b"}], "advice": report.advice})
    assert capsys.readouterr().out.endswith("\n  then remove dockerd's rules: gangway docker cleanup\n")


def test_a_setting_that_is_not_in_effect_yet_is_noticed(scene: Scene) -> None:
    scene.is_serving = False
    assert "this daemon does not serve them" in scene.failing()["gangway: Docker's ports"]
    assert "restart gangway's daemon: [docker] enabled is new" in scene.handover.check().advice


def test_ip6tables_is_off_by_default_before_27(scene: Scene) -> None:
    scene.path.write_text('{"iptables": false, "userland-proxy": false}')
    scene.engine = ENGINE._replace(version="20.10.24+dfsg1")
    assert "dockerd: started with these settings" not in scene.failing()
    scene.engine = ENGINE._replace(version="27.0.1")
    assert "dockerd: started with these settings" in scene.failing()


def test_the_drop_in_may_be_the_proxy(scene: Scene) -> None:
    scene.path.write_text('{"userland-proxy-path": "/opt/gangway-docker-proxy"}')
    assert scene.handover.enable().done[0].startswith(f"{scene.path}: iptables, ip6tables set to false")
    assert [*scene.failing()] == ["dockerd's rules"]
    report = scene.handover.check()
    notes = {one.check: one.note for one in report.checks}
    assert notes["daemon.json: userland-proxy"] == "not set (not needed: gangway's program is the proxy)"


def test_flags_that_are_in_the_way_are_named(scene: Scene) -> None:
    scene.flags(iptables="true", ip6tables="false")
    assert "remove --iptables from dockerd's command line" in scene.handover.enable().advice[0]
    assert json.loads(scene.path.read_text()) == {"iptables": False, "userland-proxy": False}
    assert "remove --iptables " in scene.failing()["dockerd: flags"]
    scene.flags(iptables="false", ip6tables="false")
    assert "remove --iptables " in scene.failing()["dockerd: flags"]


def test_the_settings_file_is_that_of_the_process(scene: Scene, tmp_path: Path) -> None:
    scene.flags(config_file="other.json")
    assert scene.process is not None
    scene.process = scene.process._replace(folder=tmp_path)
    scene.handover.enable()
    assert (tmp_path / "other.json").exists()
    scene.handover.enable(str(tmp_path / "third.json"))
    assert (tmp_path / "third.json").exists()
    assert not scene.path.exists()
    for name in ("fourth.json", "/a\0b"):
        with pytest.raises(InvalidRequest, match="absolute path"):
            scene.handover.enable(name)


def test_rules_that_dockerd_needs_are_not_removed(scene: Scene) -> None:
    def refused(why: str) -> None:
        with pytest.raises(Conflict, match=why):
            scene.handover.clean_up(False)
        assert scene.rules.there

    refused(r"dockerd \(pid 7\) may need its rules: it was started with ip6tables on; nothing was removed")
    scene.path.write_text(OFF)
    scene.engine = ENGINE._replace(masquerades=True)
    refused("it was started with iptables on")
    scene.engine, scene.process = ENGINE, PROCESS._replace(started_s=1.0)
    refused("daemon.json was changed after it had started")
    scene.engine, scene.process = None, PROCESS
    refused("Docker's API at /var/run/docker.sock cannot be read")
    scene.engine = ENGINE._replace(is_swarm=True)
    refused("Swarm is active")
    scene.engine, scene.config = ENGINE, Config(chain_prefix="DOCKER")
    refused("look like dockerd's")
    scene.config = Config()
    scene.path.write_text("{")
    refused("line 1, column 2")
    scene.path.write_text(OFF.replace('"userland-proxy": false', '"userland-proxy": true'))
    assert scene.handover.clean_up(False).done == ["removed"]


def test_enable_says_what_becomes_of_docker_user(scene: Scene) -> None:
    assert "ip6tables -N DOCKER-USER and ip6tables -I FORWARD -j DOCKER-USER" in scene.handover.enable().advice[-1]


def test_without_a_dockerd_rules_are_removed(scene: Scene) -> None:
    scene.engine = scene.process = None
    assert "cannot be read: No such file" in scene.failing()["dockerd"]
    assert scene.handover.clean_up(False).done == ["removed"]
    assert scene.handover.enable().advice[0].startswith("start dockerd")


def test_a_dockerd_that_was_stopped_is_not_started(scene: Scene) -> None:
    """With socket activation, reading its API would start it."""
    scene.would_start, scene.process = True, None
    assert "dockerd is stopped" in scene.failing()["dockerd"]
    assert scene.handover.clean_up(False).done == ["removed"]


def test_a_dockerd_with_another_socket_is_noticed(scene: Scene) -> None:
    scene.engine = None
    assert "it runs, pid 7: set socket in table [docker] of gangway.toml" in scene.failing()["dockerd"]


def test_nothing_is_enabled_beside_swarm(scene: Scene) -> None:
    scene.engine = ENGINE._replace(is_swarm=True)
    with pytest.raises(Conflict, match=r"Swarm is active.*: nothing was changed"):
        scene.handover.enable()
    assert not scene.path.exists()
    assert "dockerd: no Swarm" in scene.failing()


def test_disable_says_what_it_left(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    scene.handover.enable()
    scene.path.write_text(scene.path.read_text().replace('"ip6tables": false', '"ip6tables": true'))
    change = scene.handover.disable()
    assert change.done == [
        f"{scene.path}: iptables, userland-proxy restored",
        f"{scene.path}: ip6tables was changed since, and is left as it is",
    ]
    assert change.advice[0].startswith("set in gangway.toml, table [docker]: enabled = false; and restart")
    assert not SettingsFile(scene.path).backup.exists()
    print_change(cast("dict[str, object]", {"done": change.done, "advice": change.advice}))
    assert "\nWhat to do next:\n  set in gangway.toml" in capsys.readouterr().out


def test_route_localnet_is_named_and_switched_off_when_the_proxy_is_back(scene: Scene) -> None:
    scene.rules.localnet, scene.rules.there = ["net/ipv4/conf/docker0/route_localnet"], False
    check, command = "dockerd's bridges: route_localnet", "sysctl -w net/ipv4/conf/docker0/route_localnet=0"
    scene.path.write_text(OFF)
    notes = {one.check: one.note for one in scene.handover.check().checks if one.holds}
    assert notes[check].endswith("gangway's rules drop it")
    scene.path.write_text("{}")
    report = scene.handover.check()
    assert [one.check for one in report.checks if not one.holds and one.check == check]
    assert any(command in line for line in report.advice)
    scene.handover.enable()
    assert any(f"then {command}" in line for line in scene.handover.disable().advice)
    scene.path.write_text("{")
    assert not any("sysctl" in line for line in scene.handover.check().advice), "whether it has a proxy cannot be told"
    scene.path.write_text("{}")
    scene.rules.localnet = []
    assert check not in {one.check for one in scene.handover.check().checks}
    scene.handover.enable()
    assert not any("sysctl" in line for line in scene.handover.disable().advice)


def test_route_localnet_stays_if_a_flag_of_dockerds_leaves_it_without_a_proxy(scene: Scene) -> None:
    scene.rules.localnet = ["net/ipv4/conf/docker0/route_localnet"]
    scene.path.write_text("{}")
    scene.flags(userland_proxy="false")
    scene.handover.enable()
    assert not any("sysctl" in line for line in scene.handover.disable().advice)


def test_firewalld_settings_of_dockerds_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docker_rules, "_FIREWALLD", tmp_path)
    monkeypatch.setattr(docker_rules, "all_tools", tuple)
    monkeypatch.setattr(docker_rules, "_nft_tables", list)
    storage = FakeStorage()
    rules = DockerRules(lambda: None, storage, SavedSettings(storage, print), tuple)
    assert [one.note for one in rules.checks()] == ["none"]
    assert rules.remove(forward_accept=False).advice == []
    (tmp_path / "zones").mkdir()
    (tmp_path / "zones" / "docker.xml").touch()
    first, second = rules.checks()
    assert "leave it there while firewalld runs" in first.note
    assert (first.holds, second.note) == (True, "none")  # nothing of gangway's depends on them
    assert rules.remove(forward_accept=False).advice == []
