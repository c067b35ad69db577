"""A Plan as iptables rules: text for iptables-restore(8) and ip6tables-restore(8).

What this file knows: the layout of Docker's rules, and the spelling of iptables-save(8).  A rule is rendered exactly as
it will be listed, so rules can be compared with a listing.  What it must not know: why a road was chosen, how the text
gets into the kernel.

The layout is Docker's from the beginning, in chains that all have one name, the prefix.  In `nat`, PREROUTING and
OUTPUT send packets for a local address to that chain, which has a rule for each mapping; POSTROUTING masquerades.  In
`filter`, FORWARD jumps to the chain, which accepts packets for a container's published port; FORWARD also accepts
established connections, what leaves a bridge, and what stays within one.  `mangle` and `raw` have what Docker's layout
lacks: networks are isolated, a container or the host's loopback address can only be reached by a published port,
invalid segments are dropped, and the size of segments is limited to what the routes carry (nft/render.py says why).
For SCTP `mangle` has two more rules for each mapping, in both families: nft/render.py says why.

With the prefix DOCKER the rules are Docker's to the letter: connections from a container's own bridge are not
translated but left to the relay, a container that connects to itself is masqueraded by a rule for each port, and what
the host sends from a loopback address to another one of its own is translated and lost.  With any other prefix rules
translate the former, too, one rule for each network masquerades them, and the relay serves the latter;
a container's segment of a connection that conntrack has forgotten gets a reset, because a masqueraded one would come
from another port.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import ip_network
from typing import NamedTuple

from gangway.inet import format_host
from gangway.model import Address, Network, Protocol, Subnet
from gangway.plan import MappingPlan, Origin, Plan, Road, Route
from gangway.reasons import Code

TABLES = ("raw", "mangle", "nat", "filter")  # that have rules, in the order in which they are written
DEFAULT_PREFIX = "GANGWAY"
DOCKERS_PREFIX = "DOCKER"
"""The prefix that selects Docker's layout to the letter."""

Listing = Mapping[str, Counter[str]]
"""The rules of each table, and how often each is listed; each chain is listed as the rule `:NAME`."""

_LOOPBACK = {4: "127.0.0.0/8", 6: "::1/128"}
_NEITHER_ESTABLISHED_NOR_PUBLISHED = "-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT"
_SYN = "-p tcp -m tcp --tcp-flags SYN,RST SYN"
_MIDSTREAM = "! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW"
_INVALID = "-m conntrack --ctstate INVALID"
_HOST = " -m addrtype --src-type LOCAL"


class Table(NamedTuple):
    """The rules in one table.  `rules` are `-A CHAIN …`; each CHAIN is either `chain` or a built-in one."""

    name: str
    chain: str
    rules: tuple[str, ...]

    @property
    def has_chain(self) -> bool:
        """True if a rule is in our own chain, or jumps to it."""
        return any(f" {self.chain} " in f"{rule} " for rule in self.rules)

    @property
    def built_in(self) -> tuple[str, ...]:
        """Return the rules in built-in chains, in order."""
        return tuple(rule for rule in self.rules if chain_of(rule) != self.chain)

    @property
    def own(self) -> tuple[str, ...]:
        """Return the rules in our own chain, in order."""
        return tuple(rule for rule in self.rules if chain_of(rule) == self.chain)


def render(plan: Plan, family: int, prefix: str) -> tuple[Table, ...]:
    """Return all rules of a family."""
    of_mappings = [rules_of(planned, family, prefix) for planned in plan.mappings]

    def table(name: str, rules: Iterable[str]) -> Table:
        return Table(name, prefix, (*rules, *(rule for found in of_mappings for rule in found.get(name, ()))))

    return (
        table("raw", [f"-A PREROUTING -d {_LOOPBACK[family]} ! -i lo -j DROP"]),
        table("mangle", (*_isolation(plan, prefix), *_excluded(plan, family, prefix))),
        table("nat", _nat(plan, family, prefix)),
        table("filter", _filter(plan, family, prefix)),
    )


def rules_of(planned: MappingPlan, family: int, prefix: str) -> dict[str, list[str]]:
    """Return a mapping's rules in a family, by table."""
    if not planned.is_nat:
        return {}
    rules = _translation(planned, prefix) if planned.family == family else {}
    if planned.mapping.protocol is Protocol.TCP and planned.family == family:
        rules["mangle"] = [f"-A {prefix}{_requested(planned)} -j DROP"]
    if planned.mapping.protocol is Protocol.SCTP:
        rules["mangle"] = [*_associations(planned)]
    return rules


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
    rules = {"nat": nat, "filter": [f"-A {prefix} -d {container}{elsewhere} -o {bridge} {inner} -j ACCEPT"]}
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


def _requested(planned: MappingPlan, elsewhere: str = "") -> str:
    """Match the host's address and ports of a mapping."""
    mapping = planned.mapping
    at = "" if mapping.host_address.is_unspecified else f" -d {ip_network(mapping.host_address)}"
    return f"{at}{elsewhere} -p {mapping.protocol} -m {mapping.protocol} --dport {_ports(mapping.host_ports)}"


def matching_rules(planned: MappingPlan, route: Route, network: Network, prefix: str) -> Iterator[str]:
    """Yield the rules that match the first packet of a client on `route`, each as `TABLE: RULE`."""
    if route.road is not Road.NAT:
        return
    rules = _translation(planned, prefix)
    yield f"nat: {_to_output(planned.family, prefix) if route.origin is Origin.HOST else _to_prerouting(prefix)}"
    own, *others = (rule for rule in rules["nat"] if _is_in(rule, prefix))
    is_by_client = bool(planned.mapping.admitted) and route.origin is not Origin.HOST
    yield from (f"nat: {rule}" for rule in (others if is_by_client else [own]))
    if route.origin is not Origin.HOST:
        yield f"filter: -A FORWARD -o {planned.bridge} -j {prefix}"
        yield f"filter: {rules['filter'][0]}"
    if route.neighbour:
        subnet = next(subnet for subnet in network.subnets if planned.container_address in subnet)
        yield f"nat: {_hairpin(subnet, planned.bridge)}"
    elif route.reason.code is Code.ANSWERS_ELSEWHERE:
        yield f"nat: {_to_gateway(planned.container_address, planned.bridge)}"


def batch(wanted: Collection[Table], applied: Collection[Table], listed: Listing) -> str:
    """Return the text for iptables-restore --noflush that replaces the rules `applied` by those `wanted`.

    `listed` are the rules that the kernel has, ours and other programs'.  With nothing wanted, all that was applied is
    removed.  Several tables of one name count as one.
    """
    text = []
    for name in dict.fromkeys(table.name for table in (*applied, *wanted)):
        old, new = _joined(name, applied), _joined(name, wanted)
        rules = listed.get(name, Counter())
        text.append(f"*{name}")
        if new.has_chain:
            text.append(f":{new.chain} - [0:0]")
        moved = [*_out_of_place(old.built_in, new.built_in, rules)]
        # A rule may be listed twice: for two mappings to the same port of a container.
        ours = dict.fromkeys(rule for rule in (*old.built_in, *new.built_in) if chain_of(rule) in moved)
        text += [_deletion(rule) for rule in ours for _ in range(rules[rule])]
        text += [*_insertions(name, (rule for rule in new.built_in if chain_of(rule) in moved)), *new.own]
        if new.chain != old.chain and f":{old.chain}" in rules:
            text += [f"-F {old.chain}", f"-X {old.chain}"]
        text.append("COMMIT")
    return "\n".join(text) + "\n"


def change(removed: Iterable[MappingPlan], added: Iterable[MappingPlan], family: int, prefix: str) -> str:
    """Return the text that removes mappings and adds others; empty if none has a rule in the family."""
    lines: dict[str, list[str]] = {}
    for plans, spell in ((removed, _deletion), (added, str)):
        for planned in plans:
            for table, rules in rules_of(planned, family, prefix).items():
                lines.setdefault(table, []).extend(spell(rule) for rule in rules)
    return "".join(f"*{table}\n" + "\n".join(rules) + "\nCOMMIT\n" for table, rules in lines.items())


def built_in(tables: Iterable[Table]) -> tuple[Table, ...]:
    """Return the tables with only their rules in built-in chains."""
    return tuple(table._replace(rules=table.built_in) for table in tables)


def with_mappings(
    tables: Iterable[Table], removed: Iterable[MappingPlan], added: Iterable[MappingPlan], family: int
) -> tuple[Table, ...]:
    """Return what `built_in` returns, after a change of mappings."""

    def rules(plans: Iterable[MappingPlan], table: Table) -> tuple[str, ...]:
        found = (rule for planned in plans for rule in rules_of(planned, family, table.chain).get(table.name, ()))
        return table._replace(rules=tuple(found)).built_in

    def changed(table: Table) -> Table:
        left = list(table.rules)
        for rule in rules(removed, table):
            if rule in left:
                left.remove(rule)
        return table._replace(rules=(*left, *rules(added, table)))

    return tuple(map(changed, tables))


def listed_rules(tables: Collection[Table], listed: Listing) -> tuple[Table, ...]:
    """Return what is listed of some tables: every rule in our own chains, and the other rules that the tables have."""
    found = []
    for name in dict.fromkeys(table.name for table in tables):
        table = _joined(name, tables)
        known = set(table.built_in)
        rules = Counter(
            {rule: n for rule, n in listed.get(name, {}).items() if rule in known or _is_in(rule, table.chain)}
        )
        if rules:
            found.append(Table(name, table.chain, tuple(rules.elements())))
    return tuple(found)


def are_listed(tables: Collection[Table], former: Collection[Table], listed: Listing) -> bool:
    """True if the rules of some tables are listed, as often as they should be, and none of former ones besides."""
    found = {table.name: Counter(table.rules) for table in listed_rules((*former, *tables), listed)}
    names = {table.name for table in tables}
    return found == {name: rules for name in names if (rules := Counter(_joined(name, tables).rules))}


def parse_listing(text: str) -> dict[str, Counter[str]]:
    """Parse the output of iptables-save(8)."""
    found: dict[str, Counter[str]] = {}
    rules: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("*"):
            rules = found.setdefault(line[1:], Counter())
        elif line.startswith(("-A ", ":")):
            rules[line if line.startswith("-") else line.split()[0]] += 1
    return found


def chain_of(rule: str) -> str:
    """Return CHAIN of a rule `-A CHAIN …`."""
    return rule.split(" ", 2)[1]


def _is_in(rule: str, chain: str) -> bool:
    return rule.startswith(f"-A {chain} ")


def _joined(name: str, tables: Collection[Table]) -> Table:
    found = [table for table in tables if table.name == name]
    chain = found[-1].chain if found else ""
    return Table(name, chain, tuple(rule for table in found for rule in table.rules))


def _nat(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    if family in plan.routed:
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
    if prefix != DOCKERS_PREFIX:
        for network, subnet in subnets:
            yield _hairpin(subnet, network.bridge)
            yield f"-A POSTROUTING -o {network.bridge} -m conntrack --ctstate DNAT -j ACCEPT"
    for network, subnet in subnets:
        if network.masquerades(subnet):
            yield f"-A POSTROUTING -s {subnet} ! -o {network.bridge} -j MASQUERADE"


def _filter(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    for network in (planned.network for planned in plan.networks):
        bridge = network.bridge
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


def _isolation(plan: Plan, prefix: str) -> Iterator[str]:
    yield f"-A FORWARD {_NEITHER_ESTABLISHED_NOR_PUBLISHED} -j {prefix}"
    yield f"-A INPUT -p tcp {_INVALID} -j {prefix}"
    for way in ("-i", "-o"):
        for network in (planned.network for planned in plan.networks):
            yield f"-A FORWARD {way} {network.bridge} {_SYN} -j TCPMSS --clamp-mss-to-pmtu"
    for network in (planned.network for planned in plan.networks):
        bridge = network.bridge
        yield f"-A {prefix} ! -i {bridge} -o {bridge} -j DROP"
        yield f"-A {prefix} -i {bridge} ! -o {bridge}{'' if network.internal else f' {_INVALID}'} -j DROP"
        if not network.icc:
            yield f"-A {prefix} -i {bridge} -o {bridge} -j DROP"
    # What follows, a rule for each mapping, is for invalid segments to the host itself.
    yield f"-A {prefix} -m conntrack ! --ctstate INVALID -j RETURN"
    yield f"-A {prefix} -m addrtype ! --dst-type LOCAL -j RETURN"


def _excluded(plan: Plan, family: int, prefix: str) -> Iterator[str]:
    """Leave packets for excluded addresses to other programs."""
    for address in plan.facts.excluded_in(family):
        yield f"-A {prefix} -d {ip_network(address)} -j RETURN"


def _hairpin(subnet: Subnet, bridge: str) -> str:
    """Masquerade a neighbour: the container would answer it directly, from an address that it did not connect to."""
    return f"-A POSTROUTING -s {subnet} -o {bridge} -m conntrack --ctstate DNAT -j MASQUERADE"


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


def _deletion(rule: str) -> str:
    return f"-D{rule[2:]}"


def _out_of_place(old: Collection[str], new: Collection[str], listed: Counter[str]) -> Iterator[str]:
    """Yield the built-in chains where our rules have to be written anew: others keep their place in the chain."""
    ours = {*old, *new}
    for chain in dict.fromkeys(map(chain_of, (*old, *new))):
        found = [rule for rule in listed.elements() if rule in ours and chain_of(rule) == chain]
        if found != [rule for rule in new if chain_of(rule) == chain]:
            yield chain


def _insertions(table: str, rules: Iterable[str]) -> Iterator[str]:
    """Insert rules at the head of each chain, in order, before other programs' rules.

    What translates destinations is appended: other programs' translations are for an address and a port.
    """
    places: Counter[str] = Counter()
    for rule in rules:
        chain = chain_of(rule)
        places[chain] += 1
        is_last = table == "nat" and chain in ("PREROUTING", "OUTPUT")
        yield rule if is_last else f"-I {chain} {places[chain]}{rule[len('-A ') + len(chain) :]}"
