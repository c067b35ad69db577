"""A Plan as nftables rules: text for nft(8).

What this file knows: nft's language, and what a packet's way costs.  What it must not know: why a road was chosen, how
text gets into the kernel.

How it works.  All of it is one table, `inet gangway`.  Its rules depend on the networks and on what families are
forwarded, and on nothing else: mappings are elements of its maps, so a packet meets the same few rules however many
there are, and one more mapping is one more element.  Only a connection's first packet sees the chains of type nat; all
others of a connection see `forward`, whose first rule lets them pass: each look-up that a packet is spared shows in the
number of packets.

A family has three maps, as each kind of mapping has its cheapest form:

    ports      protocol . port → container . port           a host address of 0.0.0.0 or ::, one port or ports moved
    addresses  protocol . address . port → the same         one host address
    ranges     protocol . address . ports → container       a range whose ports stay what they are: one element

The first two are hashes.  The third holds intervals in several dimensions, and for these the kernel makes a copy of
the whole set for every change (net/netfilter/nft_set_pipapo.c, commit): right for few long ranges, wrong for many
ports.  `th dport` asks for a transport protocol that nft knows to have ports, hence the first rule of `published`.

`input` guards the host's loopback addresses: nobody gets there from outside while route_localnet is off, but it may be
on by somebody else's wish.  It looks at the address that was asked: who translates to 127.0.0.1 means it.

`associations` keeps those of SCTP alive that are translated.  The two ends of one know all of each other's addresses,
and try every pair of them by a HEARTBEAT (RFC 9260, 5.4), but only the pair that the client asked by is translated.
Between any other pair the receiver knows of no association and answers by an ABORT (8.4), which the sender takes for
the end of the one that it has (8.5.1; kernel 6.1: after 1 to 5 s).  So what a container tries towards the host gets no
answer; and a container's ABORT that answers nothing but a HEARTBEAT, for which conntrack has no place, is not heard.

A verdict is final only when it is `drop`: other programs' chains see what is accepted here, and may still drop it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from gangway.model import Network, Subnet
from gangway.plan import MappingPlan, Origin, Plan, Road, Route

TABLE = "inet gangway"
MOST_ELEMENTS = 4000
"""In one transaction: libnftables takes some 2 KB for each while it works."""
_BETWEEN = ", "
_OPPOSITES = {"add": "delete", "delete": "add"}

Elements = dict[str, list[str]]
"""The elements of each set or map, by its name."""

_MAPS = """\
	map ports{f} {{ type inet_proto . inet_service : ipv{f}_addr . inet_service; }}
	map addresses{f} {{ type inet_proto . ipv{f}_addr . inet_service : ipv{f}_addr . inet_service; }}
	map ranges{f} {{ type inet_proto . ipv{f}_addr . inet_service : ipv{f}_addr; flags interval; }}
	set masqueraded{f} {{ type ipv{f}_addr; flags interval; }}
	set untranslated{f} {{ type ifname; }}
"""
_SETS = """\
	set bridges { type ifname; }
	set internal { type ifname; }
	set together { type ifname . ifname; }
	map to { type ifname : verdict; }
"""
_WORD = {4: "ip", 6: "ip6"}
# What is never translated: the kernel routes no loopback address and forwards nothing from a link-local one.
_KEPT = {4: "127.0.0.0/8", 6: "{ ::1, fe80::/10 }"}
_EVERY = {4: "0.0.0.0/0", 6: "::/0"}

_LEAVING = "oifname vmap @to"
_TRANSLATED = "oifname @bridges ct status dnat accept"
# The type of the first chunk, read at its offset: nft's `sctp chunk` needs Linux 5.14.
_HEARTBEAT, _ABORT = "@th,96,8 4", "@th,96,8 6"


def render(plan: Plan) -> str:
    """The whole table, in place of whatever it was before, in one transaction."""
    lines = [f"table {TABLE}", f"delete table {TABLE}", f"table {TABLE} {{"]
    lines += [_MAPS.format(f=family) for family in (4, 6)]
    lines.append(_SETS)
    for name, (head, rules) in chains(plan).items():
        lines.append(f"\tchain {name} {{")
        lines += [f"\t\t{line}" for line in (head, *rules) if line]
        lines.append("\t}")
    lines.append("}")
    return "\n".join(lines) + "\n" + "".join(_statements("add", _join(_networks(plan), _mappings(plan.mappings))))


def element_counts(plan: Plan) -> dict[str, int]:
    """How many elements each set or map has."""
    return {name: len(found) for name, found in _join(_networks(plan), _mappings(plan.mappings)).items()}


def change(withdrawn: Iterable[MappingPlan], published: Iterable[MappingPlan]) -> str:
    """Takes mappings out and puts others in."""
    return "".join((*_statements("delete", _mappings(withdrawn)), *_statements("add", _mappings(published))))


def remove() -> str:
    """Takes the table away, if it is there."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


def transactions(text: str) -> Iterator[str]:
    """A change of mappings, cut into such as libnftables can take without much memory; mostly it is one.

    A long range that is moved takes several.  Between them some of its ports are not translated yet, or not any more:
    the relay serves who asks there.
    """
    lines: list[str] = []
    count = 0
    for line in text.splitlines(keepends=True):
        more = line.count(_BETWEEN) + 1 if " element " in line else 0
        if count and count + more > MOST_ELEMENTS:
            yield "".join(lines)
            lines, count = [], 0
        lines.append(line)
        count += more
    if lines:
        yield "".join(lines)


def opposite(text: str) -> str:
    """What takes a change back."""
    return "".join(
        f"{_OPPOSITES[verb]} {rest}" for verb, _, rest in (line.partition(" ") for line in text.splitlines(True)[::-1])
    )


def chains(plan: Plan) -> dict[str, tuple[str, list[str]]]:
    """Each chain's hook and rules; a chain without a hook is jumped to."""
    found = {
        f"published{family}": (
            "",
            ["meta l4proto != { tcp, udp, sctp } return", *(_lookup(family, kind) for kind in _KINDS)],
        )
        for family in (4, 6)
    }
    for number, planned in enumerate(plan.networks):
        found[_to(number)] = "", [_hairpin(subnet) for subnet in planned.network.subnets]
    found["associations"] = "", [f"{_HEARTBEAT} ct state new drop", f"{_ABORT} ct state invalid drop"]
    return found | {
        "prerouting": ("type nat hook prerouting priority dstnat;", list(_arriving(plan))),
        "output": ("type nat hook output priority -100;", [_translation(family) for family in (4, 6)]),
        "postrouting": (
            "type nat hook postrouting priority srcnat;",
            [_LEAVING, *(f"{_WORD[family]} saddr @masqueraded{family} masquerade" for family in (4, 6))],
        ),
        "input": (
            "type filter hook input priority filter;",
            [
                'iifname != "lo" ip daddr 127.0.0.0/8 ct original ip daddr 127.0.0.0/8 drop',
                "meta l4proto sctp iifname @bridges jump associations",
            ],
        ),
        "forward": (
            "type filter hook forward priority filter;",
            [
                "ct state established,related accept",
                "iifname . oifname @together accept",
                _TRANSLATED,
                "iifname @internal drop",
                "oifname @bridges drop",
                "iifname @bridges accept",
                *(f"meta nfproto ipv{family} drop" for family in sorted(plan.closed)),
            ],
        ),
    }


def rules_met(planned: MappingPlan, route: Route, network: Network) -> Iterator[str]:
    """The rules that the first packet of a client on `route` meets, each as `CHAIN: RULE`."""
    if route.road is not Road.NAT:
        return
    hook = "output" if route.origin is Origin.HOST else "prerouting"
    yield f"{hook}: {_translation(planned.family)}"
    (name, elements), *_ = _elements(planned)
    kind = name.rstrip("46")
    yield f"published{planned.family}: {_lookup(planned.family, kind)} {{ {_some(elements)} }}"
    if route.origin is not Origin.HOST:
        yield f"forward: {_TRANSLATED}"
    if route.neighbour:
        own = next(subnet for subnet in network.subnets if planned.container_address in subnet)
        yield f"postrouting: {_LEAVING}, {_hairpin(own)}"


_KINDS = ("ports", "addresses", "ranges")


def _arriving(plan: Plan) -> Iterator[str]:
    for family in sorted(plan.routed):
        if any(family in planned.untranslated for planned in plan.networks):
            yield f"meta nfproto ipv{family} iifname @untranslated{family} return"
        yield _translation(family)


def _translation(family: int) -> str:
    return f"{_WORD[family]} daddr != {_KEPT[family]} fib daddr type local jump published{family}"


def _lookup(family: int, kind: str) -> str:
    key = "th dport" if kind == "ports" else f"{_WORD[family]} daddr . th dport"
    return f"dnat {_WORD[family]} to meta l4proto . {key} map @{kind}{family}"


def _to(number: int) -> str:
    """The chain for what leaves towards a network.  What ends there is not masqueraded: it stays among bridges."""
    return f"to_{number}"


def _hairpin(subnet: Subnet) -> str:
    """A container that answers its neighbour directly would do so from an address that nobody asked."""
    return f"{_WORD[subnet.version]} saddr {subnet} ct status dnat masquerade"


def _networks(plan: Plan) -> Elements:
    found: Elements = defaultdict(list)
    for number, planned in enumerate(plan.networks):
        network = planned.network
        bridge = f'"{network.bridge}"'
        found["bridges"].append(bridge)
        for family in sorted(planned.untranslated):
            found[f"untranslated{family}"].append(bridge)
        found["to"].append(f"{bridge} : goto {_to(number)}")
        if network.internal:
            found["internal"].append(bridge)
        if network.icc:
            found["together"].append(f"{bridge} . {bridge}")
        for subnet in network.subnets:
            if network.masquerade and not network.internal:
                found[f"masqueraded{subnet.version}"].append(str(subnet))
    if plan.closed and plan.facts.foreign_bridges:
        # Frames within another program's bridge are not forwarded by us, though br_netfilter shows them here.
        found["together"] += [f'"{bridge}" . "{bridge}"' for bridge in plan.facts.foreign_bridges]
    return found


def _mappings(plans: Iterable[MappingPlan]) -> Elements:
    return _join(*(_elements_of(planned) for planned in plans if planned.is_nat))


def _elements_of(planned: MappingPlan) -> Elements:
    return dict(_elements(planned))


def _elements(planned: MappingPlan) -> Iterator[tuple[str, list[str]]]:
    """The map that a mapping is in, and its elements there."""
    mapping, family = planned.mapping, planned.family
    to = planned.container_address
    if mapping.host_ports.count > 1 and mapping.keeps_ports:
        at = _EVERY[family] if mapping.host_address.is_unspecified else ip_network(mapping.host_address)
        yield f"ranges{family}", [f"{mapping.protocol} . {at} . {mapping.host_ports} : {to}"]
        return
    if mapping.host_address.is_unspecified:
        name, key = f"ports{family}", mapping.protocol.value
    else:
        name, key = f"addresses{family}", f"{mapping.protocol} . {mapping.host_address}"
    yield name, [f"{key} . {host} : {to} . {container}" for host, container in mapping.pairs()]


def _join(*many: Elements) -> Elements:
    joined: Elements = defaultdict(list)
    for elements in many:
        for name, found in elements.items():
            joined[name] += found
    return joined


def _statements(verb: str, elements: Elements) -> Iterator[str]:
    for name, found in elements.items():
        for at in range(0, len(found), MOST_ELEMENTS):
            yield f"{verb} element {TABLE} {name} {{ {_BETWEEN.join(found[at : at + MOST_ELEMENTS])} }}\n"


def _some(elements: list[str]) -> str:
    return elements[0] if len(elements) == 1 else f"{elements[0]}, … {elements[-1]}"
