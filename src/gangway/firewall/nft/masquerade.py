"""Masquerades clients that a container would answer past the host: it sees the gateway instead."""

from gangway.model import Address, Network, Subnet

_WORD = {4: "ip", 6: "ip6"}


def hairpin(family: int) -> str:
    """Masquerade a neighbour: the container would answer it directly, from an address that it did not connect to."""
    return f"oifname . {_WORD[family]} saddr @neighbours{family} ct status dnat masquerade"


def neighbours(network: Network, subnet: Subnet) -> str:
    """Return the element of a network's own clients."""
    return f'"{network.bridge}" . {subnet}'


def to_gateway(container: Address) -> str:
    """Masquerade clients of a container that would send its answers elsewhere: the gateway is on its own link."""
    return f"oifname @bridges {_WORD[container.version]} daddr {container} ct status dnat masquerade"
