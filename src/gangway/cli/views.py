"""What commands print: lines, tables of checks, and the sentences of `explain`.

Every command imports this module, so it imports almost nothing: rich alone takes longer than the daemon's answer.
"""

from __future__ import annotations

import sys

from gangway.cli.tables import print_table
from gangway.inet import format_host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    Answer = dict[str, Any]

ORIGINS = "loopback", "host", "remote", "container"
_REASONS = {
    "translated": "A rule translates the destination to {fact}; the kernel does the rest.",
    "masqueraded": "A rule translates the destination to {fact}, and another one the source to the gateway's address: "
    "otherwise the container would answer its neighbour directly, from an address that the neighbour did not connect "
    "to.",
    "redirected": "When a socket connects or sends, the kernel replaces the destination with {fact}, before there is a "
    "packet.  Sockets that are bound to an address or a device are left to the relay.",
    "redirected_as_ipv4": "When a socket connects, the kernel replaces the destination with {fact}, before there is a "
    "packet.  Sockets that are IPv6 only, send without being connected, or are bound to an address or a device are "
    "left to the relay.",
    "no_redirect": "The kernel does not route packets of loopback addresses, and sockets cannot be redirected: "
    "{fact}.  The relay answers.",
    "loopback": "The kernel does not route packets of {fact}, so a process on the host has to answer: the relay.",
    "link_local": "The kernel does not forward packets from link-local addresses, and clients of {fact} have one: the "
    "relay answers.",
    "family": "The container's address is {fact}, of the other family, and no rule translates between the two: the "
    "relay answers.",
    "no_firewall": "The daemon writes no rules (--firewall none): the relay answers.",
    "not_forwarded": "{fact} is off, and the daemon may not turn it on (--no-ip-forward): the relay answers.",
    "unforwardable": "{fact}: the relay answers.",
    "obey_input": "The setting `obey-input` lets the host's chain INPUT decide, which sees no translated packets: the "
    "relay answers.",
    "not_forwarded_from": "{fact} is off, so the kernel forwards nothing that comes in there: the relay answers.",
    "source_routed": "A policy rule ({fact}) routes what the host sends from its address; a translated packet would "
    "take another way: the relay answers.",
    "answer_lost": "The relay cannot answer: a policy rule ({fact}) routes what the host sends from its address, and "
    "its table does not lead to the containers.",
    "answers_elsewhere": "A rule translates the destination to {fact}, and another one the source to the gateway's "
    "address: the container's default route leads elsewhere, and its answer would be lost.",
    "own_loopback": "{fact} is the client's own loopback there; it never leads to this host.",
    "forward_dropped": "Another program's chain drops forwarded traffic ({fact}), and no rule can override that: the "
    "relay answers.",
    "own_bridge": "Docker's layout does not translate traffic from {fact}, the container's own bridge: the relay "
    "answers.",
    "loopback_only": "The port is published on the loopback address {fact} only.",
    "excluded": "The daemon's setting `exclude` leaves this address to other programs.",
    "elsewhere": "The port is published on {fact} only.",
    "isolated": "The network is --no-icc and br_netfilter handles one family only.  So the bridge {fact} itself "
    "isolates the containers, and traffic between them is not translated: the relay answers.",
    "no_sockets": "This kernel has no {fact} sockets, so the relay cannot answer.",
    "held": "dockerd has the port's socket, and the relay cannot serve the port beside it: {fact}.  Use gangway's "
    'docker-proxy instead of "userland-proxy": false.',
    "routed": "The network's gateway mode is `routed`: clients connect to the container's own address, {fact}, and "
    "nothing is translated.",
    "closed": "The container's own address is out of reach: {fact}.",
    "dockers_rules": "dockerd writes the rules for {fact}, the container's bridge, and gangway adds none: the relay "
    "answers.",
    "lease": "Docker's own rules may carry the connection first; whatever they leave is relayed.",
}
"""A sentence for each of `gangway.plan.Code`."""


def say(text: str) -> None:
    """Print a message on standard error."""
    print("gangway:", text, file=sys.stderr)


def mapping_line(mapping: Answer) -> str:
    """Return a mapping on one line: `0.0.0.0:8000 -> 172.30.0.2:80/tcp`."""
    return " -> ".join(_sides(mapping))


def print_lines(mappings: Sequence[Answer]) -> None:
    print(*map(mapping_line, mappings), sep="\n")


def print_attached(endpoint: Answer) -> None:
    """Print the addresses of a container that was attached, and a warning if there is one."""
    print(*endpoint["addresses"], sep="\n")
    if endpoint["note"]:
        print(f"gangway: container {endpoint['container']}: {endpoint['note']}", file=sys.stderr)


def print_network(network: Answer) -> None:
    """Print the tables of `network inspect`."""
    from gangway.cli.listing import NETWORKS, show

    show(NETWORKS, [network], wide=True)
    if network["endpoints"]:
        print()
        rows = ((endpoint["container"], ", ".join(endpoint["addresses"])) for endpoint in network["endpoints"])
        print_table(("CONTAINER", "ADDRESSES"), rows)


def print_checks(checks: Sequence[Answer]) -> None:
    rows = ((one["check"], "yes" if one["holds"] else "no", one["note"]) for one in checks)
    print_table(("CHECK", "HOLDS", "NOTE"), rows)


def print_settings(settings: Sequence[Answer]) -> None:
    """Print the table of `config show`."""
    import json

    rows = (
        (
            one["name"],
            json.dumps(one["value"], ensure_ascii=False),
            "; ".join(filter(None, (one["source"], one["note"]))),
        )
        for one in settings
    )
    print_table(("SETTING", "VALUE", "SOURCE"), rows)


def print_remains(remains: Sequence[tuple[str, str]]) -> None:
    """Print the table of `uninstall-check`."""
    print_table(("LEFT", "REMOVED BY"), remains)


def print_docker(report: Answer) -> None:
    print_checks(report["checks"])
    if report["advice"]:
        print("", "What to do:", *(f"  {line}" for line in report["advice"]), sep="\n")


def print_change(change: Answer) -> None:
    """Print what was done, and what has to follow."""
    print(*change["done"], sep="\n")
    if change["advice"]:
        print("", "What to do next:", *(f"  {line}" for line in change["advice"]), sep="\n")


def explanation(answer: Answer) -> Iterator[str]:
    """Yield the lines of `explain`."""
    mapping = answer["mapping"]
    at = f"{format_host(answer['host_address'])}:{answer['host_port']}"
    yield f"{at}/{mapping['protocol']} is {mapping_line(mapping)}"
    network = f"network {answer['network']}" if answer["network"] else f"source {mapping['source']}"
    yield f"container {mapping['container'] or '-'}, {network}, firewall {answer['firewall']}"
    if mapping["from"]:
        yield f"admitted clients: {', '.join(mapping['from'])}, and this host; others are dropped or reset"
    if any(mapping["relayed"].values()):
        yield f"relayed so far: {_relayed(mapping)}"
    for route in mapping["routes"]:
        near = ", of the same network" if route["neighbour"] else ", of another network"
        yield ""
        yield f"{route['origin']}{near if route['origin'] == 'container' else ''}: {route['road']}"
        yield f"  {_REASONS[route['code']].format(fact=route['fact'])}"
        if route["seen_as"] != "nobody":
            yield f"  The container sees {_seen_address(route, answer)}."
        if route["origin"] == "container" and route["code"] == "translated" and answer["further_networks"]:
            yield f"  Of clients on {', '.join(answer['further_networks'])}, which it is on, too, it sees the gateway."
        yield from (f"    {rule}" for rule in route["rules"])


_TROUBLES = {
    "failed": "not taken by the container",
    "timeouts": "not answered by the container",
    "resets": "reset or refused",
    "not_admitted": "not admitted",
    "lost": "lost for want of descriptors, watches or memory",
    "evicted": "UDP clients forgotten for others",
    "dropped": "datagrams dropped",
}


def _relayed(mapping: Answer) -> str:
    """Return what the relay has counted of a mapping, of what went wrong only what did."""
    counted = mapping["relayed"]
    what = "clients" if mapping["protocol"] == "udp" else "connections"
    sums = f"{what} {{connections}} ({{active}} now), bytes {{up_bytes}} to the container and {{down_bytes}} back"
    troubles = (f"{counted[key]} {said}" for key, said in _TROUBLES.items() if counted[key])
    return "; ".join((sums.format_map(counted), *troubles))


def _sides(mapping: Answer) -> tuple[str, str]:
    """Return the host's and the container's side of a mapping; while it waits for its container, why it does."""
    host = f"{format_host(mapping['host_address'])}:{mapping['host_ports']}"
    ports = f"{mapping['container_ports']}/{mapping['protocol']}"
    at = format_host(mapping["container_address"])
    return host, f"{at}:{ports}" if at else f"{ports} ({mapping['note']})"


def _seen_address(route: Answer, answer: Answer) -> str:
    """Return whose address the container sees as the client's."""
    if route["seen_as"] != "gateway":
        return "the host's address" if route["origin"] == "host" else "the client's own address"
    if not answer["gateways"]:
        return "the gateway of its network"
    is_ipv6 = ":" in answer["mapping"]["container_address"]
    return f"the gateway, {next((one for one in answer['gateways'] if (':' in one) == is_ipv6), answer['gateways'][0])}"
