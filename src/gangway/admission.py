"""Who may reach a published port: `--from`, and the label `gangway.from` of Docker's containers and networks."""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_interface, ip_network

from gangway.errors import InvalidRequest
from gangway.model import Subnet

MOST_SUBNETS = 64
"""For one mapping: with iptables each of them is a rule."""
_MAPPED = IPv6Network("::ffff:0:0/96")


def parse_subnet(text: str, what: str = "subnet") -> Subnet:
    """Read ADDRESS/PREFIX-LENGTH, or an address, which is a subnet of its own; an error calls it `what`."""
    try:
        subnet = ip_network(text, strict=False)
    except ValueError:
        raise InvalidRequest(f"invalid {what} {text!r}: write ADDRESS/PREFIX-LENGTH, as in 172.30.0.0/24") from None
    if ip_interface(text).ip != subnet.network_address:
        raise InvalidRequest(f"invalid {what} {text!r}: it has host bits set; write {subnet}")
    return subnet


def parse_admitted(texts: Iterable[str]) -> tuple[Subnet, ...]:
    """Return the subnets whose clients are admitted: sorted, IPv4 first, and none within another one.

    Without any, everybody is admitted.
    """
    found = [_parse_clients(text) for text in texts]
    merged: Sequence[Subnet] = (
        *collapse_addresses(one for one in found if isinstance(one, IPv4Network)),
        *collapse_addresses(one for one in found if isinstance(one, IPv6Network)),
    )
    if len(merged) > MOST_SUBNETS:
        raise InvalidRequest(f"too many subnets of clients: {len(merged)}, at most {MOST_SUBNETS}")
    return tuple(merged)


def parse_label(text: str) -> tuple[Subnet, ...]:
    """Read a label's value: subnets, separated by commas.  InvalidRequest also if it names none."""
    return parse_admitted(one.strip() for one in text.split(","))


def _parse_clients(text: str) -> Subnet:
    if "%" in text:
        raise InvalidRequest(f"invalid subnet of clients {text!r}: write it without a zone")
    subnet = parse_subnet(text, "subnet of clients")
    if isinstance(subnet, IPv6Network) and subnet.subnet_of(_MAPPED):
        plain = f"{subnet.network_address.ipv4_mapped}/{subnet.prefixlen - 96}"
        raise InvalidRequest(f"invalid subnet of clients {text!r}: it is IPv4's in IPv6 notation; write {plain}")
    return subnet
