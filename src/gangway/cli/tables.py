"""What a person reads: tables, and sentences for reasons.

What this file knows: the daemon's answers, and how they are told.  What it must not know: how they are had.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gangway.cli.quick import line
from gangway.plan import Code, Origin, SeenAs

Answer = dict[str, Any]

_REASONS = {
    Code.TRANSLATED: "A rule translates the destination to {fact}; the kernel does the rest.",
    Code.MASQUERADED: "A rule translates the destination to {fact}, and another the source to the gateway's address: "
    "the container would answer a neighbour directly, from an address that was not asked.",
    Code.REDIRECTED: "When a socket connects or sends, the kernel exchanges the destination for {fact}, before there "
    "is a packet; a socket that is bound to an address or a device is left to the relay.",
    Code.REDIRECTED_AS_IPV4: "When a socket connects, the kernel exchanges the destination for {fact}, before there is "
    "a packet; one that takes IPv6 only, sends without being connected, or is bound to an address or a device is left "
    "to the relay.",
    Code.NO_REDIRECT: "The kernel routes no packet of a loopback address, and sockets are not redirected: {fact}.  The "
    "relay answers.",
    Code.LOOPBACK: "The kernel routes no packet of {fact}, so a process on the host has to answer: the relay.",
    Code.LINK_LOCAL: "The kernel forwards nothing from a link-local address, and that is where who asks {fact} comes "
    "from: the relay answers.",
    Code.FAMILY: "The container's address is {fact}, of the other family, and no rule translates between the two: the "
    "relay answers.",
    Code.NO_FIREWALL: "The daemon writes no rules (--firewall none): the relay answers.",
    Code.NOT_FORWARDED: "{fact} is off and the daemon may not switch it on (--no-ip-forward): the relay answers.",
    Code.FORWARD_DROPPED: "Another program's chain drops what is forwarded ({fact}), and that is final: the relay "
    "answers.",
    Code.OWN_BRIDGE: "Docker's layout translates nothing that comes from {fact}, the container's own bridge: the relay "
    "answers.",
    Code.LOOPBACK_ONLY: "It is published on {fact} only, which nobody else can reach.",
    Code.ELSEWHERE: "It is published on {fact} only.",
    Code.ISOLATED: "The network is --no-icc and br_netfilter sees one family only, so {fact} keeps its containers "
    "apart by itself, and nothing is translated within it: the relay answers.",
    Code.NO_SOCKETS: "This kernel has no {fact} sockets, so the relay cannot answer.",
    Code.LEASE: "Docker's own rules may carry it first; what they leave, the relay answers.",
}


def print_networks(networks: Sequence[Answer]) -> None:
    """`network ls`."""
    rows = (
        (
            network["name"],
            network["bridge"],
            ", ".join(network["subnets"]),
            ", ".join(network["gateways"]),
            ", ".join(_policy(network)) or "-",
            str(len(network["endpoints"])),
        )
        for network in networks
    )
    _print_table(("NETWORK", "BRIDGE", "SUBNETS", "GATEWAYS", "POLICY", "CONTAINERS"), rows)


def print_network(network: Answer) -> None:
    """`network inspect`."""
    print_networks([network])
    if network["endpoints"]:
        print()
        rows = ((endpoint["container"], ", ".join(endpoint["addresses"])) for endpoint in network["endpoints"])
        _print_table(("CONTAINER", "ADDRESSES"), rows)


def print_mappings(mappings: Sequence[Answer]) -> None:
    """`ls`."""
    rows = (
        (mapping["container"], *line(mapping).split(" -> "), *(roads(mapping, origin) for origin in Origin))
        for mapping in mappings
    )
    _print_table(("CONTAINER", "PUBLISHED", "LEADS TO", *(origin.value.upper() for origin in Origin)), rows)


def print_checks(checks: Sequence[Answer]) -> None:
    """`doctor`."""
    _print_table(
        ("CHECK", "HOLDS", "NOTE"), ((one["check"], "yes" if one["holds"] else "no", one["note"]) for one in checks)
    )


def roads(mapping: Answer, origin: str) -> str:
    """The road of an origin; two, if it is another one from the container's own network."""
    found = dict.fromkeys(route["road"] for route in mapping["routes"] if route["origin"] == origin)
    return ", ".join(found)


def explanation(answer: Answer) -> Iterator[str]:
    """`explain`, line by line."""
    mapping = answer["mapping"]
    host = answer["host_address"]
    asked = f"[{host}]:{answer['host_port']}" if ":" in host else f"{host}:{answer['host_port']}"
    yield f"{asked}/{mapping['protocol']} is {line(mapping)}"
    yield f"container {mapping['container']}, network {answer['network']}, firewall {answer['firewall']}"
    for route in mapping["routes"]:
        yield ""
        yield f"{_who(route)}: {route['road']}"
        yield f"  {_REASONS[Code(route['code'])].format(fact=route['fact'])}"
        if route["seen_as"] != SeenAs.NOBODY:
            yield f"  The container sees {_source(route, mapping, answer)}."
        yield from (f"    {rule}" for rule in route["rules"])


def _who(route: Answer) -> str:
    if route["origin"] != Origin.CONTAINER:
        return str(route["origin"])
    return "container, of the same network" if route["neighbour"] else "container, of another network"


def _source(route: Answer, mapping: Answer, answer: Answer) -> str:
    if route["seen_as"] == SeenAs.GATEWAY:
        same = [one for one in answer["gateways"] if (":" in one) == (":" in mapping["container_address"])]
        return f"the gateway, {(same or answer['gateways'])[0]}"
    return "the host's address" if route["origin"] == Origin.HOST else "the client's own address"


def _policy(network: Answer) -> Iterator[str]:
    if network["internal"]:
        yield "internal"
    elif not network["masquerade"]:
        yield "no masquerade"
    if not network["icc"]:
        yield "no icc"
    if network["mtu"] != 1500:
        yield f"mtu {network['mtu']}"


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows as lines of equal width, one cell below the other."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Never cut: to a pipe, as wide as it is; where a terminal is too narrow, cells are folded.

    rich takes half a millisecond for a row, so it folds, and does no more.
    """
    cells = [head, *rows]
    first, *others = columns(cells)
    console = Console(highlight=False)
    if console.is_terminal and cell_len(first) > console.width:
        console.print(_folded(cells))
    else:
        console.print(Text(first, style="bold"), soft_wrap=True)
        print("".join(f"{line}\n" for line in others), end="")


def _folded(cells: Sequence[Sequence[str]]) -> Table:
    head, *rows = cells
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in head:
        table.add_column(title, overflow="fold", no_wrap=False)
    for row in rows:
        table.add_row(*map(Text, row))  # brackets are an address's, not markup
    return table
