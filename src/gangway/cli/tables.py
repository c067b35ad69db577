"""Tables: plain lines in a pipe; on a terminal a bold head, and cells folded if the terminal is narrower."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_FOLDED = 2000  # rows at most: rich needs half a millisecond for each


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines, with each column as wide as its widest cell, but the last one without trailing blanks."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        yield "  ".join(cells).rstrip()


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows.  Nothing is ever cut off; very many rows are left to the terminal to wrap."""
    cells = [head, *rows]
    lines = list(columns(cells))
    if sys.stdout is None or not sys.stdout.isatty():  # it is None if the command was started with it closed
        return print(*lines, sep="\n")

    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")
    if len(lines) > _FOLDED or max(map(cell_len, lines)) <= console.width:
        console.print(Text(lines[0], style="bold"), soft_wrap=True)
        return print("".join(f"{line}\n" for line in lines[1:]), end="")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in head:
        table.add_column(title, overflow="fold", no_wrap=False)
    for row in cells[1:]:
        table.add_row(*map(Text, row))  # brackets are an address's, not markup
    console.print(table)
