"""What is declared is served as soon as it can be, applied all or nothing, and removed by its file only."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gangway.daemon.commands import Commands
from gangway.daemon.declared import Declared
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.docker_ports import DockerPorts
from gangway.daemon.messages import NetworkRequest
from gangway.docker import lookup
from gangway.errors import Conflict, GangwayError, HostRefused, InvalidRequest
from gangway.log import Event, Field, Log
from gangway.model import Source
from gangway.state.adopted import Adopted
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.unit.fake_daemon import Daemon
from tests.unit.samples import BACK, WEB
from tests.unit.test_adoption import DOCKERS, container

pytestmark = pytest.mark.usefixtures("own_namespace")

NETWORK = '[[network]]\nname = "web"\nsubnets = ["172.30.0.0/24"]\n'


def ports(box: Namespace | str, *texts: str, network: str = "web") -> str:
    name = box if isinstance(box, str) else box.name
    on = f'network = "{network}"\n' if network else ""
    return f'[[publish]]\ncontainer = "{name}"\n{on}ports = [{", ".join(map(repr, texts))}]\n'


class Site:
    """A daemon, and the folder with what is declared."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon, self.folder = daemon, folder
        self.events = list[Event]()
        log = Log(lambda event: daemon.log.append(event.text), clock=iter(range(0, 1 << 30, 100)).__next__)
        log.add_writer(self.events.append)
        self.docker_ports = DockerPorts(lambda: "/run/docker.sock", False, daemon.requests, daemon.adoption)
        self.files = DeclaredFiles(folder)
        self.declared = Declared(self.files, daemon.requests, self.docker_ports, log)
        self.commands = Commands(self.files, daemon.requests, self.docker_ports)

    def declare(self, text: str, name: str = "web.toml") -> list[str]:
        self.folder.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)
        return self.declared.reload()

    def found(self) -> list[str]:
        """Return everything that there is, with its source."""
        assert self.daemon.is_consistent()
        requests = self.daemon.requests
        things = [(one.name, one.source) for one in requests.networks()]
        things += [(one.container, one.source) for one in requests.endpoints()]
        things += [(str(one.mapping), one.mapping.source) for one in requests.mappings()]
        return [f"{name} {source}" for name, source in things]

    def kept(self) -> str:
        path = self.folder / "kept.toml"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def site(daemon: Daemon, tmp_path: Path) -> Site:
    return Site(daemon, tmp_path / "conf.d")


def test_a_container_is_served_when_it_exists(site: Site) -> None:
    box = Namespace("later")
    assert site.declare(NETWORK + ports(box, "127.0.0.1:8000:80")) == []
    assert site.found() == ["web declared"]
    assert [(one.container, one.note) for one in site.declared.waiting()] == [(box.name, "container does not exist")]
    assert site.declared.problems() == []
    with box:
        site.declared.serve_new()
        served = ["web declared", f"{box.name} declared", "127.0.0.1:8000:80/tcp declared"]
        assert site.found() == served
        assert site.declared.waiting() == []
        calls = len(site.daemon.calls.names)
        assert site.declare(NETWORK + ports(box, "127.0.0.1:8000:80")) == []
        site.declared.serve_new()
        assert "driver.change" not in site.daemon.calls.names[calls:]
    wait_until(site.daemon.requests.reap_dead_containers, "the kernel to delete the namespace")
    assert site.found() == ["web declared"]
    with box:
        site.declared.serve_new()
        assert site.found() == served


def test_what_is_not_declared_any_more_is_removed(site: Site, box: Namespace) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80", "127.0.0.1:8001:80"))
    site.docker_ports.publish(box.name, ["127.0.0.1:9000:90"], ())
    site.declare(NETWORK + ports(box, "127.0.0.1:8001:80"))
    assert site.found()[2:] == ["127.0.0.1:8001:80/tcp declared", "127.0.0.1:9000:90/tcp api"]
    attached, network = site.declare("")
    assert "127.0.0.1:9000:90/tcp is published by command" in attached
    assert f"network web stays as it is: {box.name} is attached by command" in network
    assert site.found()[2:] == ["127.0.0.1:9000:90/tcp api"]
    assert site.declared.problems() == [attached, network]
    site.commands.unpublish(box.name, [])
    site.declared.retry()
    assert site.found() == []
    assert site.declared.problems() == []
    assert not site.declared


def test_a_later_daemon_removes_what_was_declared(site: Site, box: Namespace, tmp_path: Path) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"))
    (site.folder / "web.toml").unlink()
    later = Site(Daemon(tmp_path, site.daemon), site.folder)
    assert later.declared.reload() == []
    assert later.found() == []
    later.daemon.close()


def test_a_wrong_file_removes_nothing(site: Site, box: Namespace, tmp_path: Path) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"))
    before = site.found()
    (problem,) = site.declare("[[")
    assert problem.startswith(f"{site.folder}/web.toml: ")
    assert site.declared.problems() == [problem]
    assert site.found() == before
    later = Site(Daemon(tmp_path, site.daemon), site.folder)
    assert len(later.declared.reload()) == 1
    assert later.found() == before
    with pytest.raises(Conflict, match="nothing can be applied while another file is wrong"):
        later.declared.apply("other.toml", "", is_dry=False)
    assert later.declared.apply("web.toml", "", is_dry=False).changes == [
        f"- attach {box.name}: network web",
        "- network web",
    ]
    assert later.declared.problems() == []
    assert later.found() == []
    later.daemon.close()


def test_files_that_contradict_each_other_remove_nothing(site: Site, box: Namespace) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"), "20.toml")
    before = site.found()
    other = NETWORK.replace('"web"', '"wob"').replace("172.30", "172.29")
    (problem,) = site.declare(other + ports(box, "127.0.0.1:8001:80", network="wob"), "10.toml")
    declares_it = f"{site.folder}/10.toml declares this"
    assert problem == f"{site.folder}/20.toml: publish {box.name}: network: {declares_it} container otherwise"
    assert [one for one in site.found() if not one.startswith("wob")] == before
    (problem,) = site.declare(NETWORK.replace("172.30", "172.29"), "10.toml")
    assert problem == f"{site.folder}/20.toml: network web: name: {declares_it} network already"
    assert [one for one in site.found() if not one.startswith("wob")] == before
    for name, text in (("10.toml", ""), ("20.toml", ports(box, "127.0.0.1:8000:80"))):
        blamed = {"10.toml": f"{site.folder}/20.toml", "20.toml": "20.toml"}[name]
        other = {"10.toml": "10.toml", "20.toml": f"{site.folder}/10.toml"}[name]
        with pytest.raises(InvalidRequest) as refused:
            site.declared.apply(name, NETWORK + text, is_dry=False)
        assert str(refused.value) == f"{blamed}: network web: name: {other} declares this network already"
    assert site.declared.apply("30.toml", "", is_dry=False) == ([], [])
    assert site.declare("", "10.toml") == []
    assert site.found() == before


def test_what_fails_is_logged_once_and_tried_again(site: Site, box: Namespace) -> None:
    site.daemon.requests.create_network(WEB)
    with Namespace("other") as other:
        site.daemon.requests.attach(other.name, "web", ())
        site.docker_ports.publish(other.name, ["127.0.0.1:8000:80"], ())
        (warning,) = site.declare(ports(box, "127.0.0.1:8000:80", "127.0.0.1:8001:80"))
        assert warning.startswith(f"conf.d: publish {box.name}: 127.0.0.1:8000:80: 127.0.0.1:8000/tcp is already")
        assert [one.note for one in site.declared.waiting(box.name)] == ["not published: see the log"]
        for _ in range(2):
            site.declared.retry()
            assert site.declared.problems() == [warning]
        assert sum(warning == line for line in site.daemon.log) == 1
        site.docker_ports.unpublish(other.name, [])
        site.declared.retry()
        assert site.declared.waiting() == []
        assert site.declared.problems() == []


def test_containers_on_no_network_are_attached_to_that_on_demand(site: Site, box: Namespace) -> None:
    site.declare(ports(box, "127.0.0.1:8000:80", network=""))
    assert site.found() == ["gangway0 api", f"{box.name} declared", "127.0.0.1:8000:80/tcp declared"]
    site.declare("")
    assert site.found() == []


def test_apply_is_all_or_nothing(site: Site, box: Namespace) -> None:
    first = NETWORK + ports(box, "127.0.0.1:8000:80")
    expected = ["+ network web: 172.30.0.0/24", f"+ attach {box.name}: network web"]
    expected += [f"+ publish {box.name}: 127.0.0.1:8000:80"]
    assert site.declared.apply("web.toml", first, is_dry=True).changes == expected
    assert site.found() == []
    assert site.declared.apply("web.toml", first, is_dry=False).changes == expected
    assert site.declared.apply("web.toml", first, is_dry=False) == ([], [])
    before = site.found()
    other = NETWORK.replace("172.30", "172.29") + ports(box, "127.0.0.1:8001:80", "127.0.0.1:8002:80")
    site.daemon.calls.fail("relay.serve")
    with pytest.raises(GangwayError, match=r"publish .*: relay\.serve failed"):
        site.declared.apply("web.toml", other, is_dry=False)
    site.daemon.calls.fail()
    site.declared.retry()
    assert site.found() == before
    assert (site.folder / "web.toml").read_text() == first
    with pytest.raises(InvalidRequest, match=r"^z\.toml: network web: name: .*/conf\.d/web\.toml declares this"):
        site.declared.apply("z.toml", NETWORK, is_dry=False)
    for wrong in ("[[", "kontainer = 1", '[[publish]]\ncontainer = "box"\nports = ["x"]\n'):
        with pytest.raises(InvalidRequest, match=r"^z\.toml: "):
            site.declared.apply("z.toml", wrong, is_dry=True)
    assert site.declared.apply("late.toml", ports("late", "80"), is_dry=False).notes == [
        "container late does not exist yet: it is served when it does"
    ]


def test_apply_fails_if_its_own_ports_are_not_free_but_not_for_those_of_others(site: Site, box: Namespace) -> None:
    site.daemon.requests.create_network(WEB)
    with Namespace("other") as other:
        site.daemon.requests.attach(other.name, "web", ())
        site.docker_ports.publish(other.name, ["127.0.0.1:8000:80"], ())
        text = ports(box, "127.0.0.1:8000:80")
        site.declare(text, "app.toml")
        for again in (text, text + ports(box, "127.0.0.1:8001:80")):
            for is_dry in (True, False):
                with pytest.raises(GangwayError, match=r"publish .*: 127\.0\.0\.1:8000/tcp is already published"):
                    site.declared.apply("app.toml", again, is_dry)
        assert (site.folder / "app.toml").read_text() == text
        more = ports(box, "127.0.0.1:9000:90")
        added = [f"+ publish {box.name}: 127.0.0.1:9000:90"]
        assert site.declared.apply("b.toml", more, is_dry=False) == (added, [])
        with pytest.raises(GangwayError, match=r"127\.0\.0\.1:8000/tcp is already published"):
            site.declared.apply("b.toml", text, is_dry=False)
        site.docker_ports.unpublish(other.name, [])
        site.declared.retry()
        assert site.declared.waiting() == []


def test_the_port_of_a_container_that_has_just_exited_is_free(site: Site, box: Namespace) -> None:
    with Namespace("other") as other:
        site.declare(NETWORK + ports(other, "127.0.0.1:8000:80"), "other.toml")
    added = [f"+ attach {box.name}: network web", f"+ publish {box.name}: 127.0.0.1:8000:80"]
    wait_until(lambda: site.daemon.controller.is_dead(other.name), "the kernel to delete the namespace")
    assert [one.container for one in site.daemon.requests.endpoints()] == [other.name]
    for is_dry in (True, False):
        assert site.declared.apply("web.toml", ports(box, "127.0.0.1:8000:80"), is_dry).changes == added


def test_apply_fails_if_its_own_network_is_another_one_but_not_for_that_of_others(site: Site) -> None:
    site.daemon.requests.create_network(WEB)
    site.declare(NETWORK, "app.toml")
    with pytest.raises(Conflict, match=r"network web is another one than .*/app\.toml declares"):
        site.declared.apply("app.toml", NETWORK, is_dry=False)
    assert site.declared.apply("b.toml", NETWORK.replace("web", "back").replace("30.0", "29.0"), is_dry=False) == (
        ["+ network back: 172.29.0.0/24"],
        [],
    )


def test_what_commands_have_made_is_not_changed_by_apply(site: Site) -> None:
    site.daemon.requests.create_network(WEB)
    with pytest.raises(Conflict, match=r"network web is another one than .*: gangway network rm web"):
        site.declared.apply("web.toml", NETWORK, is_dry=False)
    assert site.found() == ["web api"]
    assert not (site.folder / "web.toml").exists()


def test_what_files_change_is_logged_as_the_request_that_it_is(site: Site, box: Namespace) -> None:
    def logged() -> list[tuple[str, dict[str, Field]]]:
        found = [(one.name, one.fields) for one in site.events]
        site.events.clear()
        return found

    first, second = (str(site.folder / name) for name in ("a.toml", "b.toml"))
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"), "a.toml")
    site.declare(ports(box, "127.0.0.1:8001:80"), "b.toml")
    (endpoint,) = site.daemon.requests.endpoints()
    address, bridge = str(endpoint.addresses[0]), site.daemon.requests.network("web").bridge
    attached, subnets = {"container": box.name, "network": "web"}, "172.30.0.0/24"

    def port(number: int) -> dict[str, Field]:
        return {"container": box.name, "ports": f"127.0.0.1:{number} -> {address}:80/tcp"}

    assert logged() == [
        ("network-created", {"network": "web", "bridge": bridge, "subnets": subnets, "file": first}),
        ("attached", {**attached, "addresses": address, "file": first}),
        ("published", port(8000) | {"file": first}),
        ("published", port(8001) | {"file": second}),
    ]
    site.declared.apply("b.toml", ports(box, "127.0.0.1:8002:80"), is_dry=False)
    assert logged() == [("unpublished", port(8001) | {"file": second}), ("published", port(8002) | {"file": second})]
    site.declare("", "b.toml")
    assert logged() == [("unpublished", port(8002) | {"file": second})]
    site.declare("", "a.toml")
    assert logged() == [
        ("detached", attached | {"file": first}),
        ("network-removed", {"network": "web", "file": first}),
    ]
    site.declare("[[", "a.toml")
    assert logged() == [("not-served", {})]


@pytest.mark.parametrize(
    "request_",
    [
        lambda one, name: one.unpublish(name, []),
        lambda one, name: one.unpublish(name, ["127.0.0.1:8000:80"]),
        lambda one, name: one.detach(name),
        lambda one, _name: one.remove_network("web"),
    ],
)
def test_only_the_file_removes_what_it_declares(
    site: Site, box: Namespace, request_: Callable[[Commands, str], object]
) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"))
    before = site.found()
    with pytest.raises(Conflict, match=f"is declared in {site.folder}/web.toml: remove it there, then gangway daemon"):
        request_(site.commands, box.name)
    assert site.found() == before


def test_ports_are_kept_until_they_are_unpublished(site: Site, box: Namespace) -> None:
    requests = site.daemon.requests
    requests.create_network(WEB)
    requests.attach(box.name, "web", ())
    (published,) = site.commands.publish(box.name, ["127.0.0.1::80"], keep=True)
    number = published.mapping.host_ports
    assert f'ports = ["127.0.0.1:{number}:80"]' in site.kept()
    with pytest.raises(Conflict, match=f"network web is used by ports that are kept: gangway unpublish {box.name}"):
        site.commands.remove_network("web")
    site.commands.unpublish(box.name, [f"127.0.0.1:{number}:80"])
    assert site.kept() == ""
    assert site.found() == ["web api", f"{box.name} api"]


def test_kept_ports_are_there_after_a_reboot_without_the_database(site: Site, tmp_path: Path) -> None:
    with Namespace("box") as box:
        site.daemon.requests.create_network(WEB)
        site.daemon.requests.attach(box.name, "web", ())
        site.commands.publish(box.name, ["127.0.0.1:8000:80"], keep=True)
        site.daemon.requests.detach(box.name)
        site.daemon.requests.remove_network("web")
        (tmp_path / "new").mkdir()
        later = Site(Daemon(tmp_path / "new"), site.folder)
        assert later.declared.reload() == []
        assert later.found() == ["web declared", f"{box.name} declared", "127.0.0.1:8000:80/tcp declared"]
        assert later.daemon.requests.network("web").subnets == WEB.subnets
        later.commands.detach(box.name)
        later.declared.serve_new()
        assert later.kept() == ""
        later.declared.reload()
        assert later.found() == []
        later.daemon.end()


def test_kept_ports_do_not_contradict_the_file_that_names_the_networks(site: Site, box: Namespace) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"))
    site.daemon.requests.create_network(BACK)
    site.daemon.requests.attach(box.name, "back", ())
    site.commands.publish(box.name, ["127.0.0.1:8001:80"], keep=True)
    assert "network" not in site.kept()
    assert site.declared.reload() == []
    assert {str(one.mapping) for one in site.daemon.requests.mappings()} == {
        "127.0.0.1:8000:80/tcp",
        "127.0.0.1:8001:80/tcp",
    }


def test_kept_ports_of_a_container_that_does_not_exist_are_removed(site: Site) -> None:
    with Namespace("box") as box:
        site.daemon.requests.attach(box.name, None, ())
        site.commands.publish(box.name, ["127.0.0.1:8000:80"], keep=True)
    wait_until(site.daemon.requests.reap_dead_containers, "the kernel to delete the namespace")
    with pytest.raises(Conflict):
        site.commands.detach(box.name)
    assert "8000:80" in site.kept()
    site.commands.detach(box.name, if_exists=True)
    assert site.kept() == ""
    assert site.found() == []


def test_a_port_that_cannot_be_kept_is_not_published(site: Site, box: Namespace) -> None:
    site.daemon.requests.attach(box.name, None, ())
    site.folder.write_text("no folder")
    with pytest.raises(GangwayError, match=r"kept\.toml cannot be"):
        site.commands.publish(box.name, ["127.0.0.1:8000:80"], keep=True)
    assert site.found() == ["gangway0 api", f"{box.name} api"]
    with pytest.raises(InvalidRequest, match="ports of pid:1 cannot be kept: it has no name that outlives it"):
        site.commands.publish("pid:1", ["127.0.0.1:8000:80"], keep=True)


def test_ports_of_dockers_containers_follow_them(site: Site, box: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Adopted((DOCKERS,), (container(box),))
    monkeypatch.setattr(lookup, "find_container", lambda _path, _name: found)
    site.declare(ports("docker:web", "0.0.0.0:9000:90", network=""))
    assert site.declared.has_dockers
    assert site.found() == []
    for runs in (True, False, True):
        site.daemon.adoption.follow(found if runs else Adopted((DOCKERS,), (), {"id of web": "docker:web"}))
        site.declared.serve_dockers(frozenset({"docker:web"} if runs else ()))
        assert [one.mapping.source for one in site.daemon.requests.mappings()] == [Source.DECLARED] * runs
    site.declare("")
    assert site.found() == []


def test_nothing_is_served_when_everything_was_removed(site: Site, box: Namespace) -> None:
    site.declare(NETWORK + ports(box, "127.0.0.1:8000:80"))
    site.daemon.down.carry_out()
    site.declared.end()
    site.declared.serve_new()
    site.declared.retry()
    assert site.found() == []
    assert site.files.paths() == [str(site.folder / "web.toml")]


def on_both(box: Namespace) -> str:
    return ports(box, "127.0.0.1:8000:80").replace('"web"', '["web", "back"]')


def networks_of(site: Site) -> list[str]:
    return [one.network for one in site.daemon.requests.endpoints()]


def test_ports_do_not_wait_for_a_further_network(site: Site, box: Namespace) -> None:
    (warning,) = site.declare(NETWORK + on_both(box))
    assert warning.startswith(f"conf.d: attach {box.name}: network back: no network named 'back'")
    assert site.found()[1:] == [f"{box.name} declared", "127.0.0.1:8000:80/tcp declared"]
    site.commands.create_network(NetworkRequest("back"))
    site.declared.retry()
    assert networks_of(site) == ["web", "back"]
    site.declared.retry()
    assert site.daemon.log.count(warning) == 1


def test_a_further_network_does_not_become_the_first_one(site: Site, box: Namespace) -> None:
    site.commands.create_network(NetworkRequest("back"))
    (warning,) = site.declare(on_both(box))
    assert "no network named 'web'" in warning
    assert networks_of(site) == []
    site.commands.create_network(NetworkRequest("web"))
    site.declared.retry()
    assert networks_of(site) == ["web", "back"]


def test_apply_joins_and_leaves_networks(site: Site, box: Namespace) -> None:
    def apply(text: str, is_dry: bool = False) -> list[str]:
        return site.declared.apply("web.toml", text, is_dry).changes

    back = NETWORK.replace("web", "back").replace("172.30", "172.31")
    apply(NETWORK + back + ports(box, "127.0.0.1:8000:80"))
    joins = [f"+ attach {box.name}: network back"]
    assert apply(NETWORK + back + on_both(box), is_dry=True) == joins
    assert networks_of(site) == ["web"]
    assert apply(NETWORK + back + on_both(box)) == joins
    assert apply(NETWORK + back + on_both(box)) == []
    assert networks_of(site) == ["web", "back"]
    site.daemon.calls.fail("driver.change_further")
    with pytest.raises(HostRefused, match=f"attach {box.name}: network back: driver.change_further failed"):
        apply(NETWORK + ports(box, "127.0.0.1:8000:80"))
    site.daemon.calls.fail()
    site.declared.retry()
    assert networks_of(site) == ["web", "back"]
    leaves = [f"- attach {box.name}: network back", "- network back"]
    assert apply(NETWORK + ports(box, "127.0.0.1:8000:80")) == leaves
    assert site.found() == ["web declared", f"{box.name} declared", "127.0.0.1:8000:80/tcp declared"]
    apply(NETWORK + back + on_both(box))
    assert apply("")[:2] == [f"- attach {box.name}: network back", f"- attach {box.name}: network web"]
    assert site.found() == []
