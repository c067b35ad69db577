"""Commands that may be repeated: what is as requested already, or gone already, is no error."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gangway.daemon.commands import Commands
from gangway.daemon.declared_files import DeclaredFiles
from gangway.daemon.docker_ports import DockerPorts
from gangway.daemon.messages import AttachRequest, NetworkRequest
from gangway.errors import Conflict
from gangway.model import Subnet
from lab.netns import Namespace
from tests.unit.fake_daemon import Daemon

pytestmark = pytest.mark.usefixtures("own_namespace")

WEB = NetworkRequest("web", ["172.30.0.0/24"])


@pytest.fixture
def commands(daemon: Daemon, tmp_path: Path) -> Commands:
    ports = DockerPorts(lambda: "/run/docker.sock", False, daemon.requests, daemon.adoption)
    return Commands(DeclaredFiles(tmp_path / "conf.d"), daemon.requests, ports)


@pytest.fixture
def attached(commands: Commands, box: Namespace) -> Commands:
    commands.create_network(WEB)
    commands.attach(AttachRequest(box.name, "web", ["172.30.0.5"]))
    return commands


def published(daemon: Daemon) -> list[str]:
    assert daemon.is_consistent()
    return [str(one.mapping) for one in daemon.requests.mappings()]


def test_a_network_without_subnets_gets_free_ones(commands: Commands, daemon: Daemon) -> None:
    networks = [commands.create_network(NetworkRequest(name)) for name in ("web", "back")]
    subnets: list[Subnet] = [subnet for one in networks for subnet in one.subnets]
    assert len(set(subnets)) == 4
    assert commands.create_network(NetworkRequest("web"), if_not_exists=True) == networks[0]
    assert daemon.is_consistent()


def test_a_network_that_exists(commands: Commands) -> None:
    made = commands.create_network(WEB, if_not_exists=True)
    assert commands.create_network(WEB, if_not_exists=True) == made
    for other in (NetworkRequest("web", ["172.29.0.0/24"]), NetworkRequest("web", ["172.30.0.0/24"], icc=False)):
        with pytest.raises(Conflict, match="network web exists with other settings"):
            commands.create_network(other, if_not_exists=True)
    with pytest.raises(Conflict, match="exists already"):
        commands.create_network(WEB)


def test_an_endpoint_that_exists(attached: Commands, box: Namespace, daemon: Daemon) -> None:
    (found,) = daemon.requests.endpoints()
    for addresses in ([], ["172.30.0.5"]):
        assert attached.attach(AttachRequest(box.name, "web", addresses, if_not_exists=True)) == found
    elsewhere = AttachRequest(box.name, if_not_exists=True)
    otherwise = AttachRequest(box.name, "web", ["172.30.0.6"], if_not_exists=True)
    for other in (elsewhere, otherwise):
        with pytest.raises(Conflict, match="is attached to network web already"):
            attached.attach(other)


@pytest.mark.parametrize("keep", [False, True])
def test_ports_of_no_container(attached: Commands, box: Namespace, keep: bool, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match=f"^no container named 'none' is attached; attached: {box.name}$"):
        attached.publish("none", ["127.0.0.1:8000:80"], keep=keep)
    assert not (tmp_path / "conf.d").exists()


def test_a_container_on_several_networks(attached: Commands, box: Namespace, daemon: Daemon, tmp_path: Path) -> None:
    back, kept = NetworkRequest("back", ["172.31.0.0/24"]), tmp_path / "conf.d/kept.toml"
    attached.create_network(back)
    joined = AttachRequest(box.name, "back", if_not_exists=True)
    (further,) = {attached.attach(joined) for _ in range(2)}
    assert (further.network, further.is_first) == ("back", False)
    attached.publish(box.name, ["127.0.0.1:8000:80"], keep=True)
    assert 'network = ["web", "back"]' in kept.read_text()
    with pytest.raises(Conflict, match=f"by ports that are kept: gangway detach {box.name} --network back$"):
        attached.remove_network("back")
    with pytest.raises(Conflict, match="on network web: detach it from back first"):
        attached.detach(box.name, "web")
    assert 'network = ["web", "back"]' in kept.read_text()
    for _ in range(2):
        attached.detach(box.name, "back", if_exists=True)
        assert 'network = "web"' in kept.read_text()
        assert [one.network for one in daemon.requests.endpoints_of(box.name)] == ["web"]
    attached.remove_network("back")
    assert published(daemon) == ["127.0.0.1:8000:80/tcp"]
    attached.attach(AttachRequest(box.name, "gangway0"))
    attached.detach(box.name)
    assert not kept.exists()
    assert daemon.requests.endpoints() == ()


def test_a_declared_further_network_is_left_to_its_file(
    attached: Commands, box: Namespace, daemon: Daemon, tmp_path: Path
) -> None:
    file = tmp_path / "conf.d/box.toml"
    file.parent.mkdir()
    file.write_text(f'[[publish]]\ncontainer = "{box.name}"\nnetwork = ["web", "back"]\n')
    attached._files.read()
    for name in ("back", "other"):
        attached.create_network(NetworkRequest(name))
        attached.attach(AttachRequest(box.name, name))
    attached.detach(box.name, "other")
    for network in ("back", ""):
        with pytest.raises(Conflict, match=f"is declared in {file}: remove it there"):
            attached.detach(box.name, network)
    assert len(daemon.requests.endpoints()) == 2


def test_ports_that_exist(attached: Commands, box: Namespace, daemon: Daemon) -> None:
    first = attached.publish(box.name, ["127.0.0.1:8000:80", "127.0.0.1::81"], if_not_exists=True)
    both = attached.publish(box.name, ["127.0.0.1:8000:80", "127.0.0.1::81", "127.0.0.1:8001:80"], if_not_exists=True)
    assert both[:2] == first
    assert len(published(daemon)) == 3
    with pytest.raises(Conflict, match=r"127\.0\.0\.1:8000/tcp is already published"):
        attached.publish(box.name, ["127.0.0.1:8000:81"], if_not_exists=True)
    assert len(published(daemon)) == 3


def test_ports_that_exist_are_kept(attached: Commands, box: Namespace, daemon: Daemon, tmp_path: Path) -> None:
    attached.publish(box.name, ["127.0.0.1:8000:80"])
    attached.publish(box.name, ["127.0.0.1:8000:80", "127.0.0.1:8001:80"], keep=True, if_not_exists=True)
    assert 'ports = ["127.0.0.1:8000:80", "127.0.0.1:8001:80"]' in (tmp_path / "conf.d/kept.toml").read_text()
    attached.unpublish(box.name, ["127.0.0.1:8000:80"])
    attached.unpublish_all()
    assert published(daemon) == []
    assert not (tmp_path / "conf.d/kept.toml").exists()


@pytest.mark.parametrize(
    "request_",
    [
        lambda one, **given: one.remove_network("none", **given),
        lambda one, **given: one.detach("none", **given),
        lambda one, **given: one.unpublish("none", [], **given),
        lambda one, **given: one.unpublish("none", ["8000:80"], **given),
        lambda one, **given: one.unpublish("docker:none", ["8000:80"], **given),
    ],
)
def test_what_does_not_exist(commands: Commands, request_: Callable[..., object]) -> None:
    with pytest.raises(Conflict):
        request_(commands)
    request_(commands, if_exists=True)


def test_of_the_ports_those_that_exist_are_unpublished(attached: Commands, box: Namespace, daemon: Daemon) -> None:
    attached.publish(box.name, ["127.0.0.1:8000:80", "127.0.0.1:8001:80"])
    attached.unpublish(box.name, ["127.0.0.1:8000:80", "127.0.0.1:8002:80"], if_exists=True)
    assert published(daemon) == ["127.0.0.1:8001:80/tcp"]


def test_all_ports_of_all_containers_are_unpublished_or_none(
    attached: Commands, box: Namespace, daemon: Daemon
) -> None:
    with Namespace("other") as other:
        attached.attach(AttachRequest(other.name, "web"))
        attached.publish(box.name, ["127.0.0.1:8000:80"])
        attached.publish(other.name, ["127.0.0.1:8001:80"])
        daemon.calls.fail("relay.remove")
        with pytest.raises(Exception, match=r"relay\.remove failed"):
            attached.unpublish_all()
        daemon.calls.fail()
        daemon.requests.check()
        assert len(published(daemon)) == 2
        assert len(attached.unpublish_all().published) == 2
        assert published(daemon) == []
        attached.unpublish_all()
