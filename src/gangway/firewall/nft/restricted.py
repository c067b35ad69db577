"""Keeps clients away from ports that are not for them: the mappings with `admitted` subnets.

    restricted  protocol . host address . port                    the ports that are not for everybody
    admitted    protocol . host address . port . client's address  who may reach them

Both hold intervals in several dimensions, so a range of ports is one element, and so is a subnet.  The first packet of
a connection that comes in by an interface is looked up before it is translated or gets to the relay.  To drop it in a
chain of type nat is enough: its entry in the connection table is not confirmed (net/netfilter/nf_conntrack_core.c), so
the next packet is a first one again.  While no port is restricted, the lookup finds an empty set and ends at once
(net/netfilter/nft_set_pipapo.c).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from ipaddress import ip_network

from gangway.firewall.nft.transaction import Elements
from gangway.plan import MappingPlan, is_link_local

DECLARATION = """\
	set restricted{f} {{ type inet_proto . ipv{f}_addr . inet_service; flags interval; }}
	set admitted{f} {{ type inet_proto . ipv{f}_addr . inet_service . ipv{f}_addr; flags interval; }}
"""
KINDS = ("restricted", "admitted")
_WORD = {4: "ip", 6: "ip6"}
_ANY = {4: "0.0.0.0/0", 6: "::/0"}


def rule(family: int) -> str:
    """Return the rule for what comes in by an interface; all that it jumps to is for addresses of the host."""
    found = f"meta l4proto {{ tcp, udp, sctp }} {_key(family)} @restricted{family}"
    return f"{found} fib daddr type local jump clients{family}"


def refusal(family: int) -> str:
    """Return the rule that drops clients that are not admitted."""
    return f"{_key(family)} . {_WORD[family]} saddr != @admitted{family} drop"


def elements(plans: Iterable[MappingPlan]) -> Elements:
    """Return the elements of mappings."""
    found: Elements = defaultdict(list)
    for planned in plans:
        if is_restricted(planned):
            found[f"restricted{planned.family}"].append(_port(planned))
            found[f"admitted{planned.family}"] += _clients(planned)
    return found


def matching_rules(planned: MappingPlan) -> Iterator[str]:
    """Yield the rules that match the first packet of a client that comes in by an interface, with their elements."""
    if is_restricted(planned):
        family = planned.family
        yield f"prerouting: {rule(family)} {{ {_port(planned)} }}"
        yield f"clients{family}: {refusal(family)} {{ {', '.join(_clients(planned))} }}"


def is_restricted(planned: MappingPlan) -> bool:
    """True if rules keep clients away; at a link-local address, which is an interface's, only the relay does.

    At a container's own address `routed` lets the others in.
    """
    mapping = planned.mapping
    return bool(mapping.admitted) and not mapping.is_routed and not is_link_local(mapping.host_address)


def _key(family: int) -> str:
    return f"meta l4proto . {_WORD[family]} daddr . th dport"


def _port(planned: MappingPlan) -> str:
    mapping = planned.mapping
    at = _ANY[planned.family] if mapping.host_address.is_unspecified else ip_network(mapping.host_address)
    return f"{mapping.protocol} . {at} . {mapping.host_ports}"


def _clients(planned: MappingPlan) -> list[str]:
    subnets = (one for one in planned.mapping.admitted if one.version == planned.family)
    return [f"{_port(planned)} . {subnet}" for subnet in subnets]
