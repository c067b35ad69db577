"""What `gangway explain` prints: a sentence for each reason."""

from collections.abc import Iterator
from typing import Any

from gangway.cli.lines import mapping_line
from gangway.inet import format_host
from gangway.plan import Code, Origin, SeenAs

Answer = dict[str, Any]

_REASONS = {
    Code.TRANSLATED: "A rule translates the destination to {fact}; the kernel does the rest.",
    Code.MASQUERADED: "A rule translates the destination to {fact}, and another one the source to the gateway's "
    "address: otherwise the container would answer its neighbour directly, from an address that the neighbour did not "
    "connect to.",
    Code.REDIRECTED: "When a socket connects or sends, the kernel replaces the destination with {fact}, before there "
    "is a packet.  Sockets that are bound to an address or a device are left to the relay.",
    Code.REDIRECTED_AS_IPV4: "When a socket connects, the kernel replaces the destination with {fact}, before there is "
    "a packet.  Sockets that are IPv6 only, send without being connected, or are bound to an address or a device are "
    "left to the relay.",
    Code.NO_REDIRECT: "The kernel does not route packets of loopback addresses, and sockets cannot be redirected: "
    "{fact}.  The relay answers.",
    Code.LOOPBACK: "The kernel does not route packets of {fact}, so a process on the host has to answer: the relay.",
    Code.LINK_LOCAL: "The kernel does not forward packets from link-local addresses, and clients of {fact} have one: "
    "the relay answers.",
    Code.FAMILY: "The container's address is {fact}, of the other family, and no rule translates between the two: the "
    "relay answers.",
    Code.NO_FIREWALL: "The daemon writes no rules (--firewall none): the relay answers.",
    Code.NOT_FORWARDED: "{fact} is off, and the daemon may not turn it on (--no-ip-forward): the relay answers.",
    Code.FORWARD_DROPPED: "Another program's chain drops forwarded traffic ({fact}), and no rule can override that: "
    "the relay answers.",
    Code.OWN_BRIDGE: "Docker's layout does not translate traffic from {fact}, the container's own bridge: the relay "
    "answers.",
    Code.LOOPBACK_ONLY: "The port is published on the loopback address {fact} only.",
    Code.ELSEWHERE: "The port is published on {fact} only.",
    Code.ISOLATED: "The network is --no-icc and br_netfilter handles one family only.  So the bridge {fact} itself "
    "isolates the containers, and traffic between them is not translated: the relay answers.",
    Code.NO_SOCKETS: "This kernel has no {fact} sockets, so the relay cannot answer.",
    Code.LEASE: "Docker's own rules may carry the connection first; whatever they leave is relayed.",
}


def explanation(answer: Answer) -> Iterator[str]:
    """Yield the lines for an answer of the daemon's."""
    mapping = answer["mapping"]
    at = f"{format_host(answer['host_address'])}:{answer['host_port']}"
    yield f"{at}/{mapping['protocol']} is {mapping_line(mapping)}"
    network = f"network {answer['network']}" if answer["network"] else f"source {mapping['source']}"
    yield f"container {mapping['container'] or '-'}, {network}, firewall {answer['firewall']}"
    for route in mapping["routes"]:
        yield ""
        yield f"{_client(route)}: {route['road']}"
        yield f"  {_REASONS[Code(route['code'])].format(fact=route['fact'])}"
        if route["seen_as"] != SeenAs.NOBODY:
            yield f"  The container sees {_seen_address(route, mapping, answer)}."
        yield from (f"    {rule}" for rule in route["rules"])


def _client(route: Answer) -> str:
    if route["origin"] != Origin.CONTAINER:
        return str(route["origin"])
    return "container, of the same network" if route["neighbour"] else "container, of another network"


def _seen_address(route: Answer, mapping: Answer, answer: Answer) -> str:
    """Return whose address the container sees as the client's."""
    if route["seen_as"] != SeenAs.GATEWAY:
        return "the host's address" if route["origin"] == Origin.HOST else "the client's own address"
    if not answer["gateways"]:
        return "the gateway of its network"
    same_family = [one for one in answer["gateways"] if (":" in one) == (":" in mapping["container_address"])]
    return f"the gateway, {(same_family or answer['gateways'])[0]}"
