"""A host that is only values, on which steps are carried out; and the states that it may be in."""

from dataclasses import dataclass, field
from ipaddress import ip_address

from hypothesis import strategies as st

from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock, blocks
from gangway.model import Endpoint, Protocol
from gangway.plan import MappingPlan, NetworkPlan, Plan
from gangway.reconcile.diff import (
    Attachment,
    Change,
    Entries,
    Flows,
    Forwarding,
    HostPorts,
    Ports,
    Rewrite,
    State,
    Step,
    Target,
    Verb,
    ports_of,
    redirects_of,
    steered_of,
)
from tests.unit.samples import BACK, NFTABLES, NO_STEERING, WEB, mapping, planned, whole

NETWORKS = {network.bridge: network for network in (WEB, BACK)}
BRIDGES = {bridge: NetworkPlan(network, False) for bridge, network in NETWORKS.items()}
ENDS = {f"end{number}": bridge for number, bridge in enumerate(("gw-web", "gw-web", "gw-back"))}
PORTS = [HostPorts("tcp", "0.0.0.0", port, port) for port in (80, 81, 82)]
TARGETS = [Target("172.30.0.2", port, False) for port in (80, 81)]
# Mappings whose ports the relay has by one socket for all; the same of another container; and where each takes its own.
STEERED, ELSEWHERE, BY_SOCKETS = (
    [planned(mapping("0.0.0.0", *ports), facts, of) for ports in (("443",), ("8000-8010", "80-90"), ("9000-9002",))]
    for facts, of in ((NFTABLES, WEB), (NFTABLES, BACK), (NO_STEERING, WEB))
)
PLANNED = {
    str(one): planned(one)
    for one in (mapping("0.0.0.0", "80"), mapping("::", "80"), mapping("0.0.0.0", "53", protocol=Protocol.UDP))
}
# What somebody has left behind.
LEFT = list(blocks("udp", "::", 5000, 5010))
# Of a range that leads here, or there: the same blocks, other targets.
HERE, THERE = (
    dict(redirects_of(planned(mapping("0.0.0.0", "8000-8010", container_ports))))
    for container_ports in ("80-90", "90-100")
)
PLANS = (
    None,
    whole(NFTABLES, networks=(WEB,)),
    whole(NFTABLES, networks=(BACK,)),
    whole(NFTABLES, networks=(WEB, BACK)),
)


def attachment(name: str, isolated: bool = False) -> Attachment:
    endpoint = Endpoint(name, NETWORKS[ENDS[name]].name, (ip_address("172.30.0.2"),))
    return Attachment(endpoint, NETWORKS[ENDS[name]], f"/run/netns/{name}", isolated)


@dataclass
class Host:
    """What the steps are about, and nothing else."""

    bridges: dict[str, NetworkPlan | None] = field(default_factory=dict)
    attachments: dict[str, Attachment | None] = field(default_factory=dict)
    isolated: set[str] = field(default_factory=set)
    ports: dict[HostPorts, Target] = field(default_factory=dict)
    steered: dict[PortBlock, bool] = field(default_factory=dict)
    redirects: dict[PortBlock, keys.Target] = field(default_factory=dict)
    mappings: dict[str, MappingPlan] = field(default_factory=dict)
    plan: Plan | None = None
    forwarding: frozenset[int] = frozenset()

    @classmethod
    def of(cls, state: State) -> "Host":
        """As it is in a state."""
        host = cls(dict(state.bridges), dict(state.attachments), set(state.isolated), dict(state.ports))
        host.steered, host.redirects, host.mappings = dict(state.steered), dict(state.redirects), dict(state.mappings)
        host.plan, host.forwarding = state.plan, state.forwarding
        return host

    def do(self, step: Step) -> None:
        """Carries a step out; one that makes no sense here fails."""
        match step.verb, step.what:
            case Verb.KEEP, Ports(of):
                for ports, target in of:
                    self._keep(ports, target)
            case Verb.DROP, Ports(of):
                for ports, target in of:
                    self._drop(ports, target)
            case _, Entries(of):
                self._enter(step.verb, of)
            case Verb.REWRITE, Rewrite(before, after):
                assert self.plan is before
                self.plan = after
            case Verb.CHANGE, Change(withdrawn, published):
                for one in withdrawn:
                    del self.mappings[str(one.mapping)]
                self.mappings |= {str(one.mapping): one for one in published}
            case Verb.FORWARD, Forwarding(before, after):
                assert self.forwarding == before
                self.forwarding = after
            case Verb.FORGET, Flows():
                pass
            case _:
                self._link(step)

    def _enter(self, verb: Verb, of: tuple[tuple[PortBlock, keys.Target | bool], ...]) -> None:
        match verb:
            case Verb.STEER:
                self.steered |= {block: bool(value) for block, value in of}
            case Verb.UNSTEER:
                assert all(self.steered.pop(block) == value for block, value in of)
            case Verb.ENTER:
                assert not dict(of).keys() & self.redirects.keys(), "it has to be erased before"
                self.redirects |= {block: value for block, value in of if isinstance(value, keys.Target)}
            case Verb.ERASE:
                assert all(self.redirects.pop(block) == value for block, value in of)
            case _:
                raise AssertionError(verb)

    def _keep(self, ports: HostPorts, target: Target) -> None:
        """Those without sockets are taken meanwhile, unless they are."""
        assert not any(_overlap(ports, other) for other in self.ports), "somebody has one"
        self.ports[ports] = target
        wanted = [*blocks(*ports)] if target.is_steered else []
        if not all(block in self.steered for block in wanted):
            self.steered |= dict.fromkeys(wanted, False)

    def _drop(self, ports: HostPorts, target: Target) -> None:
        """Those that are only taken are anybody's then."""
        assert self.ports.pop(ports) == target
        for block in blocks(*ports) if target.is_steered else ():
            if self.steered.get(block) is False:
                del self.steered[block]

    def _link(self, step: Step) -> None:
        name = step.name
        match step.verb, step.what:
            case Verb.MAKE_BRIDGE, NetworkPlan() as made:
                assert name not in self.bridges
                self.bridges[name] = made
            case Verb.DELETE_BRIDGE, _:
                assert not [end for end in self.attachments if ENDS[end] == name], "somebody is attached"
                del self.bridges[name]
            case ((Verb.ATTACH | Verb.ISOLATE), Attachment() as made):
                assert step.verb is Verb.ATTACH or name in self.attachments
                self.attachments[name] = made
                (self.isolated.add if made.isolated else self.isolated.discard)(name)
            case Verb.DETACH, _:
                del self.attachments[name]
                self.isolated.discard(name)
            case _:
                raise AssertionError(step)


def _overlap(one: HostPorts, other: HostPorts) -> bool:
    return one[:2] == other[:2] and one.first <= other.last and other.first <= one.last


@st.composite
def states(draw: st.DrawFn, of_mappings: bool, found: bool = False) -> State:
    """What a daemon may want: rules of mappings change by themselves, or all rules by a plan.  What it may have `found`
    is more: ends that are isolated, and ports that are only taken."""
    bridges = draw(st.sets(st.sampled_from(sorted(BRIDGES))))
    ends = draw(st.sets(st.sampled_from([name for name, bridge in ENDS.items() if bridge in bridges] or ["-"]))) - {"-"}
    isolated = {name for name in sorted(ends) if found and draw(st.booleans())}
    names = draw(st.sets(st.sampled_from(sorted(PLANNED)))) if of_mappings else set()
    redirected = sorted(draw(st.sets(st.sampled_from(sorted(HERE)))))
    kinds = [draw(st.sampled_from((*same, None))) for same in zip(STEERED, ELSEWHERE, BY_SOCKETS, strict=True)]
    kept = [one for one in kinds if one is not None]
    ports = dict(pair for one in kept for pair in ports_of(one))
    steered = dict(pair for one in kept for pair in steered_of(one))
    return State(
        {name: BRIDGES[name] for name in sorted(bridges)},
        {name: attachment(name, name in isolated) for name in sorted(ends)},
        frozenset(isolated),
        ports | draw(st.dictionaries(st.sampled_from(PORTS), st.sampled_from(TARGETS))),
        steered | draw(st.dictionaries(st.sampled_from(LEFT), st.sampled_from((True, False)[: 1 + found]))),
        {block: draw(st.sampled_from((HERE, THERE)))[block] for block in redirected},
        {name: PLANNED[name] for name in sorted(names)},
        None if of_mappings else draw(st.sampled_from(PLANS)),
        draw(st.frozensets(st.sampled_from((4, 6)))),
    )
