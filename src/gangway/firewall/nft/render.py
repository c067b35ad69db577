"""A Plan as nftables rules: text for nft(8).

What this file knows: nft's language, and what a rule costs.  What it must not know: why a road was chosen.

All rules are in one table, `inet gangway`.  They depend on the networks and on the families that are forwarded only:
mappings are elements of the table's maps, and the further networks of containers are elements of sets, so a packet
passes the same few rules however many there are.  Only the first packet of a connection passes the chains of type nat.
All others pass `forward`, whose second rule accepts them: bulk transfers show each lookup that a packet is spared.

A family has three maps; each kind of mapping has the form that is cheapest for it:

    ports      protocol . port → container . port           host address 0.0.0.0 or ::, one port or ports that change
    addresses  protocol . address . port → the same         one host address
    ranges     protocol . address . ports → container       a range whose ports stay the same: one element

The first two are hashes.  The third holds intervals in several dimensions; the kernel copies the whole set for every
change of it (net/netfilter/nft_set_pipapo.c, commit), which suits a few long ranges and not many single ports.
`th dport` requires that nft knows the transport protocol to have ports, hence the first rule of `published`.

`input` protects the host's loopback addresses.  They cannot be reached from outside while route_localnet is off, but
another program may have set it.  The rule compares the address that the client requested: a translation to 127.0.0.1 by
another program is intended.

`associations` keeps translated SCTP associations alive.  The two ends of one know all of each other's addresses and
probe each pair of them by a HEARTBEAT (RFC 9260, 5.4), but only the pair that the client has connected is translated.
Between any other pair the receiver knows of no association and answers by an ABORT (8.4), and the sender takes it for
the end of the association that it has (8.5.1; kernel 6.1: after 1 to 5 s).  So a container's HEARTBEAT to the host gets
no answer; and a container's ABORT that conntrack cannot assign, because it answers such a HEARTBEAT, is dropped.

`invalid` drops TCP segments that conntrack assigns to no connection (`ct state invalid`: outside of the window, for
example).  Nothing translates them (net/netfilter/nf_nat_core.c, nf_nat_inet_fn), so such a segment for a published port
would reach the host itself, whose reset ends the connection; one of a container would leave with the container's own
address.  If they are dropped, TCP retransmits what was lost.  Other segments to the host are left alone.

Connections by nat outlive what conntrack forgets.  Timeouts are set that let one half be closed for an hour.  Segments
of a connection that is not tracked (any more) begin a new entry; `answers` gives those of a container the address and
port that its client has connected to.

`syn` lowers the segment size that both ends announce to what the routes to both carry (net/netfilter/nft_rt.c,
get_tcpmss).  Otherwise an upload over a path with a small MTU depends on ICMP, which some networks drop.  SYN-ACK
belongs to an established connection, so the rule is the first one.

Only the verdict `drop` is final: what is accepted here passes other programs' chains, too, and these may drop it.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from ipaddress import ip_network

from gangway.firewall.nft import asked, masquerade, restricted, routed
from gangway.firewall.nft.answers import Answers
from gangway.firewall.nft.features import ALL, Features
from gangway.firewall.nft.transaction import TABLE, Elements, Transaction
from gangway.model import Network, Protocol, address_text
from gangway.neighbours import Neighbours
from gangway.plan import MappingPlan, Origin, Plan, Road, Route
from gangway.reasons import Code

_MAPS = """\
	map ports{f} {{ type inet_proto . inet_service : ipv{f}_addr . inet_service; }}
	map addresses{f} {{ type inet_proto . ipv{f}_addr . inet_service : ipv{f}_addr . inet_service; }}
	map ranges{f} {{ type inet_proto . ipv{f}_addr . inet_service : ipv{f}_addr; flags interval; }}
	set masqueraded{f} {{ type ipv{f}_addr; flags interval; }}
	set neighbours{f} {{ type ifname . ipv{f}_addr; flags interval; }}
	set further{f} {{ type ipv{f}_addr . ipv{f}_addr; flags interval; }}
	set untranslated{f} {{ type ifname; }}
	map answers{f} {{ type ipv{f}_addr . inet_service : inet_service; }}
	map answers_at{f} {{ type ipv{f}_addr . inet_service : ipv{f}_addr . inet_service; }}
	set ambiguous{f} {{ type ipv{f}_addr . inet_service; }}
"""
_MAPS += restricted.DECLARATION + routed.DECLARATION
# In seconds; nft takes Linux's own defaults for the other states: 5 days for one in which both ends may send.
_TIMEOUT = """\
	ct timeout tcp{f} {{
		protocol tcp
		l3proto {word}
		policy = {{ fin_wait : 3600, close_wait : 3600 }}
	}}
"""
_KEYS = """\
	set ports{f}_keys {{ type inet_proto . inet_service; }}
	set addresses{f}_keys {{ type inet_proto . ipv{f}_addr . inet_service; }}
	set ranges{f}_keys {{ type inet_proto . ipv{f}_addr . inet_service; flags interval; }}
"""
_SETS = """\
	set bridges { type ifname; }
	set internal { type ifname; }
	set together { type ifname . ifname; }
"""
# After other programs, whose translations are for an address and a port, and before any filter (netfilter_ipv4.h).
AFTER_OTHERS = -50
_SUFFIX, _KINDS = "_keys", ("ports", "addresses", "ranges")
_WORD = {4: "ip", 6: "ip6"}
# Never translated: the kernel routes no loopback address, and forwards nothing from a link-local one.
_UNTRANSLATED = {4: "127.0.0.0/8", 6: "{ ::1, fe80::/10 }"}
Name = tuple[str, str]
"""Of what the table has: `set`, `map` or `chain`, and the name."""
_NAMES = re.compile(r"^\t(set|map|chain) (\w+) ", re.MULTILINE)
_ANY = {4: "0.0.0.0/0", 6: "::/0"}
_OTHERS = ("answers", "answers_at", "ambiguous", "opened", "further", *restricted.KINDS)
CHANGING_SETS = tuple(f"{name}{family}" for family in (4, 6) for name in (*_KINDS, *_OTHERS)) + tuple(
    f"{kind}{family}{_SUFFIX}" for family in (4, 6) for kind in _KINDS
)
"""The sets and maps that change with each mapping, `_KEYS` included, or when a container joins or leaves a network."""
SETS_OF_NETWORKS = tuple(
    name for _, name in _NAMES.findall(_MAPS.format(f=4) + _MAPS.format(f=6) + _SETS) if name not in CHANGING_SETS
)
"""Those that change with networks and facts only."""

_HAS_PORTS = "meta l4proto != { tcp, udp, sctp } return"
_MIDSTREAM = "tcp flags & (fin | syn | rst | ack) != syn"
_RESET = "reject with tcp reset"
_CLAMPED = "tcp flags & (syn | rst) == syn jump syn"
_TRANSLATED = "oifname @bridges ct status dnat accept"
# The type of the first chunk, read at its offset: nft's `sctp chunk` needs Linux 5.14.
_HEARTBEAT, _ABORT = "@th,96,8 4", "@th,96,8 6"


def render(plan: Plan, features: Features = ALL, there: Collection[Name] = (), answers: Answers | None = None) -> str:
    """Return the text of one transaction that makes the table a plan's, whatever it was before.

    `there` is what the table has.  If it has the same sets, maps and chains, these stay and get other content: so our
    base chains keep their places among other programs' of the same priority.  Else the table is deleted first.
    `answers` are those of the plan's mappings, if they are known.
    """
    declared = _declarations(plan, features)
    names = _NAMES.findall(declared)
    if set(names) == set(there):
        flushed = (f"flush {kind} {TABLE} {name}\n" for kind, name in names if kind != "chain")
        head = "".join((declared, f"flush table {TABLE}\n", *flushed))  # all rules, and all elements
    else:
        head = remove() + declared
    lines = [f"table {TABLE} {{"]
    for name, (_, rules) in chains(plan, features).items():
        lines += [f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"]
    answers = answers or Answers(plan.mappings)
    elements = _networks(plan) | changing_elements(plan, features, answers)
    return head + "\n".join((*lines, "}\n")) + Transaction({}, elements).text()


def _declarations(plan: Plan, features: Features) -> str:
    """Return the table with all of its sets, maps and chains; all of them are empty."""
    lines = [f"table {TABLE} {{"]
    for family in (4, 6):
        keys = "" if features.map_as_set else _KEYS
        lines.append((_MAPS + keys).format(f=family))
        if features.timeouts:
            lines.append(_TIMEOUT.format(f=family, word=_WORD[family]))
    lines.append(_SETS + (asked.DECLARATION if features.remembers else ""))
    for name, (head, _) in chains(plan, features).items():
        lines.append(f"\tchain {name} {{ {head and f'{head} policy accept;'} }}")
    return "\n".join((*lines, "}\n"))


def change(removed: Collection[MappingPlan], added: Collection[MappingPlan], features: Features = ALL) -> Transaction:
    """Return the transaction that removes mappings and adds others, without that of `Answers`."""
    deletes = _mappings(removed, features) | restricted.elements(removed)  # in this order, should it be split: a port
    return Transaction(deletes, restricted.elements(added) | _mappings(added, features))  # is restricted for as long


def change_further(removed: Iterable[Neighbours], added: Iterable[Neighbours]) -> Transaction:
    """Return the transaction that removes neighbours on further networks and adds others."""
    return Transaction(masquerade.further_elements(removed), masquerade.further_elements(added))


def changing_elements(plan: Plan, features: Features, answers: Answers) -> Elements:
    """Return the elements of CHANGING_SETS; `answers` are those of the plan's mappings."""
    of_mappings = restricted.elements(plan.mappings) | _mappings(plan.mappings, features) | answers.elements()
    return of_mappings | masquerade.further_elements(plan.further)


def place_of(planned: MappingPlan) -> str:
    """Return the name of the map that a mapping's elements are in."""
    return _elements(planned)[0]


def key_of(planned: MappingPlan, port: int) -> tuple[str, str, int]:
    """Return what a packet to a port of a mapping is looked up by: protocol, address unless it is none, and port."""
    mapping, is_single = planned.mapping, place_of(planned).startswith("ports")
    return mapping.protocol.value, "" if is_single else str(mapping.host_address), port


def is_interval(name: str) -> bool:
    """True if the elements of one of CHANGING_SETS are intervals."""
    return name.startswith(("ranges", "opened", "further", *restricted.KINDS))


def remove() -> str:
    """Return the text that deletes the table, if there is one."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


def chains(plan: Plan, features: Features = ALL) -> dict[str, tuple[str, list[str]]]:
    """Return each chain's hook and rules; a chain without a hook is jumped to."""
    remember, answer = (asked.REMEMBER, asked.ANSWER) if features.remembers else ([], [])
    excluded = {family: [*_excluded(plan, family)] for family in (4, 6)}
    found = {
        f"published{family}": ("", [_HAS_PORTS, *excluded[family], *(_lookup(family, kind) for kind in _KINDS)])
        for family in (4, 6)
    }
    found |= {f"clients{family}": ("", [*excluded[family], restricted.refusal(family)]) for family in (4, 6)}
    found["invalid"] = "", ["iifname @bridges drop", *excluded[4], *excluded[6], *_published_invalid(features)]
    found["direct"] = "", [*routed.direct()]
    found["answers"] = "", [rule for family in (4, 6) for rule in _answers(family)]
    found["syn"] = "", [f"{way} @bridges tcp option maxseg size set rt mtu" for way in ("iifname", "oifname")]
    found["associations"] = "", [f"{_HEARTBEAT} ct state new drop", f"{_ABORT} ct state invalid drop"]
    return found | {
        "prerouting": (f"type nat hook prerouting priority {AFTER_OTHERS};", list(_prerouting(plan))),
        "output": (
            f"type nat hook output priority {AFTER_OTHERS};",
            [*_kept_sources(plan), *map(_translation, (4, 6))],
        ),
        "postrouting": (
            "type nat hook postrouting priority srcnat;",
            [
                f"{_MIDSTREAM} jump answers",
                *(_timeout(family) for family in (4, 6) if features.timeouts),
                *remember,
                *map(masquerade.hairpin, (4, 6)),
                *map(masquerade.further, (4, 6)),
                *map(masquerade.to_gateway, sorted(plan.facts.answers_elsewhere, key=str)),
                "oifname @bridges accept",
                *answer,
                *(f"{_WORD[family]} saddr @masqueraded{family} masquerade" for family in (4, 6)),
            ],
        ),
        "answered": ("type nat hook input priority 100;", answer),
        "input": (
            "type filter hook input priority filter;",
            [
                'iifname != "lo" ip daddr 127.0.0.0/8 ct original ip daddr 127.0.0.0/8 drop',
                "meta l4proto tcp ct state invalid jump invalid",
                "meta l4proto sctp iifname @bridges jump associations",
            ],
        ),
        "forward": (
            "type filter hook forward priority filter;",
            [
                _CLAMPED,
                "ct state established,related accept",
                "iifname . oifname @together accept",
                "iifname @bridges ct state invalid drop",
                _TRANSLATED,
                "iifname @internal drop",
                routed.JUMP,
                "oifname @bridges drop",
                *(f"{_WORD[family]} saddr . tcp sport @ambiguous{family} {_MIDSTREAM} {_RESET}" for family in (4, 6)),
                "iifname @bridges accept",
                *(f"meta nfproto ipv{family} drop" for family in sorted(plan.closed)),
            ],
        ),
    }


def matching_rules(
    planned: MappingPlan, route: Route, network: Network, port: int, further: Collection[Neighbours] = ()
) -> Iterator[str]:
    """Yield the rules that match the first packet of a client of a port on `route`, each as `CHAIN: RULE`.

    `further` are the container's neighbours on further networks, who are among the containers of other networks.
    """
    if route.road is not Road.BLOCKED and route.origin in (Origin.REMOTE, Origin.CONTAINER):
        yield from restricted.matching_rules(planned)
    if route.road is Road.ROUTED and route.origin is not Origin.HOST and not route.neighbour:
        yield from routed.matching_rules(planned)
    if route.road is not Road.NAT:
        return
    hook = "output" if route.origin is Origin.HOST else "prerouting"
    yield f"{hook}: {_translation(planned.family)}"
    name, elements = _elements(planned)
    matched = elements[0] if len(elements) == 1 else elements[port - planned.mapping.host_ports.first]
    yield f"published{planned.family}: {_lookup(planned.family, name.rstrip('46'))} {{ {matched} }}"
    if route.origin is not Origin.HOST:
        yield f"forward: {_TRANSLATED}"
    if route.neighbour:
        own = next(subnet for subnet in network.subnets if planned.container_address in subnet)
        yield f"postrouting: {masquerade.hairpin(planned.family)} {{ {masquerade.neighbours(network, own)} }}"
        return
    keys = masquerade.further_elements(further).get(f"further{planned.family}")
    if keys and route.origin is Origin.CONTAINER:
        yield f"postrouting: {masquerade.further(planned.family)} {{ {', '.join(keys)} }}"
    if route.reason.code is Code.ANSWERS_ELSEWHERE:
        yield f"postrouting: {masquerade.to_gateway(planned.container_address)}"


def _kept_sources(plan: Plan) -> Iterator[str]:
    """Leave packets of the host's own to the relay whose source would not get to a container."""
    yield "ip saddr 127.0.0.0/8 return"
    yield "ip6 saddr ::1 return"
    for lost in plan.facts.lost_sources:
        yield f"{_WORD[lost.address.version]} saddr {lost.address} return"


def _excluded(plan: Plan, family: int) -> Iterator[str]:
    """Leave packets for excluded addresses to other programs."""
    for address in plan.facts.excluded_in(family):
        yield f"{_WORD[family]} daddr {address} return"


def _prerouting(plan: Plan) -> Iterator[str]:
    yield from map(restricted.rule, (4, 6))
    for family in sorted(plan.translated):
        if plan.untranslated(family):
            yield f"meta nfproto ipv{family} iifname @untranslated{family} return"
        yield _translation(family)


def _translation(family: int) -> str:
    return f"{_WORD[family]} daddr != {_UNTRANSLATED[family]} fib daddr type local jump published{family}"


def _lookup(family: int, kind: str) -> str:
    return f"dnat {_WORD[family]} to {_key(family, kind)} map @{kind}{family}"


def _key(family: int, kind: str) -> str:
    address = "" if kind == "ports" else f"{_WORD[family]} daddr . "
    return f"meta l4proto . {address}th dport"


def _published_invalid(features: Features) -> Iterator[str]:
    """Drop what is sent to a published port; `ports` does not say for which family a packet is."""
    suffix = "" if features.map_as_set else _SUFFIX
    for family in (4, 6):
        for kind in _KINDS:
            of_family = f"meta nfproto ipv{family} " if kind == "ports" else ""
            yield f"{of_family}{_key(family, kind)} @{kind}{family}{suffix} drop"


def _timeout(family: int) -> str:
    """Set the timeouts of a new connection; only then the kernel allows it (net/netfilter/nft_ct.c)."""
    return f'oifname @bridges ct status dnat meta nfproto ipv{family} meta l4proto tcp ct timeout set "tcp{family}"'


def _answers(family: int) -> Iterator[str]:
    word = _WORD[family]
    key = f"{word} saddr . tcp sport"
    yield f"meta nfproto ipv{family} meta l4proto tcp masquerade to :{key} map @answers{family}"
    yield f"meta l4proto tcp snat {word} to {key} map @answers_at{family}"


def _networks(plan: Plan) -> Elements:
    found: Elements = defaultdict(list, routed.bridges(planned.network for planned in plan.networks))
    for planned in plan.networks:
        network = planned.network
        bridge = f'"{network.bridge}"'
        found["bridges"].append(bridge)
        if network.internal:
            found["internal"].append(bridge)
        if network.icc:
            found["together"].append(f"{bridge} . {bridge}")
        for subnet in network.subnets:
            found[f"neighbours{subnet.version}"].append(masquerade.neighbours(network, subnet))
            if network.masquerades(subnet):
                found[f"masqueraded{subnet.version}"].append(str(subnet))
    for family in (4, 6):
        if interfaces := plan.untranslated(family):
            found[f"untranslated{family}"] = [f'"{name}"' for name in interfaces]
    if plan.closed and plan.facts.foreign_bridges:
        # br_netfilter shows the frames within other programs' bridges here; gangway has nothing to do with them.
        found["together"] += [f'"{bridge}" . "{bridge}"' for bridge in plan.facts.foreign_bridges]
    return found


def _mappings(plans: Collection[MappingPlan], features: Features) -> Elements:
    found: Elements = defaultdict(list, routed.elements(plans))
    for planned in plans:
        if planned.is_nat:
            name, elements = _elements(planned)
            found[name] += elements
            if planned.mapping.protocol is Protocol.TCP and not features.map_as_set:
                found[f"{name}{_SUFFIX}"] += [element.partition(" : ")[0] for element in elements]
    return found


def _elements(planned: MappingPlan) -> tuple[str, list[str]]:
    """Return the map that a mapping belongs to, and its elements."""
    mapping, family = planned.mapping, planned.family
    to = address_text(planned.container_address)
    if mapping.host_ports.count > 1 and mapping.keeps_ports:
        at = _ANY[family] if mapping.host_address.is_unspecified else ip_network(mapping.host_address)
        return f"ranges{family}", [f"{mapping.protocol} . {at} . {mapping.host_ports} : {to}"]
    name, at = ("ports", "") if mapping.host_address.is_unspecified else ("addresses", f" . {mapping.host_address}")
    pairs = mapping.pairs()
    return f"{name}{family}", [f"{mapping.protocol}{at} . {host} : {to} . {container}" for host, container in pairs]
