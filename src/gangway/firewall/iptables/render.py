"""A Plan as iptables rules: text for iptables-restore(8) and ip6tables-restore(8).

What this file knows: the layout of Docker's rules, and the spelling of iptables-save(8).  A rule is rendered exactly as
it will be listed, so rules can be compared with a listing.  What it must not know: why a road was chosen, how the text
gets into the kernel.

The layout is Docker's from the beginning, in chains that all have one name, the prefix.  In `nat`, PREROUTING and
OUTPUT send packets for a local address to that chain, which has a rule for each mapping; POSTROUTING masquerades.  In
`filter`, FORWARD jumps to the chain, which accepts packets for a container's published port; FORWARD also accepts
established connections, what leaves a bridge, and what stays within one.  `mangle` and `raw` have what Docker's layout
lacks: networks are isolated, a container or the host's loopback address can only be reached by a published port,
invalid segments are dropped, the size of segments is limited to what the routes carry, and half-closed connections are
tracked for an hour (nft/render.py says why).
Where launchers have leases of a port that is not for everybody, `mangle` drops the other clients before the relay gets
them.  For SCTP `mangle` has two more rules for each mapping, in both families: nft/render.py says why.

With the prefix DOCKER the rules are Docker's to the letter: connections from a container's own bridge are not
translated but left to the relay, a container that connects to itself is masqueraded by a rule for each port, and what
the host sends from a loopback address to another one of its own is translated and lost.  With any other prefix rules
translate the former, too, one rule for each network masquerades them, and the relay serves the latter;
a container's segment of a connection that conntrack has forgotten gets a reset, because a masqueraded one would come
from another port.
"""

from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from gangway.firewall.iptables import routed
from gangway.firewall.iptables.tables import Table, chain_of
from gangway.inet import format_host
from gangway.model import Address, Network, Protocol, Subnet
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, Origin, Plan, Road, Route, is_link_local
from gangway.reasons import Code

DEFAULT_PREFIX = "GANGWAY"
DOCKERS_PREFIX = "DOCKER"
"""The prefix that selects Docker's layout to the letter."""
TIMEOUT_POLICIES = {4: "gw-4", 6: "gw-6"}
"""The name of each family's timeouts, which timeouts.py creates.  The kernel lists only four characters of a longer one
(net/netfilter/xt_CT.c, `usersize` of revision 1), and then no rule can be compared or deleted."""

_LOOPBACK = {4: "127.0.0.0/8", 6: "::1/128"}
_NEITHER_ESTABLISHED_NOR_PUBLISHED = "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT"
_SYN = "-p tcp -m tcp --tcp-flags SYN,RST SYN"
_FIRST = "--tcp-flags FIN,SYN,RST,ACK SYN"
_MIDSTREAM = f"! {_FIRST} -m conntrack --ctstate NEW"
_INVALID = "-m conntrack --ctstate INVALID"
_NEW = "-m conntrack --ctstate NEW"
_HOST = " -m addrtype --src-type LOCAL"
_TO_OTHERS = "-m addrtype ! --dst-type LOCAL"


def render(plan: Plan, family: int, prefix: str, timeouts: bool = False) -> tuple[Table, ...]:
    """Return all rules of a family; with `timeouts` half-closed connections get those of TIMEOUT_POLICIES."""
    found = {one.name: one.rules for one in of_mappings(plan.mappings, family, prefix, timeouts)}

    def table(name: str, rules: Iterable[str]) -> Table:
        return Table(name, prefix, (*rules, *found.get(name, ())))

    return (
        table("raw", _raw(plan, family, prefix, timeouts)),
        table("mangle", (*_isolation(plan, family, prefix), *_excluded(plan, family, prefix))),
        table("nat", _nat(plan, family, prefix)),
        table("filter", _filter(plan, family, prefix)),
    )


def of_mappings(plans: Iterable[MappingPlan], family: int, prefix: str, timeouts: bool = False) -> tuple[Table, ...]:
    """Return the rules of mappings in a family; `timeouts` as in `render`."""
    found: dict[str, list[str]] = {}
    for planned in plans:
        for table, rules in rules_of(planned, family, prefix, timeouts).items():
            found.setdefault(table, []).extend(rules)
    return tuple(Table(name, prefix, tuple(rules)) for name, rules in found.items())


def of_further(clients: Iterable[Neighbours], family: int, prefix: str) -> tuple[Table, ...]:
    """Return the rules for neighbours on further networks in a family: each has to be inserted first in its chain."""
    return (Table("nat", prefix, tuple(_further(clients, family))),)


def rules_of(planned: MappingPlan, family: int, prefix: str, timeouts: bool = False) -> dict[str, list[str]]:
    """Return a mapping's rules in a family, by table; with `timeouts` TIMEOUT_POLICIES, too."""
    if planned.is_opened and planned.family == family:
        return {"filter": [*_opening(planned, prefix)]}
    rules = _translation(planned, prefix) if planned.is_nat and planned.family == family else {}
    if drops := [*_drops(planned, family, prefix)]:
        rules["mangle"] = drops
    if timeouts and planned.is_nat and planned.mapping.protocol is Protocol.TCP and planned.family == family:
        rules["raw"] = [f"-A {prefix}{_requested(planned)} -j CT --timeout {TIMEOUT_POLICIES[family]}"]
    return rules


def _drops(planned: MappingPlan, family: int, prefix: str) -> Iterator[str]:
    if planned.is_nat and planned.mapping.protocol is Protocol.TCP and planned.family == family:
        yield f"-A {prefix}{_requested(planned)} {_INVALID} -j DROP"
    if _is_restricted(planned) and planned.family == family:
        yield from _refusal(planned, prefix)
    if planned.is_nat and planned.mapping.protocol is Protocol.SCTP:
        yield from _associations(planned)


def _is_restricted(planned: MappingPlan) -> bool:
    """True if clients that are not admitted, and so not translated, would get to a launcher's socket: it admits all."""
    mapping = planned.mapping
    return bool(planned.is_leased and mapping.admitted) and not is_link_local(mapping.host_address)


def _refusal(planned: MappingPlan, prefix: str) -> Iterator[str]:
    """Drop clients that are not admitted."""
    requested = _requested(planned)
    yield f"-A INPUT{_requested(planned, ' ! -i lo')} {_NEW} -j {prefix}"
    for subnet in (one for one in planned.mapping.admitted if one.version == planned.family):
        yield f"-A {prefix}{f' -s {subnet}' if subnet.prefixlen else ''}{requested} -j RETURN"
    yield f"-A {prefix}{requested} {_NEW} -j DROP"


def _translation(planned: MappingPlan, prefix: str) -> dict[str, list[str]]:
    mapping, bridge = planned.mapping, planned.bridge
    inner = f"-p {mapping.protocol} -m {mapping.protocol} --dport {_ports(mapping.container_ports)}"
    container = ip_network(planned.container_address)
    elsewhere = f" ! -i {bridge}" if prefix == DOCKERS_PREFIX else ""
    nat = [
        f"-A {prefix}{source}{_requested(planned, elsewhere)}{match} -j DNAT --to-destination {_target(planned)}"
        for source, match in _clients(planned)
    ]
    if prefix == DOCKERS_PREFIX:
        nat.append(f"-A POSTROUTING -s {container} -d {container} {inner} -j MASQUERADE")
    translated = routed.TRANSLATED if planned.is_direct else ""
    rules = {"nat": nat, "filter": [f"-A {prefix} -d {container}{elsewhere} -o {bridge} {inner}{translated} -j ACCEPT"]}
    is_kept = mapping.keeps_ports and mapping.host_address.is_unspecified  # masquerading keeps ports, if they are free
    if mapping.protocol is Protocol.TCP and prefix != DOCKERS_PREFIX and not is_kept:
        answer = f"-s {container} -i {bridge} -p tcp -m tcp --sport {_ports(mapping.container_ports)} {_MIDSTREAM}"
        rules["filter"].append(f"-A {prefix} {answer} -j REJECT --reject-with tcp-reset")
    return rules


def _clients(planned: MappingPlan) -> Iterator[tuple[str, str]]:
    """Yield what the clients of a mapping are matched by: options before the protocol's, and after them.

    The first is the host, if not everybody is admitted.
    """
    admitted = planned.mapping.admitted
    yield "", _HOST if admitted else ""
    for subnet in (one for one in admitted if one.version == planned.family):
        yield f" -s {subnet}" if subnet.prefixlen else "", ""


def _opening(planned: MappingPlan, prefix: str) -> Iterator[str]:
    """Accept what is for a port at the container's own address; nothing of the host's passes FORWARD."""
    mapping, container = planned.mapping, ip_network(planned.container_address)
    port = f"-p {mapping.protocol} -m {mapping.protocol} --dport {_ports(mapping.container_ports)}"
    for source, match in _clients(planned):
        if match != _HOST:
            yield f"-A {prefix}{source} -d {container} -o {planned.bridge} {port} -j ACCEPT"


def _requested(planned: MappingPlan, elsewhere: str = "") -> str:
    """Match the host's address and ports of a mapping."""
    mapping = planned.mapping
    at = "" if mapping.host_address.is_unspecified else f" -d {ip_network(mapping.host_address)}"
    return f"{at}{elsewhere} -p {mapping.protocol} -m {mapping.protocol} --dport {_ports(mapping.host_ports)}"


def matching_rules(
    planned: MappingPlan, route: Route, network: Network, prefix: str, further: Iterable[Neighbours] = ()
) -> Iterator[str]:
    """Yield the rules that match the first packet of a client on `route`, each as `TABLE: RULE`.

    `further` are the container's neighbours on further networks, who are among the containers of other networks.
    """
    if route.road is Road.RELAY and route.origin in (Origin.REMOTE, Origin.CONTAINER) and _is_restricted(planned):
        yield from (f"mangle: {rule}" for rule in _refusal(planned, prefix))
    if route.road is Road.ROUTED and route.origin is not Origin.HOST and not route.neighbour:
        yield f"filter: -A FORWARD -o {planned.bridge} -j {prefix}"
        yield from (f"filter: {rule}" for rule in _opening(planned, prefix) if planned.is_opened)
    if route.road is not Road.NAT:
        return
    rules = _translation(planned, prefix)
    yield f"nat: {_to_output(planned.family, prefix) if route.origin is Origin.HOST else _to_prerouting(prefix)}"
    own, *others = (rule for rule in rules["nat"] if chain_of(rule) == prefix)
    is_by_client = bool(planned.mapping.admitted) and route.origin is not Origin.HOST
    yield from (f"nat: {rule}" for rule in (others if is_by_client else [own]))
    if route.origin is not Origin.HOST:
        yield f"filter: -A FORWARD -o {planned.bridge} -j {prefix}"
        yield f"filter: {rules['filter'][0]}"
    if route.neighbour:
        subnet = next(subnet for subnet in network.subnets if planned.container_address in subnet)
        yield f"nat: {_hairpin(subnet, planned.bridge)}"
        return
    if route.origin is Origin.CONTAINER:
        yield from (f"nat: {rule}" for rule in _further(further, planned.family))
    if route.reason.code is Code.ANSWERS_ELSEWHERE:
        yield f"nat: {_to_gateway(planned.container_address, planned.bridge)}"


def _raw(plan: Plan, family: int, prefix: str, timeouts: bool) -> Iterator[str]:
    yield f"-A PREROUTING -d {_LOOPBACK[family]} ! -i lo -j DROP"
    if timeouts:
        # Only first packets pass the chain, which has a rule for each mapping.
        for chain, others in (("PREROUTING", ""), ("OUTPUT", f" ! -d {_LOOPBACK[family]}")):
            yield f"-A {chain}{others} -p tcp -m tcp {_FIRST} -m addrtype --dst-type LOCAL -j {prefix}"
        yield from _excluded(plan, family, prefix)


def _nat(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    if family in plan.translated:
        yield _to_prerouting(prefix)
    yield _to_output(family, prefix)
    for interface in plan.untranslated(family):
        yield f"-A {prefix} -i {interface} -j RETURN"
    # Packets of the host's own whose source would not get to a container.
    if prefix != DOCKERS_PREFIX:
        yield f"-A {prefix} -s {_LOOPBACK[family]} -j RETURN"
    for lost in plan.facts.lost_sources:
        if lost.address.version == family:
            yield f"-A {prefix} -s {ip_network(lost.address)} -j RETURN"
    if family == 6:
        # Clients of a link-local address have one themselves, and the kernel forwards nothing from these.
        yield f"-A {prefix} -d fe80::/10 -j RETURN"
    yield from _excluded(plan, family, prefix)
    networks = [planned.network for planned in plan.networks]
    subnets = [(network, subnet) for network in networks for subnet in network.subnets if subnet.version == family]
    for network, subnet in subnets:
        found = sorted(one for one in plan.facts.answers_elsewhere if one.version == family and one in subnet)
        yield from (_to_gateway(one, network.bridge) for one in found)
    yield from _further(plan.further, family)
    if prefix != DOCKERS_PREFIX:
        for network, subnet in subnets:
            yield _hairpin(subnet, network.bridge)
            translated = "" if network.opens(family) else routed.TRANSLATED
            yield f"-A POSTROUTING -o {network.bridge}{translated} -j ACCEPT"
    for network, subnet in subnets:
        if network.masquerades(subnet):
            yield f"-A POSTROUTING -s {subnet} ! -o {network.bridge} -j MASQUERADE"


def _filter(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    networks = [planned.network for planned in plan.networks]
    for network in networks:  # first of all: other networks' bridges may send anything to anywhere
        if network.opens(family):
            yield from routed.closing_rules(network, family, prefix)
    for network in networks:
        bridge = network.bridge
        if not network.opens(family):
            yield f"-A FORWARD -o {bridge} -j {prefix}"
        yield f"-A FORWARD -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        if prefix != DOCKERS_PREFIX:
            yield f"-A FORWARD -i {bridge} ! -o {bridge} -p tcp -m tcp {_MIDSTREAM} -j {prefix}"
        yield f"-A FORWARD -i {bridge} ! -o {bridge} -j ACCEPT"
        if network.icc:
            yield f"-A FORWARD -i {bridge} -o {bridge} -j ACCEPT"
    if family in plan.closed:
        # br_netfilter shows the frames within other programs' bridges here; gangway has nothing to do with them.
        for bridge in plan.facts.foreign_bridges:
            yield f"-A FORWARD -i {bridge} -o {bridge} -j ACCEPT"


def _isolation(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    yield f"-A FORWARD {_NEITHER_ESTABLISHED_NOR_PUBLISHED} -j {prefix}"
    yield f"-A INPUT -p tcp {_INVALID} -j {prefix}"
    for way in ("-i", "-o"):
        for network in (planned.network for planned in plan.networks):
            yield f"-A FORWARD {way} {network.bridge} {_SYN} -j TCPMSS --clamp-mss-to-pmtu"
    for network in (planned.network for planned in plan.networks):
        bridge = network.bridge
        if not network.opens(family):
            yield f"-A {prefix} ! -i {bridge} -o {bridge} -j DROP"
        yield f"-A {prefix} -i {bridge} ! -o {bridge} {_INVALID} -j DROP"
        if network.internal:  # INPUT sends new packets here, too, which may get to the host
            yield f"-A {prefix} -i {bridge} ! -o {bridge} {_TO_OTHERS} -j DROP"
        if not network.icc:
            yield f"-A {prefix} -i {bridge} -o {bridge} -j DROP"
    # What follows, some rules for each mapping, is for packets to the host itself.
    yield f"-A {prefix} {_TO_OTHERS} -j RETURN"


def _excluded(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    """Leave packets for excluded addresses to other programs."""
    for address in plan.facts.excluded_in(family):
        yield f"-A {prefix} -d {ip_network(address)} -j RETURN"


def _hairpin(subnet: Subnet, bridge: str) -> str:
    """Masquerade a neighbour: the container would answer it directly, from an address that it did not connect to."""
    return f"-A POSTROUTING -s {subnet} -o {bridge} -m conntrack --ctstate DNAT -j MASQUERADE"


def _further(clients: Iterable[Neighbours], family: int) -> Iterator[str]:
    """Masquerade neighbours on further networks of containers, for the same reason."""
    for one in sorted((one for one in clients if one.subnet.version == family), key=str):
        to = f"-d {ip_network(one.address)} -o {one.bridge}"
        yield f"-A POSTROUTING -s {one.subnet} {to} -m conntrack --ctstate DNAT -j MASQUERADE"


def _to_gateway(container: Address, bridge: str) -> str:
    """Masquerade clients of a container that would send its answers elsewhere: the gateway is on its own link."""
    return f"-A POSTROUTING -d {ip_network(container)} -o {bridge} -m conntrack --ctstate DNAT -j MASQUERADE"


def _associations(planned: MappingPlan) -> Iterator[str]:
    mapping = planned.mapping
    for ports, chunk, state in (
        (mapping.container_ports, "HEARTBEAT", "NEW"),
        (mapping.host_ports, "ABORT", "INVALID"),  # sent from the port that the client connected to
    ):
        sent = f"-i {planned.bridge} -p sctp -m sctp --sport {_ports(ports)} --chunk-types any {chunk}"
        yield f"-A INPUT {sent} -m conntrack --ctstate {state} -j DROP"


def _to_prerouting(prefix: str) -> str:
    return f"-A PREROUTING -m addrtype --dst-type LOCAL -j {prefix}"


def _to_output(family: int, prefix: str) -> str:
    return f"-A OUTPUT ! -d {_LOOPBACK[family]} -m addrtype --dst-type LOCAL -j {prefix}"


def _target(planned: MappingPlan) -> str:
    mapping, address = planned.mapping, planned.container_address
    is_range = mapping.host_ports.count > 1
    if is_range and mapping.keeps_ports:
        return str(address)
    shift = f"/{mapping.host_ports.first}" if is_range else ""
    return f"{format_host(address)}:{mapping.container_ports}{shift}"


def _ports(ports: object) -> str:
    return str(ports).replace("-", ":")
