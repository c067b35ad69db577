"""Masquerades clients that a container would answer past the host: it sees the gateway instead."""

from collections import defaultdict
from collections.abc import Iterable

from gangway.firewall.nft.transaction import Elements
from gangway.model import Address, Network, Subnet
from gangway.neighbours import Neighbours

_WORD = {4: "ip", 6: "ip6"}


def hairpin(family: int) -> str:
    """Masquerade a neighbour: the container would answer it directly, from an address that it did not connect to."""
    return f"oifname . {_WORD[family]} saddr @neighbours{family} ct status dnat masquerade"


def neighbours(network: Network, subnet: Subnet) -> str:
    """Return the element of a network's own clients."""
    return f'"{network.bridge}" . {subnet}'


def further(family: int) -> str:
    """Masquerade neighbours on further networks of containers, as `hairpin` does those on the first one."""
    word = _WORD[family]
    return f"oifname @bridges {word} saddr . {word} daddr @further{family} ct status dnat masquerade"


def further_elements(clients: Iterable[Neighbours]) -> Elements:
    """Return the elements of neighbours on further networks."""
    found: Elements = defaultdict(list)
    for one in sorted(clients, key=str):
        found[f"further{one.subnet.version}"].append(f"{one.subnet} . {one.address}")
    return found


def to_gateway(container: Address) -> str:
    """Masquerade clients of a container that would send its answers elsewhere: the gateway is on its own link."""
    return f"oifname @bridges {_WORD[container.version]} daddr {container} ct status dnat masquerade"
