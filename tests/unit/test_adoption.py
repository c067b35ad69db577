"""What is adopted of Docker's: only the difference is carried out, and a failure leaves everything consistent."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from gangway.daemon.docker_ports import DockerPorts
from gangway.docker import lookup
from gangway.errors import Conflict, HostRefused, PortInUse
from gangway.facts import Firewall
from gangway.model import ANY, Endpoint, Network, PortMapping, PortRange, Protocol, Source
from gangway.plan import Road
from gangway.reconcile.controller import Controller
from gangway.relay.protocol import HostPorts
from gangway.state.adopted import Adopted, AdoptedContainer
from gangway.state.leases import Leases
from lab.netns import Namespace
from tests.unit.fake_daemon import Daemon
from tests.unit.samples import WEB

BRIDGE = Network(
    "docker:bridge",
    "docker0",
    (ip_network("172.17.0.0/16"),),
    (ip_address("172.17.0.1"),),
    source=Source.DOCKER,
)

pytestmark = pytest.mark.usefixtures("own_namespace")


def container(box: Namespace, *ports: int, name: str = "web", last: int = 2) -> AdoptedContainer:
    """Return a running container with ports that dockerd holds."""
    endpoint = Endpoint(f"docker:{name}", BRIDGE.name, (ip_address(f"172.17.0.{last}"),))
    return AdoptedContainer(
        f"id of {name}", endpoint, f"/run/netns/{box.name}", tuple(port(number, endpoint.container) for number in ports)
    )


def port(number: int, of: str = "docker:web", is_held: bool = True) -> PortMapping:
    host, inner = PortRange(number, number), PortRange(80, 80)
    return PortMapping(of, Protocol.TCP, ANY[not is_held], host, inner, Source.DOCKER, is_held)


def published(daemon: Daemon) -> list[str]:
    assert daemon.is_consistent()
    return [str(one.mapping) for one in daemon.requests.mappings()]


def test_ports_follow_the_containers(daemon: Daemon, box: Namespace) -> None:
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000, 8001),)))
    assert published(daemon) == ["0.0.0.0:8000:80/tcp", "0.0.0.0:8001:80/tcp"]
    calls = len(daemon.calls.names)
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8001, 8002),)))
    assert published(daemon) == ["0.0.0.0:8001:80/tcp", "0.0.0.0:8002:80/tcp"]
    assert len(daemon.calls.names) > calls
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8001, last=3),)))
    assert [str(one.container_address) for one in daemon.requests.mappings()] == ["172.17.0.3"]
    daemon.adopt(Adopted((BRIDGE,), ()))
    assert published(daemon) == []
    said = [f"{what} {count}" for what, _, count in daemon.reported]
    assert said == ["published 2", "unpublished 1", "published 1", "unpublished 2", "published 1", "unpublished 1"]
    daemon.adopt(Adopted())
    assert daemon.requests.networks() == ()
    assert daemon.requests.is_idle


def test_nothing_is_done_if_nothing_has_changed(daemon: Daemon, box: Namespace) -> None:
    wanted = Adopted((BRIDGE,), (container(box, 8000),))
    daemon.adopt(wanted)
    calls = [*daemon.calls.names]
    daemon.adopt(wanted)
    assert "driver.change" not in daemon.calls.names[len(calls) :]
    assert "steering.add" not in daemon.calls.names[len(calls) :]


def test_later_daemon_serves_what_was_adopted(daemon: Daemon, box: Namespace, tmp_path: Path) -> None:
    wanted = Adopted((BRIDGE,), (container(box, 8000),))
    daemon.adopt(wanted)
    later = Daemon(tmp_path, daemon)
    assert published(later) == ["0.0.0.0:8000:80/tcp"]
    assert later.requests.networks() == (BRIDGE,)
    later.adopt(wanted)
    assert published(later) == ["0.0.0.0:8000:80/tcp"]
    later.close()


def test_policy_of_a_network_changes(daemon: Daemon, box: Namespace) -> None:
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    changed = replace(BRIDGE, masquerade=False)
    daemon.adopt(Adopted((changed,), (container(box, 8000),)))
    assert daemon.requests.networks() == (changed,)
    assert published(daemon) == ["0.0.0.0:8000:80/tcp"]


def test_container_that_has_ended_is_left_out(daemon: Daemon, box: Namespace) -> None:
    ended = container(box, 8000)._replace(namespace="/proc/4194305/ns/net")
    daemon.adopt(Adopted((BRIDGE,), (ended,)))
    assert published(daemon) == []


def test_port_of_another_container_is_left_out_and_logged_once(daemon: Daemon, box: Namespace) -> None:
    daemon.requests.create_network(WEB)
    daemon.requests.attach(box.name, "web", ())
    daemon.requests.publish(box.name, ["0.0.0.0:8000:80"])
    with Namespace("other") as other:
        wanted = Adopted((BRIDGE,), (container(other, 8000, 8001),))
        daemon.adopt(wanted)
        daemon.adopt(wanted)
        assert published(daemon) == ["0.0.0.0:8000:80/tcp", "0.0.0.0:8001:80/tcp"]
        assert sum("0.0.0.0:8000:80/tcp not published" in line for line in daemon.log) == 1
        daemon.requests.unpublish(box.name)
        daemon.adopt(wanted)
        assert published(daemon) == ["0.0.0.0:8001:80/tcp", "0.0.0.0:8000:80/tcp"]


def test_port_that_dockerd_does_not_hold_is_published_only_if_it_is_free(daemon: Daemon, box: Namespace) -> None:
    one = container(box, 8000)
    one = one._replace(mappings=(*one.mappings, port(8000, is_held=False)))
    daemon.steering.refused[HostPorts("tcp", "::", 8000, 8000)] = PortInUse("port 8000 is in use by nginx")
    daemon.adopt(Adopted((BRIDGE,), (one,)))
    assert published(daemon) == ["0.0.0.0:8000:80/tcp"]
    assert [line.partition(" is in use")[0] for line in daemon.log] == [
        "container docker:web: [::]:8000:80/tcp not published: port [::]:8000/tcp"
    ]
    daemon.steering.refused.clear()
    daemon.adopt(Adopted((BRIDGE,), (one,)))
    assert published(daemon) == ["0.0.0.0:8000:80/tcp", "[::]:8000:80/tcp"]


@pytest.mark.parametrize("call", ["driver.change", "driver.rewrite", "redirect.add"])
def test_failure_is_made_good_by_the_next_call(daemon: Daemon, box: Namespace, call: str) -> None:
    wanted = Adopted((BRIDGE,), (container(box, 8000),))
    daemon.calls.fail(call)
    try:
        daemon.adopt(wanted)
    except HostRefused:
        assert call == "driver.rewrite"
    daemon.calls.fail()
    daemon.adopt(wanted)
    assert published(daemon) == ["0.0.0.0:8000:80/tcp"]


def test_failure_of_one_container_does_not_prevent_others(daemon: Daemon, box: Namespace) -> None:
    with Namespace("other") as other:
        mine = container(box, 8000)
        far = container(other, 8001, name="far", last=3)
        foreign = far._replace(mappings=(replace(far.mappings[0], host_ports=PortRange(8000, 8000)),))
        daemon.adopt(Adopted((BRIDGE,), (mine, foreign)))
        assert published(daemon) == ["0.0.0.0:8000:80/tcp"]


def test_requests_leave_what_is_dockers_to_docker(daemon: Daemon, box: Namespace) -> None:
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    with pytest.raises(Conflict, match="docker:bridge is Docker's: use the docker command"):
        daemon.requests.remove_network("docker:bridge")
    with pytest.raises(Conflict, match="docker:bridge is Docker's"):
        daemon.requests.detach("docker:web")
    with Namespace("other") as other, pytest.raises(Conflict, match="docker:bridge is Docker's"):
        daemon.requests.attach(other.name, "docker:bridge", ())
    with pytest.raises(Conflict, match="is published by Docker"):
        daemon.requests.unpublish("docker:web", ["0.0.0.0:8000:80"])
    assert daemon.requests.unpublish("docker:web") == ()
    assert published(daemon) == ["0.0.0.0:8000:80/tcp"]


def test_published_port_follows_a_container_to_its_new_address(daemon: Daemon, box: Namespace, tmp_path: Path) -> None:
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    daemon.requests.publish("docker:web", ["0.0.0.0:9000-9001:90-91"])
    daemon.adopt(Adopted((BRIDGE,), (), {"id of web": "docker:web"}))
    assert published(daemon) == []
    later = Daemon(tmp_path, daemon)
    later.adopt(Adopted((BRIDGE,), (container(box, 8000, last=3),)))
    assert {str(one.mapping): str(one.container_address) for one in later.requests.mappings()} == {
        "0.0.0.0:8000:80/tcp": "172.17.0.3",
        "0.0.0.0:9000-9001:90-91/tcp": "172.17.0.3",
    }
    later.adopt(Adopted((BRIDGE,), ()))
    later.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    assert published(later) == ["0.0.0.0:8000:80/tcp"]
    later.close()


def test_published_port_waits_until_it_is_free_again(daemon: Daemon, box: Namespace) -> None:
    running, stopped = Adopted((BRIDGE,), (container(box),)), Adopted((BRIDGE,), (), {"id of web": "docker:web"})
    daemon.adopt(running)
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90"])
    daemon.adopt(stopped)
    daemon.requests.create_network(WEB)
    with Namespace("other") as other:
        daemon.requests.attach(other.name, "web", ())
        daemon.requests.publish(other.name, ["0.0.0.0:9000:90"])
        daemon.adopt(running)
        assert [one.mapping.container for one in daemon.requests.mappings()] == [other.name]
        daemon.requests.unpublish(other.name)
        daemon.adopt(running)
        assert [one.mapping.container for one in daemon.requests.mappings()] == ["docker:web"]
        daemon.requests.unpublish("docker:web")
        daemon.adopt(running)
        assert published(daemon) == []


def test_published_port_outlives_the_moment_between_a_containers_end_and_dockers_word(
    daemon: Daemon, box: Namespace
) -> None:
    """Docker still lists the container as running, and its process has ended."""
    running = Adopted((BRIDGE,), (container(box),))
    daemon.adopt(running)
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90"])
    daemon.adopt(Adopted((BRIDGE,), (container(box)._replace(namespace="/proc/4194305/ns/net"),)))
    assert published(daemon) == []
    daemon.adopt(running)
    assert published(daemon) == ["0.0.0.0:9000:90/tcp"]


def ports_of(daemon: Daemon) -> DockerPorts:
    return DockerPorts(lambda: "", True, daemon.requests, daemon.adoption)


def waiting(ports: DockerPorts, container: str | None = None) -> list[str]:
    return [f"{one.container} {one} {ports.why_waiting(one)}" for one in ports.mappings(container).waiting]


def test_ports_of_stopped_container_are_listed_and_can_be_unpublished(
    daemon: Daemon, box: Namespace, tmp_path: Path
) -> None:
    """By the name that the container has by then, and also by the next daemon."""
    running = Adopted((BRIDGE,), (container(box, 8000),))
    daemon.adopt(running)
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90", "0.0.0.0:9001:91/udp"])
    daemon.adopt(Adopted((BRIDGE,), (), {"id of web": "docker:web"}))
    daemon.adopt(Adopted((BRIDGE,), (), {"id of web": "docker:shop"}))
    later = Daemon(tmp_path, daemon)
    ports = ports_of(later)
    reason = "container is stopped"
    both = [f"docker:shop 0.0.0.0:9000:90/tcp {reason}", f"docker:shop 0.0.0.0:9001:91/udp {reason}"]
    assert waiting(ports) == waiting(ports, "docker:shop") == both
    with pytest.raises(Conflict, match="91/udp of docker:shop is not published: gangway ls says why"):
        later.requests.explain(Protocol.UDP, ip_address("0.0.0.0"), 9001, None)
    for name, texts, said in (
        ("docker:shop", ["0.0.0.0:9000:90", "0.0.0.0:9009:90"], "does not run, and has no mapping -p 0.0.0.0:9009:90"),
        ("docker:web", [], "does not run, and gangway has published no ports of it"),
    ):
        with pytest.raises(Conflict, match=said):
            ports.unpublish(name, texts)
    assert waiting(ports) == both
    assert [*map(str, ports.unpublish("docker:shop", ["9000:90"]).waiting)] == ["0.0.0.0:9000:90/tcp"]
    assert waiting(ports) == both[1:]
    ports.unpublish("docker:shop", [])
    assert waiting(ports) == []
    later.adopt(running)
    assert published(later) == ["0.0.0.0:8000:80/tcp"]
    later.close()


def test_port_that_was_unpublished_does_not_come_back_with_one_that_waits(daemon: Daemon, box: Namespace) -> None:
    """Of two ports one is in use when the container runs again; that is not forgotten, and the other one is."""
    running, stopped = Adopted((BRIDGE,), (container(box),)), Adopted((BRIDGE,), (), {"id of web": "docker:web"})
    daemon.adopt(running)
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90", "0.0.0.0:9001:91", "0.0.0.0:9002:92"])
    daemon.adopt(stopped)
    ports = ports_of(daemon)
    daemon.requests.create_network(WEB)
    with Namespace("other") as other:
        daemon.requests.attach(other.name, "web", ())
        daemon.requests.publish(other.name, ["0.0.0.0:9000:90"])
        daemon.adopt(running)
        assert waiting(ports) == ["docker:web 0.0.0.0:9000:90/tcp not published: see the log"]
        ports.unpublish("docker:web", ["0.0.0.0:9001:91"])
        for one in (running, stopped, running):
            daemon.adopt(one)
        assert waiting(ports) == ["docker:web 0.0.0.0:9000:90/tcp not published: see the log"]
        assert published(daemon) == ["0.0.0.0:9000:90/tcp", "0.0.0.0:9002:92/tcp"]
        removed = ports.unpublish("docker:web", ["0.0.0.0:9000:90", "0.0.0.0:9002:92"])
        assert ([len(one) for one in removed], waiting(ports)) == ([1, 1], [])
        daemon.adopt(running)
        assert published(daemon) == ["0.0.0.0:9000:90/tcp"]


def test_container_moves_while_it_runs(daemon: Daemon, box: Namespace) -> None:
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90"])
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000, last=3),)))
    assert {str(one.container_address) for one in daemon.requests.mappings()} == {"172.17.0.3"}
    assert published(daemon) == ["0.0.0.0:8000:80/tcp", "0.0.0.0:9000:90/tcp"]


@pytest.mark.parametrize(
    ("firewall", "restricted"),
    [(Firewall.NFTABLES, ["8000", "9000"]), (Firewall.IPTABLES, ["8000", "9000"]), (Firewall.NONE, ["9000"])],
)
def test_port_that_a_launcher_serves_to_everybody_is_not_called_restricted(
    daemon: Daemon, box: Namespace, monkeypatch: pytest.MonkeyPatch, firewall: Firewall, restricted: list[str]
) -> None:
    """Only rules also restrict the leases of docker-proxy launchers."""
    facts = replace(daemon.requests.facts, firewall=firewall, leased=True)
    monkeypatch.setattr(Controller, "facts", property(lambda _: facts))
    monkeypatch.setattr(Leases, "has_any", True)
    ports = [replace(port(number, is_held=number == 8000), admitted=BRIDGE.subnets) for number in (8000, 9000)]
    daemon.adopt(Adopted((BRIDGE,), (container(box)._replace(mappings=tuple(ports)),)))
    assert [str(one.mapping.host_ports) for one in daemon.requests.mappings()] == restricted
    assert any("gangway.from does not hold for 0.0.0.0:8000" in one for one in daemon.log) is ("8000" not in restricted)


def test_renamed_container_keeps_its_ports(daemon: Daemon, box: Namespace, tmp_path: Path) -> None:
    """Nothing changes on the host, and the next daemon knows the new name."""
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90"])
    calls = len(daemon.calls.names)
    shop = container(box, 8000, name="shop")._replace(id="id of web")
    daemon.adopt(Adopted((BRIDGE,), (shop,)))
    assert not {"driver.change", "relay.remove", "redirect.remove"} & {*daemon.calls.names[calls:]}
    later = Daemon(tmp_path, daemon)
    for one in (daemon, later):
        assert published(one) == ["0.0.0.0:8000:80/tcp", "0.0.0.0:9000:90/tcp"]
        assert {planned.mapping.container for planned in one.requests.mappings()} == {"docker:shop"}
    assert len(later.requests.unpublish("docker:shop")) == 1
    assert published(later) == ["0.0.0.0:8000:80/tcp"]
    later.close()


def test_swapped_names_are_followed(daemon: Daemon, box: Namespace) -> None:
    with Namespace("other") as other:
        boxes = {"web": (box, 2), "shop": (other, 3)}
        daemon.adopt(Adopted((BRIDGE,), tuple(container(at, name=name, last=n) for name, (at, n) in boxes.items())))
        daemon.requests.publish("docker:web", ["0.0.0.0:9000:90"])
        swapped = (
            container(box, name="shop")._replace(id="id of web"),
            container(other, last=3)._replace(id="id of shop"),
        )
        daemon.adopt(Adopted((BRIDGE,), swapped))
        (only,) = daemon.requests.mappings()
        assert (only.mapping.container, str(only.container_address)) == ("docker:shop", "172.17.0.2")


@pytest.mark.parametrize("is_renamed", [False, True], ids=["same name", "renamed"])
def test_ports_end_with_the_container_and_not_with_its_name(daemon: Daemon, box: Namespace, is_renamed: bool) -> None:
    """A container with a former one's name gets nothing of it; one that is renamed while it is stopped does."""
    daemon.adopt(Adopted((BRIDGE,), (container(box),)))
    daemon.requests.publish("docker:web", ["0.0.0.0:9000:90"])
    if is_renamed:
        daemon.adopt(Adopted((BRIDGE,), (), {"id of web": "docker:web"}))
    later = (
        container(box, name="shop")._replace(id="id of web") if is_renamed else container(box)._replace(id="another")
    )
    daemon.adopt(Adopted((BRIDGE,), (later,)))
    assert published(daemon) == ["0.0.0.0:9000:90/tcp"] * is_renamed


DOCKERS = replace(BRIDGE, has_rules=False)


@pytest.fixture
def follower(daemon: Daemon) -> DockerPorts:
    """What publishes ports where dockerd keeps its rules."""
    return DockerPorts(lambda: "/run/docker.sock", False, daemon.requests, daemon.adoption)


def publish_followed(
    daemon: Daemon, follower: DockerPorts, box: Namespace, patch: pytest.MonkeyPatch, text: str = "0.0.0.0:9000:90"
) -> None:
    """Publish a port of a container that Docker's API has."""
    found = Adopted((DOCKERS,), (container(box),))
    patch.setattr(lookup, "find_container", lambda path, name: found if (path, name) == FOUND_AT else None)
    follower.publish("docker:web", [text], ())


FOUND_AT = ("/run/docker.sock", "web")


def test_port_beside_dockerds_rules_follows_its_container(
    daemon: Daemon, follower: DockerPorts, box: Namespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not daemon.requests.follows_docker
    publish_followed(daemon, follower, box, monkeypatch)
    with Namespace("other") as other:
        subnets, gateways = (ip_network("172.18.0.0/16"),), (ip_address("172.18.0.1"),)
        others = Network("docker:far", "br-far", subnets, gateways, source=Source.DOCKER, has_rules=False)
        far = container(other, name="far")
        moved = Adopted((DOCKERS, others), (container(box, last=3), far))
        daemon.adoption.follow(moved)
        (only,) = daemon.requests.mappings()
        assert str(only.container_address) == "172.17.0.3"
        assert {route.road for route in only.routes} == {Road.REDIRECT, Road.RELAY}
        assert daemon.requests.networks() == (DOCKERS,)
        assert published(daemon) == ["0.0.0.0:9000:90/tcp"]
        assert not daemon.driver.mappings
        daemon.adoption.follow(Adopted((DOCKERS, others), (far,), {"id of web": "docker:web"}))
    assert published(daemon) == []
    later = Daemon(tmp_path, daemon)
    assert later.requests.follows_docker
    assert not later.requests.is_idle
    later.adoption.follow(Adopted((DOCKERS,), (container(box),)))
    assert published(later) == ["0.0.0.0:9000:90/tcp"]
    DockerPorts(lambda: "", False, later.requests, later.adoption).unpublish("docker:web", [])
    assert later.requests.is_idle
    assert not later.requests.follows_docker
    later.close()


def test_port_beside_dockerds_rules_ends_with_its_container(
    daemon: Daemon, follower: DockerPorts, box: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_followed(daemon, follower, box, monkeypatch)
    daemon.requests.check()
    assert published(daemon) == ["0.0.0.0:9000:90/tcp"]
    daemon.relay.kill()
    daemon.requests.check()
    assert published(daemon) == ["0.0.0.0:9000:90/tcp"]
    daemon.adoption.follow(Adopted((DOCKERS,), ()))
    assert published(daemon) == []
    assert daemon.requests.is_idle


def test_port_that_cannot_be_published_leaves_nothing_of_dockers_behind(
    daemon: Daemon, follower: DockerPorts, box: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.calls.fail("relay.serve")
    with pytest.raises(HostRefused):
        publish_followed(daemon, follower, box, monkeypatch)
    assert daemon.requests.is_idle
    assert published(daemon) == []


def test_ports_move_to_dockerds_rules_and_back(
    daemon: Daemon, follower: DockerPorts, box: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon is started with --docker, or without it again."""
    publish_followed(daemon, follower, box, monkeypatch)
    daemon.adopt(Adopted((BRIDGE,), (container(box, 8000),)))
    assert published(daemon) == ["0.0.0.0:8000:80/tcp", "0.0.0.0:9000:90/tcp"]
    assert daemon.driver.mappings == {*published(daemon)}
    daemon.adoption.follow(Adopted((DOCKERS,), (container(box),)))
    assert published(daemon) == ["0.0.0.0:9000:90/tcp"]
    assert not daemon.driver.mappings
