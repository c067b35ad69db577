"""A pure model of a host for the tests of `diff`: values that steps change, and strategies for the states they lead to.

A step that contradicts the model's state fails: so an order in which a bridge is deleted before its ports is an error.
"""

from dataclasses import dataclass, field

from hypothesis import strategies as st

from gangway.ebpf.keys import PortBlock, SteeringState, Target, blocks
from gangway.model import Endpoint, Protocol
from gangway.neighbours import Neighbours, further_neighbours
from gangway.plan import MappingPlan, NetworkPlan, Plan
from gangway.reconcile.diff import (
    Bridge,
    Flows,
    Forwarding,
    Further,
    Isolation,
    Ports,
    Properties,
    Redirects,
    Rewrite,
    Rules,
    Steered,
    Step,
    Veth,
)
from gangway.reconcile.properties import Property, of_bridge, of_veth
from gangway.reconcile.state import Attachment, State, ports_of, redirects_of, steered_of
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from tests.unit.samples import BACK, NFTABLES, NO_STEERING, WEB, endpoint, held, mapping, planned, whole

NETWORKS = {network.bridge: network for network in (WEB, BACK)}
BRIDGES = {bridge: NetworkPlan(network, False) for bridge, network in NETWORKS.items()}
VETHS = {f"veth{number}": bridge for number, bridge in enumerate(("gw-web", "gw-web", "gw-back"))}
"""The bridge of each veth."""
PORTS = [HostPorts("tcp", "0.0.0.0", port, port) for port in (80, 81, 82)]
DESTINATIONS = [Destination("172.30.0.2", port) for port in (80, 81)]
# Steered mappings, the same of another container, the same with a socket for each port, and beside dockerd's sockets.
STEERED, ELSEWHERE, BY_SOCKETS, HELD = (
    [planned(made("0.0.0.0", *ports), facts, of) for ports in (("443",), ("8000-8010", "80-90"), ("9000-9002",))]
    for made, facts, of in (
        (mapping, NFTABLES, WEB),
        (mapping, NFTABLES, BACK),
        (mapping, NO_STEERING, WEB),
        (held, NFTABLES, WEB),
    )
)
PLANNED = {
    str(one): planned(one)
    for one in (mapping("0.0.0.0", "80"), mapping("::", "80"), mapping("0.0.0.0", "53", protocol=Protocol.UDP))
}
# Blocks of an earlier daemon's.
LEFT_OVER = list(blocks("udp", "::", 5000, 5010))
_LEFT_OVER_STATES = SteeringState.SERVED, SteeringState.RESERVED
# The same blocks with different targets.
HERE, THERE = (
    dict(redirects_of(planned(mapping("0.0.0.0", "8000-8010", container_ports))))
    for container_ports in ("80-90", "90-100")
)
NEIGHBOURS = tuple(further_neighbours(endpoint(WEB), WEB, BACK))
PLANS = (
    None,
    whole(NFTABLES, networks=(WEB,)),
    whole(NFTABLES, networks=(BACK,)),
    whole(NFTABLES, networks=(WEB, BACK)),
)


def attachment(name: str, isolated: bool = False) -> Attachment:
    """Return the attachment of a veth in VETHS."""
    network = NETWORKS[VETHS[name]]
    endpoint = Endpoint(name, network.name, (network.subnets[0][2],))
    return Attachment(endpoint, network, f"/run/netns/{name}", isolated)


def own(ports: HostPorts, to: Destination) -> Serve:
    """Return ports that the relay serves by a socket of their own."""
    return Serve(ports, to, Mode.OWN)


@dataclass
class Host:
    """The host as far as states describe it."""

    bridges: dict[str, NetworkPlan | None] = field(default_factory=dict)
    attachments: dict[str, Attachment | None] = field(default_factory=dict)
    isolated: set[str] = field(default_factory=set)
    ports: dict[HostPorts, Serve] = field(default_factory=dict)
    steered: dict[PortBlock, SteeringState] = field(default_factory=dict)
    redirects: dict[PortBlock, Target] = field(default_factory=dict)
    mappings: dict[str, MappingPlan] = field(default_factory=dict)
    neighbours: frozenset[Neighbours] = frozenset()
    plan: Plan | None = None
    forwarding: frozenset[int] = frozenset()
    properties: set[Property] = field(default_factory=set)

    @classmethod
    def of(cls, state: State) -> "Host":
        """Return a host that is in a state."""
        host = cls(dict(state.bridges), dict(state.attachments), set(state.isolated), dict(state.ports))
        host.steered, host.redirects, host.mappings = dict(state.steered), dict(state.redirects), dict(state.mappings)
        host.neighbours = state.neighbours
        host.plan, host.forwarding, host.properties = state.plan, state.forwarding, set(state.properties)
        return host

    def do(self, step: Step) -> None:
        """Carry out a step.  AssertionError, KeyError: it contradicts the present state."""
        match step:
            case Rewrite(before, after):
                assert self.plan is before
                self.plan = after
            case Rules(removed, added):
                for planned in removed:
                    del self.mappings[str(planned.mapping)]
                self.mappings |= {str(planned.mapping): planned for planned in added}
            case Further(removed, added):
                assert self.neighbours >= removed
                assert not self.neighbours & added
                self.neighbours = self.neighbours - removed | added
            case Forwarding(before, after):
                assert self.forwarding == before
                self.forwarding = after
            case Ports() | Steered() | Redirects():
                self._change_ports(step)
            case Bridge() | Veth() | Isolation():
                self._change_link(step)
            case Properties(_, missing):
                assert {one.link for one in missing} <= self.bridges.keys() | self.attachments.keys()
                self.properties |= set(missing)
            case _:
                assert isinstance(step, Flows)

    def _change_ports(self, step: Step) -> None:
        assert not (step.before and step.after)
        match step:
            case Ports(removed, added):
                for one in removed:
                    self._remove(one)
                for one in added:
                    self._serve(one)
            case Steered(removed, added):
                assert all(self.steered.pop(block) is state for block, state in removed)
                self.steered |= dict(added)
            case Redirects(removed, added):
                assert all(self.redirects.pop(block) == target for block, target in removed)
                assert not dict(added).keys() & self.redirects.keys(), "the former entry must be removed first"
                self.redirects |= dict(added)

    def _serve(self, port: Serve) -> None:
        """Serve ports; those without sockets are reserved, unless they are already."""
        assert not any(_overlap(port.ports, other) for other in self.ports), "a port is in use"
        self.ports[port.ports] = port
        for block in _steered_blocks(port):
            if self.steered.get(block) is not SteeringState.SERVED:
                self.steered[block] = SteeringState.RESERVED

    def _remove(self, port: Serve) -> None:
        """Remove ports; those that are only reserved become free."""
        assert self.ports.pop(port.ports) == port
        for block in _steered_blocks(port):
            if self.steered.get(block) is SteeringState.RESERVED:
                del self.steered[block]

    def _change_link(self, step: Step) -> None:
        name = step.name
        match step:
            case Bridge(_, NetworkPlan() as made):
                assert name not in self.bridges
                self.bridges[name] = made
                self.properties |= properties_of(made)
            case Bridge():
                assert not [veth for veth in self.attachments if VETHS[veth] == name], "the bridge has ports"
                del self.bridges[name]
                self.properties = {one for one in self.properties if one.link != name}
            case Veth(_, Attachment() as made):
                self.attachments[name] = made
                self._isolate(name, made.isolated)
                self.properties |= properties_of(made)
            case Veth():
                del self.attachments[name]
                self.isolated.discard(name)
                self.properties = {one for one in self.properties if one.link != name}
            case Isolation(before, after):
                attachment = self.attachments[name]
                assert before == (name in self.isolated)
                self.attachments[name] = attachment and attachment._replace(isolated=after)
                self._isolate(name, after)

    def _isolate(self, name: str, isolated: bool) -> None:
        (self.isolated.add if isolated else self.isolated.discard)(name)


def properties_of(made: NetworkPlan | Attachment) -> frozenset[Property]:
    """Return the properties of a link that was just created."""
    if isinstance(made, NetworkPlan):
        return of_bridge(made.network)
    return of_veth(made.endpoint.container, made.namespace, made.endpoint, made.network)


def verb(step: Step) -> str:
    """Return the kind of a step, with + or - if it adds or removes links, ports or entries."""
    changes = isinstance(step, Rewrite | Rules | Forwarding | Flows | Isolation | Properties)
    return ("" if changes else "+" if step.after else "-") + type(step).__name__


def _overlap(one: HostPorts, other: HostPorts) -> bool:
    return one[:2] == other[:2] and one.first <= other.last and other.first <= one.last


def _steered_blocks(port: Serve) -> list[PortBlock]:
    return [*blocks(*port.ports)] if port.mode is Mode.SHARED else []


@st.composite
def states(draw: st.DrawFn, of_mappings: bool, found: bool = False) -> State:
    """Draw a state that a daemon may want: the rules of mappings change one by one, or all by a plan.

    A state that was `found` may also have isolated veths, links without properties, and blocks that are only reserved.
    """
    bridges = draw(st.sets(st.sampled_from(sorted(BRIDGES))))
    veths = draw(st.sets(st.sampled_from([name for name, bridge in VETHS.items() if bridge in bridges] or [""]))) - {""}
    isolated = {name for name in sorted(veths) if found and draw(st.booleans())}
    names = draw(st.sets(st.sampled_from(sorted(PLANNED)))) if of_mappings else set()
    redirected = sorted(draw(st.sets(st.sampled_from(sorted(HERE)))))
    kinds = [draw(st.sampled_from((*same, None))) for same in zip(STEERED, ELSEWHERE, BY_SOCKETS, HELD, strict=True)]
    served = [one for one in kinds if one is not None]
    own_ports = draw(st.dictionaries(st.sampled_from(PORTS), st.sampled_from(DESTINATIONS)))
    left_over = draw(st.dictionaries(st.sampled_from(LEFT_OVER), st.sampled_from(_LEFT_OVER_STATES[: 1 + found])))
    links: list[NetworkPlan | Attachment] = [
        *(BRIDGES[name] for name in sorted(bridges)),
        *(attachment(name) for name in sorted(veths)),
    ]
    properties = sorted(one for made in links for one in properties_of(made))
    lost = draw(st.sets(st.sampled_from(properties))) if found and properties else set()
    return State(
        {name: BRIDGES[name] for name in sorted(bridges)},
        {name: attachment(name, name in isolated) for name in sorted(veths)},
        frozenset(isolated),
        dict(pair for one in served for pair in ports_of(one)) | {at: own(at, to) for at, to in own_ports.items()},
        dict(pair for one in served for pair in steered_of(one)) | left_over,
        {block: draw(st.sampled_from((HERE, THERE)))[block] for block in redirected},
        {name: PLANNED[name] for name in sorted(names)},
        draw(st.frozensets(st.sampled_from(NEIGHBOURS))) if of_mappings else frozenset(),
        None if of_mappings else draw(st.sampled_from(PLANS)),
        draw(st.frozensets(st.sampled_from((4, 6)))),
        frozenset(properties) - lost,
    )
