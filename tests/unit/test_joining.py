"""A container joins networks and leaves them: what is wanted, and that a failure leaves everything as it was."""

import os
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from gangway.errors import Conflict, HostRefused, InvalidRequest
from gangway.host import conntrack
from gangway.host.links import Links
from gangway.model import ON_DEMAND, Endpoint, Source
from gangway.reconcile.state import link_name
from gangway.state.adopted import Adopted, AdoptedContainer
from lab.netns import Namespace, ip
from lab.waiting import wait_until
from tests.unit.fake_daemon import Daemon
from tests.unit.samples import BACK, WEB
from tests.unit.test_adoption import BRIDGE
from tests.unit.test_requests import stored

pytestmark = pytest.mark.usefixtures("own_namespace")

PORTS = ["127.0.0.1:8000:80/udp", "9000-9001:90-91"]


@pytest.fixture
def attached(daemon: Daemon, box: Namespace) -> Daemon:
    """A daemon with two networks, the first of which has a container with ports."""
    daemon.requests.create_network(WEB)
    daemon.requests.create_network(BACK)
    daemon.requests.attach(box.name, "web", ())
    daemon.requests.publish(box.name, PORTS)
    return daemon


@pytest.fixture
def joined(attached: Daemon, box: Namespace) -> Daemon:
    """The same, with the container on both networks."""
    attached.requests.attach(box.name, "back", ())
    return attached


def interfaces(box: Namespace) -> list[str]:
    """Return a container's interfaces, each with its IPv4 address."""
    lines = box.ip("-4", "-o", "address").splitlines()[1:]
    return sorted(f"{words[1]} {words[3]}" for words in map(str.split, lines))


def masqueraded(daemon: Daemon) -> list[str]:
    """Return the clients on further networks that rules were written for."""
    return sorted(str(one.subnet) for one in daemon.driver.further)


def test_a_container_joins_a_network_and_leaves_it(attached: Daemon, box: Namespace) -> None:
    requests, before = attached.requests, stored(attached)
    endpoint = requests.attach(box.name, "back", [ip_address("172.31.0.9")])
    assert (endpoint.network, endpoint.addresses[0], endpoint.is_first) == ("back", ip_address("172.31.0.9"), False)
    assert [one.network for one in requests.endpoints_of(box.name)] == ["web", "back"]
    assert requests.network_of(box.name) == WEB
    assert interfaces(box) == ["eth0 172.30.0.2/24", "eth1 172.31.0.9/24"]
    assert box.ip("route", "show", "default").split()[:3] == ["default", "via", "172.30.0.1"]
    assert attached.registry.link_names(box.name) == (link_name(box.name), link_name(box.name, "back"))
    assert masqueraded(attached) == ["172.31.0.0/24", "fd31::/64"]
    assert attached.is_consistent()
    requests.detach(box.name, "back")
    assert stored(attached) == before
    assert masqueraded(attached) == []
    assert attached.is_consistent()


def test_only_the_rules_for_its_clients_change(attached: Daemon, box: Namespace) -> None:
    calls = len(attached.calls.names)
    attached.requests.attach(box.name, "back", ())
    attached.requests.detach(box.name, "back")
    attached.controller.check(thorough=True)
    changes = [one for one in attached.calls.names[calls:] if one.startswith("driver.")]
    assert changes == ["driver.change_further", "driver.change_further"]


@pytest.mark.parametrize("network", ["back", None])
def test_a_container_that_ends_while_it_leaves(
    joined: Daemon, box: Namespace, monkeypatch: pytest.MonkeyPatch, network: str | None
) -> None:
    """Its end is found by the repair that is made when a rule is missing."""
    reconcile = joined.controller.reconcile

    def end() -> None:
        joined.calls.fail()
        links = joined.registry.link_names(box.name)
        box.close()
        wait_until(lambda: not joined.links.exists(*links), "the end of its links", 5)
        reconcile()

    monkeypatch.setattr(joined.controller, "reconcile", end)
    joined.calls.fail("driver.change_further")
    with pytest.raises(Conflict, match=f"no container named '{box.name}' is attached"):
        joined.requests.detach(box.name, network)
    assert joined.requests.endpoints() == ()
    assert joined.is_consistent()


def test_a_later_daemon_has_both_networks(joined: Daemon, box: Namespace, tmp_path: Path) -> None:
    for name in (link_name(box.name), link_name(box.name, "back")):
        joined.links.delete(name)
    later = Daemon(tmp_path, joined)
    assert stored(later) == stored(joined)
    assert interfaces(box) == ["eth0 172.30.0.2/24", "eth1 172.31.0.2/24"]
    assert later.is_consistent()
    later.close()


@pytest.mark.parametrize(
    ("request_of", "failing"),
    [
        (lambda requests, box: requests.attach(box, "back", ()), "attach"),
        (lambda requests, box: requests.attach(box, "back", ()), "driver.change_further"),
        (lambda requests, box: requests.attach(box, ON_DEMAND, ()), "driver.change_further"),
        (lambda requests, box: requests.attach(box, ON_DEMAND, ()), "driver.rewrite"),
    ],
)
def test_failed_join_leaves_nothing(
    attached: Daemon,
    box: Namespace,
    monkeypatch: pytest.MonkeyPatch,
    request_of: Callable[[object, str], object],
    failing: str,
) -> None:
    before = stored(attached)
    _fail(attached, monkeypatch, failing, link_name(box.name, "back"))
    with pytest.raises(HostRefused):
        request_of(attached.requests, box.name)
    _fail(attached, monkeypatch)
    assert stored(attached) == before
    assert interfaces(box) == ["eth0 172.30.0.2/24"]
    assert attached.is_consistent()


@pytest.mark.parametrize("network", ["back", None])
@pytest.mark.parametrize("failing", ["delete", "driver.change_further"])
def test_failed_leave_restores_both(
    joined: Daemon, box: Namespace, monkeypatch: pytest.MonkeyPatch, network: str | None, failing: str
) -> None:
    """When a container leaves all networks, the first link is deleted last: it is the one that fails."""
    before = stored(joined)
    _fail(joined, monkeypatch, failing, link_name(box.name, network or ""))
    with pytest.raises(HostRefused):
        joined.requests.detach(box.name, network)
    _fail(joined, monkeypatch)
    joined.requests.check()
    assert stored(joined) == before
    assert interfaces(box) == ["eth0 172.30.0.2/24", "eth1 172.31.0.2/24"]
    assert joined.is_consistent()
    joined.requests.detach(box.name, network)
    assert joined.is_consistent()


def _fail(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, failing: str = "", link: str = "") -> None:
    """Let a call of the driver's fail, or one about a link; without any, none."""
    daemon.calls.fail(*[failing] * ("." in failing))
    if not failing:
        monkeypatch.undo()
    elif "." not in failing:
        original = getattr(Links, failing)

        def refuse(links: Links, name: str, *given: object) -> None:
            if name == link:
                raise HostRefused(f"cannot {failing} {name}")
            original(links, name, *given)

        monkeypatch.setattr(Links, failing, refuse)


def test_the_first_network_is_left_last(joined: Daemon, box: Namespace) -> None:
    requests, before = joined.requests, stored(joined)
    with pytest.raises(Conflict, match=rf"on network web: detach it from back first, .*: gangway detach {box.name}$"):
        requests.detach(box.name, "web")
    with pytest.raises(Conflict, match="is not attached to network other; it is on web, back"):
        requests.detach(box.name, "other")
    for name in ("web", "back"):
        with pytest.raises(Conflict, match=f"network {name} has containers \\({box.name}\\)"):
            requests.remove_network(name)
    assert stored(joined) == before
    requests.detach(box.name, "back")
    requests.detach(box.name, "web")
    assert (requests.endpoints(), requests.mappings(), interfaces(box)) == ((), (), [])
    assert joined.is_consistent()


def test_leaving_all_networks_unpublishes(joined: Daemon, box: Namespace) -> None:
    joined.requests.detach(box.name)
    assert (joined.requests.endpoints(), joined.requests.mappings(), interfaces(box)) == ((), (), [])
    assert joined.is_consistent()


def test_a_network_on_demand_ends_with_its_last_endpoint(attached: Daemon, box: Namespace) -> None:
    attached.requests.attach(box.name, ON_DEMAND, ())
    assert [one.name for one in attached.requests.networks()] == ["web", "back", ON_DEMAND]
    attached.requests.detach(box.name, ON_DEMAND)
    assert [one.name for one in attached.requests.networks()] == ["web", "back"]


def test_the_end_of_a_container_changes_only_its_rules(joined: Daemon, box: Namespace) -> None:
    links, calls = joined.registry.link_names(box.name), len(joined.calls.names)
    box.close()
    wait_until(lambda: not joined.links.exists(*links), "the end of its links", 5)
    joined.controller.check(thorough=True)
    changes = [one for one in joined.calls.names[calls:] if one.startswith("driver.")]
    assert changes == ["driver.change", "driver.change_further"]
    assert joined.is_consistent()


def test_a_dead_container_leaves_no_rules(joined: Daemon, box: Namespace) -> None:
    joined.requests.attach(box.name, ON_DEMAND, ())
    links = joined.registry.link_names(box.name)
    box.close()
    wait_until(lambda: not joined.links.exists(*links), "the end of its links", 5)
    joined.controller.check()
    assert (joined.requests.endpoints(), joined.requests.mappings()) == ((), ())
    assert [one.name for one in joined.requests.networks()] == ["web", "back"]
    assert joined.is_consistent()


def test_a_join_fails_whole_if_flows_cannot_be_deleted(
    attached: Daemon, box: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients on the network would stay without answers."""

    def refuse(*_given: object) -> bool:
        raise HostRefused("try again")

    attached.requests.publish(box.name, ["8002:80/udp"])
    before = stored(attached)
    with monkeypatch.context() as patch:
        patch.setattr(conntrack, "delete", refuse)
        with pytest.raises(HostRefused, match="try again"):
            attached.requests.attach(box.name, "back", ())
    assert stored(attached) == before
    assert interfaces(box) == ["eth0 172.30.0.2/24"]
    assert attached.is_consistent()
    attached.requests.attach(box.name, "back", ())


def test_a_container_lives_while_it_has_one_of_its_links(joined: Daemon, box: Namespace) -> None:
    """Its namespace has no name any more, and goes on for as long as it is in use."""
    with open(box.path):
        ip("netns", "delete", box.name)
        for name, is_dead in ((link_name(box.name), False), (link_name(box.name, "back"), True)):
            joined.links.delete(name)
            assert joined.controller.is_dead(box.name) is is_dead


def test_what_cannot_join(joined: Daemon, box: Namespace) -> None:
    requests, before = joined.requests, stored(joined)
    with pytest.raises(Conflict, match=f"container {box.name} is attached to network back already: detach it first"):
        requests.attach(box.name, "back", ())
    with pytest.raises(Conflict, match=r"is attached to network web, back already: .* or name another network"):
        requests.attach(box.name, None, ())
    with pytest.raises(InvalidRequest, match=r"address 172\.30\.0\.2 is in no subnet of network gangway0"):
        requests.attach(box.name, ON_DEMAND, [ip_address("172.30.0.2")])
    with pytest.raises(Conflict, match=f"container {box.name} is attached already, and process {os.getpid()} does not"):
        requests.attach(box.name, ON_DEMAND, (), owner=os.getpid())
    with Namespace("other") as other, pytest.raises(Conflict, match=f"{other.path} is another network namespace"):
        requests.attach(box.name, ON_DEMAND, (), namespace=other.path)
    assert stored(joined) == before
    assert requests.attach(box.name, ON_DEMAND, (), namespace=box.path).network == ON_DEMAND


def test_a_container_of_dockers_joins_by_docker_only(daemon: Daemon, box: Namespace) -> None:
    daemon.requests.create_network(WEB)
    endpoint = Endpoint("docker:box", BRIDGE.name, (ip_address("172.17.0.2"),), Source.DOCKER)
    daemon.adopt(Adopted((BRIDGE,), (AdoptedContainer("id", endpoint, box.path, ()),)))
    with pytest.raises(Conflict, match="network docker:bridge is Docker's: use the docker command"):
        daemon.requests.attach("docker:box", "web", ())


def test_down_names_each_network_of_a_container(joined: Daemon, box: Namespace) -> None:
    assert joined.down.planned()[:4] == [
        "network web",
        f"container {box.name} on it, 3 published ports",
        "network back",
        f"container {box.name} on it",
    ]
    joined.down.carry_out()
    assert joined.requests.is_idle
