"""What many ports at once cost, as a picture: a panel for each kind of cost, over the number of ports.

What this file knows: matplotlib.  What it must not know: anything that is not in the curve.

How it works.  Both scales are logarithmic: what grows with the number of ports is a slope, what does not is level.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.curve import DOCKERD, DROP_IN, GANGWAY, Cost, Curve

_INK, _GRID = "#22282e", "#e3e6e9"
_STYLES = {  # colour, marker, line
    GANGWAY: ("#1b6e5a", "o", "-"),
    DOCKERD: ("#c8553d", "s", "-"),
    DROP_IN: ("#6fb49f", "D", ""),
}
_MB = 1e6
_PANELS: tuple[tuple[str, Callable[[Cost], float], str], ...] = (
    ("to publish", lambda cost: cost.publish_s, "s"),
    ("to withdraw", lambda cost: cost.withdraw_s, "s"),
    ("less free memory", lambda cost: cost.memory_bytes / _MB, "MB"),
)


def draw(curve: Curve, path: Path, subtitle: str) -> None:
    """Writes the picture as a PNG."""
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(11, 4.6), layout="constrained")
    for axis, (title, cost, unit) in zip(axes, _PANELS, strict=True):
        _frame(axis, title, unit)
        for who in curve.names():
            _line(axis, who, [(ports, cost(costs)) for ports, costs in curve.line(who)])
    figure.suptitle(f"many tcp ports at once, by their number\n{subtitle}", color=_INK, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def _frame(axis: Any, title: str, unit: str) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.7, 140_000)
    axis.margins(y=0.12)
    axis.xaxis.set_major_locator(LogLocator(10, numticks=6))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_locator(NullLocator())
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value >= 1 else f"{value:g}"))
    axis.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axis.set_title(f"{title}, {unit}", loc="left", fontsize=10, color=_INK)
    axis.set_axisbelow(True)
    axis.grid(color=_GRID)
    axis.spines[:].set_visible(False)


def _line(axis: Any, who: str, points: list[tuple[int, float]]) -> None:
    """The line, and the figure beside its last point.  What is not above zero has no place on the scale: it is what
    the machine's memory does by itself."""
    colour, marker, line = _STYLES[who]
    shown = [(ports, cost) for ports, cost in points if cost > 0]
    axis.plot(*(zip(*shown, strict=True) if shown else ((), ())), line, color=colour, marker=marker, label=who)
    if shown:
        ports, cost = shown[-1]
        figure = f"{cost:,.0f}" if cost >= 10 else f"{cost:.2g}"
        axis.annotate(figure, (ports, cost), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour)
