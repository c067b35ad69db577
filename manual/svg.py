"""The few forms that both pictures consist of."""

from collections.abc import Iterable
from html import escape

INK, FAINT, PAPER = "#22282e", "#69737c", "#ffffff"
_PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" \
font-family="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="13" fill="{ink}">
<title>{title}</title>
<rect width="{width}" height="{height}" rx="6" fill="{paper}"/>
{parts}
</svg>
"""


def page(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return a picture; the title is read out in its place."""
    return _PAGE.format(width=width, height=height, title=escape(title), parts="\n".join(parts), ink=INK, paper=PAPER)


def text(
    x: float, y: float, words: str, *, colour: str = INK, size: int = 13, anchor: str = "start", bold: bool = False
) -> str:
    """Return a line of text whose base line begins (or ends, by `anchor`) at a point."""
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}'
    return f"<text {place}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: int = 6) -> str:
    """Return a rectangle with round corners."""
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}"'
    return f'<rect {size} fill="{fill}" stroke="{stroke}"/>'


def curve(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 2) -> str:
    """Return a line from left to right that leaves and arrives horizontally."""
    middle = (x1 + x2) / 2
    path = f"M{x1:g},{y1:g} C{middle:g},{y1:g} {middle:g},{y2:g} {x2:g},{y2:g}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>'
