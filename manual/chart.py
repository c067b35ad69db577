"""The benchmark's chart: the traffic that bench/RESULTS.md compares with docker-proxy, as bars.

python3 -m manual.chart         writes docs/chart.svg
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from manual import svg

_TOP = Path(__file__).resolve().parents[1]
RESULTS, CHART = _TOP / "bench/RESULTS.md", _TOP / "docs/chart.svg"
RATIO, _BOUND = "gangway / docker-proxy", "at least"
_LONGEST = 4.5
"""The ratio at which a bar is cut off."""
_WIDTH, _ROW, _HEAD, _LEFT, _RIGHT = 860, 22, 34, 330, 70
_COLOUR, _CUT = "#1b6e5a", "#ffffff"


class Bar(NamedTuple):
    """A row of a table: what was measured, and how many times docker-proxy's rate gangway reaches."""

    what: str
    ratio: float


class Group(NamedTuple):
    """A table: its heading, and who connects to what."""

    heading: str
    traffic: str
    bars: tuple[Bar, ...]


def groups(results: str) -> list[Group]:
    """Return every table of rates that are compared with docker-proxy's; its rows of times and memory are left out."""
    found = []
    for heading, section in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", results, re.MULTILINE):
        rows = [
            [cell.strip() for cell in line.strip("| ").split("|")]
            for line in re.findall(r"^\|.*", section, re.MULTILINE)
        ]
        if rows and {RATIO, _BOUND} <= set(rows[0]):
            found.append(Group(heading, rows[0][0], tuple(_bars(rows))))
    return found


def draw(results: str) -> str:
    """Return the chart of the results in this text.  ValueError: it has none."""
    found = groups(results)
    if not found:
        raise ValueError(f"no table with the column {RATIO!r}")
    height = 48 + sum(_HEAD + _ROW * len(group.bars) for group in found) + 14
    scale = (_WIDTH - _LEFT - _RIGHT) / _LONGEST
    parts = [svg.text(22, 30, "gangway's rate, docker-proxy's = 1 (more is better)", size=15, bold=True)]
    parts += [
        svg.box(_LEFT + scale * tick, 44, 1, height - 62, "#e3e6e9", radius=0) for tick in range(1, int(_LONGEST) + 1)
    ]
    y = 48.0
    for group in found:
        parts.append(svg.text(22, y + 22, f"{group.heading}: {group.traffic}", colour=svg.FAINT))
        y += _HEAD
        for bar in group.bars:
            length = scale * min(bar.ratio, _LONGEST)
            parts.append(svg.text(_LEFT - 10, y + 13, bar.what, size=12, anchor="end"))
            parts.append(svg.box(_LEFT, y + 3, length, _ROW - 8, _COLOUR, radius=2))
            if bar.ratio > _LONGEST:
                parts.append(svg.box(_LEFT + length - 14, y + 1, 4, _ROW - 4, _CUT, radius=0))
            parts.append(svg.text(_LEFT + length + 8, y + 13, f"{bar.ratio:.2f}", size=12, bold=True))
            y += _ROW
    parts.append(svg.box(_LEFT + scale, 44, 1.5, height - 62, svg.INK, radius=0))
    return svg.page(_WIDTH, height, "gangway's rate in relation to docker-proxy's", parts)


def _bars(rows: list[list[str]]) -> Iterator[Bar]:
    ratio, bound = rows[0].index(RATIO), rows[0].index(_BOUND)
    for row in rows[2:]:
        if "≥" in row[bound] and re.match(r"[\d.]+", row[ratio]):
            yield Bar(row[0].partition(" (")[0], float(row[ratio].split()[0]))


if __name__ == "__main__":
    CHART.write_text(draw(RESULTS.read_text()))
