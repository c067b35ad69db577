"""The lines about repairs."""

from gangway.ebpf.keys import PortBlock, Target
from gangway.plan import NetworkPlan
from gangway.reconcile.diff import Bridge, Isolation, Ports, Properties, Redirects, Rewrite, Step, Veth
from gangway.reconcile.properties import Kind, Property
from gangway.reconcile.repairs import describe, relay_restarted
from gangway.reconcile.state import Attachment, State
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from tests.unit.samples import NFTABLES, WEB, endpoint, whole

BOXES = {f"gw{number}": Attachment(endpoint(WEB), WEB, f"/run/netns/{number}", False) for number in range(7)}
BRIDGE = Bridge(None, NetworkPlan(WEB, False), WEB.bridge)
WANTED = State(bridges={WEB.bridge: NetworkPlan(WEB, False)}, attachments=BOXES)
NAME = endpoint(WEB).container


def lines(*steps: Step) -> list[str]:
    return list(describe(steps, WANTED))


def properties(*given: tuple[str, str, Kind, str]) -> Properties:
    return Properties((), tuple(Property(*one) for one in given))


def test_each_end_of_a_link_has_a_line() -> None:
    on_host = [("gw-web", "", Kind.UP, ""), ("gw-web", "", Kind.ADDRESS, "172.30.0.1/24"), ("gw1", "", Kind.UP, "")]
    inside = ("gw1", "/run/netns/1", Kind.DEFAULT_ROUTE, "IPv4")
    assert lines(properties(*on_host), properties(inside)) == [
        "bridge gw-web: up, address 172.30.0.1/24 missing: restored",
        f"interface gw1 of container {NAME}: up missing: restored",
        f"interface gw1 of container {NAME}, in its namespace: default route of IPv4 missing: restored",
    ]


def test_ports_of_a_new_bridge_are_its_own() -> None:
    assert lines(BRIDGE, properties(("gw1", "", Kind.BRIDGE, "gw-web"))) == ["bridge gw-web missing: created again"]


def test_many_are_counted() -> None:
    assert lines(*(Veth(None, one, name) for name, one in BOXES.items())) == [
        "interfaces of container (7) missing: created again"
    ]
    found = lines(properties(*((name, "", Kind.UP, "") for name in BOXES)))
    assert len(found) == 6
    assert found[-1] == "2 more interfaces: 2 addresses or routes restored"


def test_rules_ports_and_entries() -> None:
    served = Serve(HostPorts("tcp", "0.0.0.0", 8000, 8009), Destination("172.30.0.2", 80), Mode.SHARED)
    entry = PortBlock("tcp", "0.0.0.0", 8000, 8000), Target("172.30.0.2", 80)
    assert lines(Rewrite(None, whole(NFTABLES)), Ports((), (served,)), Redirects((), (entry,))) == [
        "rules were changed or deleted by another program: written again",
        "10 ports not served by the relay: served again",
        "1 entry of eBPF maps missing or changed: restored",
    ]
    assert lines(Isolation(False, True, "gw1")) == [f"interface gw1 of container {NAME}: isolation restored"]


def test_what_is_removed_is_no_repair() -> None:
    assert lines(Veth(None, None, "gw1"), Bridge(None, None, "gw-web"), Ports((), ())) == []


def test_relay() -> None:
    assert relay_restarted("signal 9", 412) == "relay exited (signal 9): restarted, 412 ports served again"
    assert relay_restarted("", 1) == "relay exited: restarted, 1 port served again"
    assert relay_restarted("status 1", 0) == "relay exited (status 1): no port needs one"
