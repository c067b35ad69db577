"""A host that is only values, on which steps are carried out; and the states that it may be in."""

from dataclasses import dataclass, field
from ipaddress import ip_address

from hypothesis import strategies as st

from gangway.daemon.reconcile import (
    Attachment,
    Change,
    Entries,
    Flows,
    Forwarding,
    HostPort,
    Ports,
    Rewrite,
    State,
    Step,
    Target,
    Verb,
    redirects_of,
)
from gangway.model import Endpoint, Protocol
from gangway.plan import MappingPlan, NetworkPlan, Plan
from tests.unit.samples import BACK, NFTABLES, WEB, mapping, planned, whole

NETWORKS = {network.bridge: network for network in (WEB, BACK)}
BRIDGES = {bridge: NetworkPlan(network, False) for bridge, network in NETWORKS.items()}
ENDS = {f"end{number}": bridge for number, bridge in enumerate(("gw-web", "gw-web", "gw-back"))}
PORTS = [HostPort("tcp", "0.0.0.0", port) for port in (80, 81, 82)]
TARGETS = [Target("172.30.0.2", port) for port in (80, 81)]
PLANNED = {
    str(one): planned(one)
    for one in (mapping("0.0.0.0", "80"), mapping("::", "80"), mapping("0.0.0.0", "53", protocol=Protocol.UDP))
}
# Of a range that leads here, or there: the same keys, other values.
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
    ports: dict[HostPort, Target] = field(default_factory=dict)
    redirects: dict[bytes, bytes] = field(default_factory=dict)
    mappings: dict[str, MappingPlan] = field(default_factory=dict)
    plan: Plan | None = None
    forwarding: frozenset[int] = frozenset()

    @classmethod
    def of(cls, state: State) -> "Host":
        """As it is in a state."""
        host = cls(dict(state.bridges), dict(state.attachments), set(state.isolated), dict(state.ports))
        host.redirects, host.mappings = dict(state.redirects), dict(state.mappings)
        host.plan, host.forwarding = state.plan, state.forwarding
        return host

    def do(self, step: Step) -> None:
        """Carries a step out; one that makes no sense here fails."""
        match step.verb, step.what:
            case Verb.KEEP, Ports(of):
                assert not dict(of).keys() & self.ports.keys()
                self.ports |= dict(of)
            case Verb.DROP, Ports(of):
                assert all(self.ports.pop(port) == target for port, target in of)
            case Verb.ENTER, Entries(of):
                assert not dict(of).keys() & self.redirects.keys(), "it has to be erased before"
                self.redirects |= dict(of)
            case Verb.ERASE, Entries(of):
                assert all(self.redirects.pop(key) == value for key, value in of)
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


@st.composite
def states(draw: st.DrawFn, of_mappings: bool, isolation: bool = False) -> State:
    """What a daemon may find or want: rules of mappings change by themselves, or all rules by a plan."""
    bridges = draw(st.sets(st.sampled_from(sorted(BRIDGES))))
    ends = draw(st.sets(st.sampled_from([name for name, bridge in ENDS.items() if bridge in bridges] or ["-"]))) - {"-"}
    isolated = {name for name in sorted(ends) if isolation and draw(st.booleans())}
    names = draw(st.sets(st.sampled_from(sorted(PLANNED)))) if of_mappings else set()
    keys = sorted(draw(st.sets(st.sampled_from(sorted(HERE)))))
    return State(
        {name: BRIDGES[name] for name in sorted(bridges)},
        {name: attachment(name, name in isolated) for name in sorted(ends)},
        frozenset(isolated),
        draw(st.dictionaries(st.sampled_from(PORTS), st.sampled_from(TARGETS))),
        {key: draw(st.sampled_from((HERE, THERE)))[key] for key in keys},
        {name: PLANNED[name] for name in sorted(names)},
        None if of_mappings else draw(st.sampled_from(PLANS)),
        draw(st.frozensets(st.sampled_from((4, 6)))),
    )
