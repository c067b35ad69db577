"""Rules for networks in the gateway mode `routed`, whose clients connect to the containers' own addresses.

In `filter`, our own chain accepts what is for a published port.  What else comes in for the bridge is dropped after
that, unless it is ICMP, which is open as with dockerd's own rules.  For other networks `mangle` drops everything but
translated connections: there a container's port is open to these only, and here a rule has to say so.
"""

from collections.abc import Iterator

from gangway.model import Network

TRANSLATED = " -m conntrack --ctstate DNAT"
_ICMP = {4: "icmp", 6: "ipv6-icmp"}


def closing_rules(network: Network, family: int, prefix: str) -> Iterator[str]:
    """Yield the rules in `filter` for what comes in for a network's bridge."""
    bridge = network.bridge
    yield f"-A FORWARD -o {bridge} -j {prefix}"
    yield f"-A FORWARD ! -i {bridge} -o {bridge} -p {_ICMP[family]} -j ACCEPT"
    yield f"-A FORWARD ! -i {bridge} -o {bridge} -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP"
