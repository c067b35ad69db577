"""Opens published ports at the containers' own addresses, in networks with the gateway mode `routed`.

    routed  bridge                                               what may come in there without being translated
    opened  protocol . container's address . port . client's     the published ports, and who may reach them

The second holds intervals in several dimensions: a range of ports is one element, and so is `0.0.0.0/0` for everybody.
The chain `direct` sees only the first packets that are for a container and are not translated.  Those within a network
were accepted before, unless its containers are isolated (br_netfilter shows such frames here, too).  ICMP is open, as
with dockerd's own rules: clients elsewhere can ping a container.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from gangway.firewall.nft.transaction import Elements
from gangway.model import Network
from gangway.plan import MappingPlan

DECLARATION = """\
	set routed{f} {{ type ifname; }}
	set opened{f} {{ type inet_proto . ipv{f}_addr . inet_service . ipv{f}_addr; flags interval; }}
"""
JUMP = "oifname @bridges jump direct"
_WORD, _ICMP = {4: "ip", 6: "ip6"}, {4: "icmp", 6: "ipv6-icmp"}
_ANY = {4: "0.0.0.0/0", 6: "::/0"}


def direct() -> Iterator[str]:
    """Yield the rules for packets to a container's own address."""
    for family in (4, 6):
        yield f"iifname . {_WORD[family]} daddr @neighbours{family} drop"
        yield f"meta nfproto ipv{family} oifname @routed{family} meta l4proto {_ICMP[family]} accept"
        yield _rule(family)


def bridges(networks: Iterable[Network]) -> Elements:
    """Return the elements of networks."""
    found: Elements = defaultdict(list)
    for network in networks:
        for family in filter(network.opens, (4, 6)):
            found[f"routed{family}"].append(f'"{network.bridge}"')
    return found


def elements(plans: Iterable[MappingPlan]) -> Elements:
    """Return the elements of mappings."""
    found: Elements = defaultdict(list)
    for planned in plans:
        if planned.is_opened:
            found[f"opened{planned.family}"] += _clients(planned)
    return found


def matching_rules(planned: MappingPlan) -> Iterator[str]:
    """Yield the rules that match the first packet of a client on another network, with their elements."""
    if planned.is_opened:
        yield f"forward: {JUMP}"
        yield f"direct: {_rule(planned.family)} {{ {', '.join(_clients(planned))} }}"


def _rule(family: int) -> str:
    word = _WORD[family]
    key = f"meta l4proto . {word} daddr . th dport . {word} saddr"
    return f"oifname @routed{family} meta l4proto {{ tcp, udp, sctp }} {key} @opened{family} accept"


def _clients(planned: MappingPlan) -> list[str]:
    mapping, family = planned.mapping, planned.family
    port = f"{mapping.protocol} . {planned.container_address} . {mapping.container_ports}"
    admitted = [one for one in mapping.admitted if one.version == family] if mapping.admitted else [_ANY[family]]
    return [f"{port} . {subnet}" for subnet in admitted]
