"""What the kernel's nftables can do."""

from collections.abc import Callable
from typing import NamedTuple

from gangway.firewall.nft import asked
from gangway.firewall.nft.transaction import TABLE


class Features(NamedTuple):
    """What rules depend on."""

    map_as_set: bool = True  # a rule can test whether a map has a key (6.1: no; then the keys are in sets, too)
    timeouts: bool = True  # a rule can set a tracked connection's timeouts (CONFIG_NF_CONNTRACK_TIMEOUT)
    remembers: bool = True  # a rule can add an element to a map


ALL = Features()
_PROBES = {
    "map_as_set": "\tmap m { type inet_service : ipv4_addr; }\n\tchain c { tcp dport @m drop; }",
    "timeouts": "\tct timeout t { protocol tcp; l3proto ip; policy = { close_wait : 3600 }; }\n"
    '\tchain c { meta l4proto tcp ct timeout set "t"; }',
    "remembers": asked.PROBE,
}


def probe(accepts: Callable[[str], bool]) -> Features:
    """Return the features of a kernel; `accepts` says whether it would carry a text out, for which the kernel waits."""
    probes = [f"table {TABLE}_probe_{name} {{\n{_PROBES[name]}\n}}\n" for name in Features._fields]
    return ALL if accepts("".join(probes)) else Features(*map(accepts, probes))
