"""Masquerades clients that a container would answer past the host: it sees the gateway instead."""

from collections.abc import Collection, Iterator

from gangway.model import Address, Network, Subnet
from gangway.neighbours import Neighbours

_WORD = {4: "ip", 6: "ip6"}


def hairpin(family: int) -> str:
    """Masquerade a neighbour: the container would answer it directly, from an address that it did not connect to."""
    return f"oifname . {_WORD[family]} saddr @neighbours{family} ct status dnat masquerade"


def neighbours(network: Network, subnet: Subnet) -> str:
    """Return the element of a network's own clients."""
    return f'"{network.bridge}" . {subnet}'


def further(clients: Collection[Neighbours]) -> Iterator[str]:
    """Masquerade neighbours on further networks of containers: a rule for each family that has some."""
    for family, word in _WORD.items():
        keys = [f"{one.subnet} . {one.address}" for one in clients if one.subnet.version == family]
        if keys:
            yield f"oifname @bridges {word} saddr . {word} daddr {{ {', '.join(keys)} }} ct status dnat masquerade"


def to_gateway(container: Address) -> str:
    """Masquerade clients of a container that would send its answers elsewhere: the gateway is on its own link."""
    return f"oifname @bridges {_WORD[container.version]} daddr {container} ct status dnat masquerade"
