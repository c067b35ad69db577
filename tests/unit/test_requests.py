"""What each request changes, and that a failure below any step leaves registry, index and host as they were."""

import re
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from gangway.errors import Conflict, HostRefused, PortInUse, Unsupported
from gangway.host import probe, sockets
from gangway.host.links import Links
from gangway.model import ON_DEMAND, Protocol
from gangway.plan import Origin, Road
from gangway.relay import protocol
from gangway.relay.protocol import Destination
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.unit.fake_daemon import Daemon, listening
from tests.unit.samples import INNER, WEB, mapping, network

PORTS = ["127.0.0.1:8000:80/udp", "9000-9001:90-91"]
ANY4 = ip_address("0.0.0.0")

pytestmark = pytest.mark.usefixtures("own_namespace")


@pytest.fixture
def attached(daemon: Daemon, box: Namespace) -> Daemon:
    """A daemon with a network that a container is attached to."""
    daemon.requests.create_network(WEB)
    daemon.requests.attach(box.name, "web", ())
    return daemon


def stored(daemon: Daemon) -> list[str]:
    """Return what is wanted, in memory and on disk, and the mapping of each port."""
    requests, database = daemon.requests, daemon.database
    memory = *requests.networks(), *requests.endpoints(), *requests.mappings()
    disk = *database.networks(), *database.endpoints(), *database.mappings()
    index = (daemon.registry.index.at(Protocol.TCP, ANY4, port) for port in range(9000, 9003))
    return [*sorted(map(repr, (*memory, *disk))), *map(str, index)]


def test_attach_and_publish(daemon: Daemon, box: Namespace) -> None:
    assert daemon.requests.is_idle
    endpoint = daemon.requests.attach(box.name, None, ())
    (network_on_demand,) = daemon.requests.networks()
    assert (endpoint.network, network_on_demand.name) == (ON_DEMAND, ON_DEMAND)
    planned = daemon.requests.publish(box.name, PORTS)
    assert [str(one.mapping) for one in planned] == [
        "127.0.0.1:8000:80/udp",
        "0.0.0.0:9000-9001:90-91/tcp",
        "[::]:9000-9001:90-91/tcp",
    ]
    assert daemon.requests.mappings(box.name) == planned
    assert daemon.is_consistent()
    assert daemon.requests.unpublish(box.name, PORTS[:1]) == planned[:1]
    daemon.requests.detach(box.name)
    assert daemon.requests.networks() == ()
    assert daemon.requests.is_idle
    assert daemon.is_consistent()
    assert not sockets.bound_ports("udp")


def test_later_daemon_has_everything(attached: Daemon, box: Namespace, tmp_path: Path) -> None:
    attached.requests.publish(box.name, PORTS)
    later = Daemon(tmp_path, attached)
    assert stored(later) == stored(attached)
    assert later.is_consistent()
    later.close()


@pytest.mark.parametrize(
    "failing", ["relay.serve", "steering.add", "driver.change", "redirect.add", "steering.reserve"]
)
def test_failed_publish_leaves_nothing(attached: Daemon, box: Namespace, failing: str) -> None:
    attached.requests.publish(box.name, PORTS)
    before = stored(attached)
    attached.calls.fail(failing)
    with pytest.raises(HostRefused, match=f"{failing} failed"):
        attached.requests.publish(box.name, ["127.0.0.1:8001:81", "9002:92"])
    attached.calls.fail()
    assert stored(attached) == before
    assert attached.is_consistent()
    assert sockets.bound_ports("udp") == {8000}
    assert attached.requests.publish(box.name, ["9002:92"])


@pytest.mark.parametrize("failing", ["steering.remove", "relay.remove"])
def test_failed_unpublish_leaves_the_ports_published(attached: Daemon, box: Namespace, failing: str) -> None:
    attached.requests.publish(box.name, PORTS)
    before = stored(attached)
    attached.calls.fail(failing)
    with pytest.raises(HostRefused, match=f"{failing} failed"):
        attached.requests.unpublish(box.name)
    attached.calls.fail()
    assert stored(attached) == before
    assert attached.is_consistent()
    attached.requests.unpublish(box.name)
    assert attached.requests.mappings() == ()


@pytest.mark.parametrize(
    ("request_of", "method"),
    [
        (lambda daemon, _box: daemon.requests.create_network(network("other", "172.31.0.0/24")), "create_bridge"),
        (lambda daemon, box: daemon.requests.attach(box.name, "web", ()), "attach"),
        (lambda daemon, box: daemon.requests.attach(box.name, None, ()), "attach"),
        (lambda daemon, _box: daemon.requests.remove_network("web"), "delete"),
    ],
)
def test_failed_link_leaves_nothing(
    daemon: Daemon,
    box: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    request_of: Callable[[Daemon, Namespace], object],
    method: str,
) -> None:
    daemon.requests.create_network(WEB)
    before, delete = stored(daemon), Links.delete

    def refuse(_links: Links, name: str, *_: object) -> None:
        if method == "delete" and name != WEB.bridge:
            return delete(_links, name)
        raise HostRefused(f"cannot {method} {name}")

    monkeypatch.setattr(Links, method, refuse)
    with pytest.raises(HostRefused, match=f"cannot {method}"):
        request_of(daemon, box)
    monkeypatch.undo()
    assert stored(daemon) == before
    assert daemon.is_consistent()


def test_failed_rewrite_leaves_no_network(daemon: Daemon) -> None:
    daemon.calls.fail("driver.rewrite")
    with pytest.raises(HostRefused):
        daemon.requests.create_network(WEB)
    assert daemon.requests.is_idle
    assert daemon.is_consistent()


def test_port_of_a_lease_is_not_published(attached: Daemon, box: Namespace) -> None:
    granted = attached.leases.grant(protocol.Lease("tcp", Destination("172.17.0.2", 80)), listening("0.0.0.0", 9000), 0)
    with pytest.raises(Conflict, match=r"0\.0\.0\.0:9000/tcp is published by Docker for 172\.17\.0\.2"):
        attached.requests.publish(box.name, PORTS)
    assert [str(one.mapping) for one in attached.requests.mappings()] == ["0.0.0.0:9000:80/tcp"]
    assert attached.requests.mappings(box.name) == ()
    explained = attached.requests.explain(Protocol.TCP, ip_address("127.0.0.1"), 9000, Origin.LOOPBACK)
    assert explained.network is None
    ((route, _rules),) = explained.routes
    assert route.road is Road.REDIRECT
    assert not attached.requests.is_idle
    attached.leases.end(granted)
    assert attached.requests.publish(box.name, PORTS)


def test_explain(attached: Daemon, box: Namespace) -> None:
    attached.requests.publish(box.name, PORTS)
    explained = attached.requests.explain(Protocol.TCP, ip_address("::"), 9001, None)
    assert explained.network == WEB
    assert [route.origin for route, _ in explained.routes] == [one.origin for one in explained.planned.routes]
    with pytest.raises(Conflict, match="nothing is published at \\[::\\]:9002/tcp"):
        attached.requests.explain(Protocol.TCP, ip_address("::"), 9002, None)
    with pytest.raises(Conflict, match=r"192\.0\.2\.1 is not an address of this host"):
        attached.requests.explain(Protocol.TCP, ip_address("192.0.2.1"), 9000, None)


# Containers that have ended


def test_request_is_retried_after_reaping(attached: Daemon, box: Namespace) -> None:
    """What it needs belongs to a container that has ended, and of which no check has been notified yet."""
    attached.requests.publish(box.name, PORTS)
    with Namespace("next") as successor:
        attached.requests.attach(successor.name, "web", ())
        with pytest.raises(Conflict, match=f"already published for container {box.name}"):
            attached.requests.publish(successor.name, PORTS)
        box.close()
        wait_until(lambda: attached.controller.is_dead(box.name), "the end of the container's link", 5.0)
        planned = attached.requests.publish(successor.name, PORTS)
    assert {one.mapping.container for one in planned} == {successor.name}
    assert attached.log == [f"container {box.name} exited: its ports are unpublished"]


def test_request_is_not_retried_if_every_container_runs(attached: Daemon, box: Namespace) -> None:
    with sockets.bind_port("udp", "127.0.0.1", 8000), pytest.raises(PortInUse, match=r"stop .*, which listens on it"):
        attached.requests.publish(box.name, PORTS)
    assert attached.requests.mappings() == ()


def test_container_with_the_name_of_a_dead_one_is_attached(attached: Daemon, box: Namespace) -> None:
    box.close()
    box.__enter__()
    assert attached.requests.attach(box.name, "web", ()).container == box.name
    assert attached.is_consistent()


# What is refused


def test_refused_requests(attached: Daemon, box: Namespace, own_namespace: Namespace) -> None:
    requests = attached.requests
    with pytest.raises(Conflict, match="network web has containers"):
        requests.remove_network("web")
    with pytest.raises(Conflict, match=f"container {box.name} is attached to network web already: detach it first"):
        requests.attach(box.name, None, ())
    with pytest.raises(Conflict, match="is the network namespace of container"):
        requests.attach(box.path, None, ())
    with pytest.raises(Conflict, match="is the host's own network namespace"):
        requests.attach(own_namespace.name, None, ())
    with pytest.raises(Conflict, match="there is no network namespace /run/netns/none"):
        requests.attach("none", None, ())
    with pytest.raises(Conflict, match="no container named 'none' is attached; attached: "):
        requests.publish("none", PORTS)
    assert [one.name for one in requests.networks()] == ["web"]
    assert attached.is_consistent()


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("8000:80", "127.0.0.1:8000:80"),
        ("7000-7005:7000-7005/udp", "127.0.0.1:7000-7005:7000-7005/udp"),
        ("10.0.0.1::80-82/sctp", "127.0.0.1::80-82/sctp"),
        ("7000-7005:80", "127.0.0.1:7000-7005:80"),
        ("[fd00::1]:53:53/udp", "[::1]:53:53/udp"),
    ],
)
def test_internal_network_is_published_at_loopback_only(
    daemon: Daemon, box: Namespace, given: str, suggested: str
) -> None:
    daemon.requests.create_network(INNER)
    daemon.requests.attach(box.name, "inner", ())
    with pytest.raises(Conflict, match=f"on a loopback address only, as in -p {re.escape(suggested)}$"):
        daemon.requests.publish(box.name, ["127.0.0.1:9000:90", given])
    assert daemon.requests.mappings() == ()
    assert daemon.registry.index.collision(mapping("127.0.0.1", "9000")) is None
    assert daemon.requests.publish(box.name, ["127.0.0.1:9000:90"])


def test_without_root_nothing_is_changed(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "is_root", lambda: False)
    with pytest.raises(Unsupported, match="need root: without it, only docker-proxy's ports are served"):
        daemon.requests.create_network(WEB)
