"""What `gangway ls`, `network` and `doctor` print: tables."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gangway.cli.lines import published, target
from gangway.plan import Origin

Answer = dict[str, Any]


def print_networks(networks: Sequence[Answer]) -> None:
    """Print the table of `network ls`."""
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
    """Print the table of `network inspect`."""
    print_networks([network])
    if network["endpoints"]:
        print()
        rows = ((endpoint["container"], ", ".join(endpoint["addresses"])) for endpoint in network["endpoints"])
        _print_table(("CONTAINER", "ADDRESSES"), rows)


def print_mappings(mappings: Sequence[Answer]) -> None:
    """Print the table of `ls`."""
    rows = (
        (
            mapping["container"] or "-",
            mapping["source"],
            published(mapping),
            target(mapping),
            *(roads(mapping, origin) for origin in Origin),
        )
        for mapping in mappings
    )
    _print_table(("CONTAINER", "SOURCE", "PUBLISHED", "TARGET", *(origin.value.upper() for origin in Origin)), rows)


def print_checks(checks: Sequence[Answer]) -> None:
    """Print the table of `doctor`."""
    _print_table(
        ("CHECK", "HOLDS", "NOTE"), ((one["check"], "yes" if one["holds"] else "no", one["note"]) for one in checks)
    )


def roads(mapping: Answer, origin: str) -> str:
    """Return the road of an origin's clients; both, if those on the container's own network take another one."""
    found = dict.fromkeys(route["road"] for route in mapping["routes"] if route["origin"] == origin)
    return ", ".join(found)


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
    """Yield rows as lines, with each column as wide as its widest cell."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows as wide as they are; fold cells if the terminal is narrower.  Nothing is ever cut off.

    rich needs half a millisecond for a row, so it only prints the head and folds.
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
