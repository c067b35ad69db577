"""Each step goes to the part that carries it out; of several steps all are carried out, or none."""

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import Mock

import pytest

from gangway.ebpf.keys import PortBlock, SteeringState, Target
from gangway.errors import Conflict, HostRefused, Unsupported
from gangway.host import conntrack, probe, sockets, sysctl
from gangway.model import Network, Protocol
from gangway.plan import NetworkPlan
from gangway.reconcile.dataplane import TW_REUSE
from gangway.reconcile.diff import (
    Bridge,
    Flows,
    Forwarding,
    Isolation,
    Ports,
    Redirects,
    Rewrite,
    Rules,
    Steered,
    Step,
    Veth,
)
from gangway.reconcile.state import Attachment
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from lab.netns import Namespace
from tests.unit.fake_daemon import Daemon
from tests.unit.samples import NFTABLES, WEB, endpoint, lease, mapping, network, planned, whole

PORT, SECOND = HostPorts("tcp", "127.0.0.1", 8000, 8000), HostPorts("tcp", "127.0.0.1", 8001, 8001)
OWN, OWN2 = (Serve(ports, Destination("172.30.0.2", 80), Mode.OWN) for ports in (PORT, SECOND))
SHARED = Serve(HostPorts("tcp", "0.0.0.0", 9000, 9001), Destination("172.30.0.2", 80), Mode.SHARED)
BLOCK = PortBlock("tcp", "0.0.0.0", 9000, 9001)
REDIRECTS = ((BLOCK, Target("172.30.0.2", 80)),)
ONE, OTHER = planned(mapping("0.0.0.0", "80")), planned(mapping("0.0.0.0", "81"))
PLAN = whole(NFTABLES)
MAKE_BRIDGE = Bridge(None, NetworkPlan(WEB, False), WEB.bridge)
SERVE, REDIRECT = Ports((), (OWN,)), Redirects((), REDIRECTS)
CHANGE = Rules((), (ONE,))

pytestmark = pytest.mark.usefixtures("own_namespace")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    found = Daemon(tmp_path)
    found.executor.driver = found.driver
    yield found
    found.end()


def test_rules_go_to_the_driver(daemon: Daemon) -> None:
    daemon.executor.do(Rewrite(None, PLAN))
    assert daemon.driver.plan is PLAN
    daemon.executor.do(Rules((), (ONE, OTHER)))
    daemon.executor.do(Rules((ONE,), ()))
    assert daemon.driver.mappings == {str(OTHER.mapping)}
    daemon.executor.do(Rewrite(PLAN, None))
    assert daemon.calls.names == ["driver.rewrite", "driver.change", "driver.change", "driver.remove"]


def test_ports_go_to_the_relay(daemon: Daemon) -> None:
    daemon.executor.do(SERVE)
    assert daemon.relay.served() == [OWN]
    assert sockets.bound_ports("tcp") == {8000}
    assert sysctl.read(TW_REUSE) == "1"
    daemon.executor.do(Ports((OWN,), ()))
    assert not daemon.relay.served()
    assert not sockets.bound_ports("tcp")


def test_reserved_socket_is_served(daemon: Daemon) -> None:
    with sockets.bind_port("tcp", "127.0.0.1", 8000) as sock:
        daemon.executor.do(SERVE, {PORT: [sock.fileno()]})
    assert sockets.bound_ports("tcp") == {8000}


def test_ports_are_served_all_or_none(daemon: Daemon) -> None:
    with sockets.bind_port("tcp", "127.0.0.1", 8001), pytest.raises(Exception, match="8001/tcp is in use"):
        daemon.executor.do(Ports((), (OWN, OWN2)))
    assert not daemon.relay.served()
    assert not sockets.bound_ports("tcp")


def test_shared_ports_are_reserved_and_steered(daemon: Daemon) -> None:
    daemon.executor.do(Ports((), (SHARED,)))
    assert daemon.steering.steered == {BLOCK: SteeringState.RESERVED}
    entry = (BLOCK, SteeringState.SERVED)
    daemon.executor.do(Steered((), (entry,)))
    assert daemon.steering.steered == dict([entry])
    daemon.executor.do(Steered((entry,), ()))
    daemon.executor.do(Ports((SHARED,), ()))
    assert not daemon.steering.steered
    assert not daemon.relay.served()


@pytest.mark.parametrize(("protocol", "descriptors"), [("tcp", 0), ("udp", 1)])
def test_held_ports_are_never_reserved(daemon: Daemon, protocol: str, descriptors: int) -> None:
    held = SHARED._replace(ports=SHARED.ports._replace(protocol=protocol), mode=Mode.HELD)
    entry = (BLOCK._replace(protocol=protocol), SteeringState.HELD)
    with sockets.bind_port(protocol, "0.0.0.0", 9000):
        daemon.executor.carry_out([Ports((), (held,)), Steered((), (entry,))])
    assert (daemon.relay.served(), daemon.steering.steered) == ([held], dict([entry]))
    assert len(daemon.relay.descriptors[held.ports]) == descriptors
    assert "steering.reserve" not in daemon.calls.names
    daemon.executor.carry_out([Steered((entry,), ()), Ports((held,), ())])
    assert (daemon.relay.served(), daemon.steering.steered) == ([], {})


def test_shared_port_that_is_not_served_is_not_reserved(daemon: Daemon) -> None:
    daemon.calls.fail("relay.serve")
    with pytest.raises(HostRefused):
        daemon.executor.do(Ports((), (SHARED,)))
    assert not daemon.steering.steered


def test_redirects_go_to_the_redirect(daemon: Daemon) -> None:
    daemon.executor.do(REDIRECT)
    assert daemon.redirect.targets == dict(REDIRECTS)
    daemon.executor.do(Redirects(REDIRECTS, ()))
    assert not daemon.redirect.targets


def test_forwarding_is_set(daemon: Daemon) -> None:
    off, on = frozenset[int](), frozenset({4})
    daemon.executor.do(Forwarding(off, on))
    assert probe.forwards(4)
    daemon.executor.do(Forwarding(on, off))
    assert not probe.forwards(4)


def test_flows_are_flushed_once_for_each_protocol_and_family(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: dict[tuple[str, int], list[conntrack.Destination]] = {}
    monkeypatch.setattr(conntrack, "delete", lambda name, family, to, _clients: flushed.update({(name, family): to}))
    many = [mapping("0.0.0.0", "80"), mapping("192.0.2.5", "81-82"), mapping("::", "53", protocol=Protocol.UDP)]
    many.append(mapping("192.0.2.5", "9", protocol=Protocol.SCTP))
    daemon.executor.do(Flows(tuple(map(planned, many)), ()))
    own = daemon.links.addresses()
    assert flushed == {
        ("tcp", 4): [(own, range(80, 81), ""), ({"192.0.2.5"}, range(81, 83), "")],
        ("udp", 6): [(own, range(53, 54), "")],
        ("sctp", 4): [({"192.0.2.5"}, range(9, 10), "")],
    }


def test_flows_that_lead_to_an_added_container_are_kept(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[conntrack.Destination] = []
    monkeypatch.setattr(conntrack, "delete", lambda _name, _family, to, _clients: flushed.extend(to))
    one, leased = planned(mapping("192.0.2.5", "81")), planned(lease("192.0.2.5", "82"))
    daemon.executor.do(Flows((), (one, leased)))
    assert flushed == [
        ({"192.0.2.5"}, range(81, 82), str(one.container_address)),
        ({"192.0.2.5"}, range(82, 83), str(leased.container_address)),
    ]


def test_flows_by_nat_are_not_kept_if_clients_are_relayed(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another program's chain begins to drop what is forwarded: they would be dropped while they last."""
    flushed: list[conntrack.Destination] = []
    monkeypatch.setattr(conntrack, "delete", lambda _name, _family, to, _clients: flushed.extend(to))
    dropping = replace(NFTABLES, forward_droppers=((4, "ip other forward"),))
    daemon.executor.do(Flows((), (planned(mapping("192.0.2.5", "81"), dropping),)))
    assert flushed == [({"192.0.2.5"}, range(81, 82), "")]


def test_a_kernel_without_access_to_flows_is_no_failure(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conntrack, "delete", Mock(side_effect=Unsupported("no access")))
    daemon.executor.do(Flows((ONE,), ()))
    monkeypatch.setattr(conntrack, "delete", Mock(side_effect=HostRefused("refused")))
    with pytest.raises(HostRefused):
        daemon.executor.do(Flows((ONE,), ()))


def test_links_are_created_and_deleted(daemon: Daemon) -> None:
    with Namespace("box") as box:
        veth = Attachment(endpoint(WEB), WEB, box.path, isolated=True)
        for step in (MAKE_BRIDGE, Veth(None, veth, "gw1")):
            daemon.executor.do(step)
        found = daemon.observer.found_links()
        assert (list(found.bridges), list(found.attachments)) == (["gw-web"], ["gw1"])
        assert found.isolated == {"gw1"}
        assert "172.30.0.2/24" in box.ip("-4", "-o", "address")
        daemon.executor.do(
            Isolation(not veth._replace(isolated=False).isolated, veth._replace(isolated=False).isolated, "gw1")
        )
        assert not daemon.observer.found_links().isolated
        daemon.executor.do(Veth(None, veth, "gw1"))  # again: an earlier daemon may have been killed
        daemon.executor.do(Veth(veth, None, "gw1"))
        daemon.executor.do(Bridge(None, None, "gw-web"))
    assert daemon.observer.found_links() == type(found)()


@pytest.mark.parametrize("done", range(5))
def test_steps_before_a_failure_are_undone(daemon: Daemon, done: int) -> None:
    steps: list[Step] = [MAKE_BRIDGE, SERVE, CHANGE, REDIRECT]
    failing = Veth(None, Attachment(endpoint(WEB), WEB, "/run/netns/none", False), "gw1")
    with pytest.raises(Conflict, match="there is no network namespace /run/netns/none"):
        daemon.executor.carry_out([*steps[:done], failing])
    assert (daemon.relay.ports, daemon.redirect.targets, daemon.driver.mappings) == ({}, {}, set())
    assert not daemon.observer.found_links().bridges
    order = ["relay.serve", "driver.change", "redirect.add"][: max(done - 1, 0)]
    undone = {"relay.serve": "relay.remove", "driver.change": "driver.change", "redirect.add": "redirect.remove"}
    assert daemon.calls.names == [*order, *(undone[name] for name in reversed(order))]


def test_failure_to_undo_is_reported_with_the_first_one(daemon: Daemon) -> None:
    daemon.calls.fail("driver.change", "redirect.remove")
    with pytest.raises(ExceptionGroup) as failed:
        daemon.executor.carry_out([SERVE, REDIRECT, CHANGE])
    assert list(map(str, failed.value.exceptions)) == ["driver.change failed", "redirect.remove failed"]
    assert not daemon.relay.ports  # the others are undone


def test_network_that_conflicts_with_the_host(daemon: Daemon) -> None:
    daemon.executor.check_free(WEB)
    daemon.executor.do(MAKE_BRIDGE)
    with pytest.raises(Conflict, match="interface gw-web exists already: choose another name with --bridge"):
        daemon.executor.check_free(WEB)
    overlapping: Network = network("other", "172.30.0.128/25")
    with pytest.raises(Conflict, match=r"subnet 172\.30\.0\.128/25 overlaps 172\.30\.0\.0/24, which this host routes"):
        daemon.executor.check_free(overlapping)
    assert daemon.executor.has_address(ip_address("172.30.0.1"))
    assert not daemon.executor.has_address(ip_address("172.30.0.2"))
