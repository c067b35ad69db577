"""The pictures of the cost of many ports: a panel for each kind of cost, by the number of ports.

Both scales are logarithmic: a cost that grows with the number of ports is a slope, one that does not is level.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.curve import DOCKERD, FRONT, GANGWAY, STOCK, Cost, Curve

_INK, _GRID = "#22282e", "#e3e6e9"
_STYLES = {  # colour, marker, line
    GANGWAY: ("#1b6e5a", "o", "-"),
    DOCKERD: ("#c8553d", "s", "-"),
    FRONT: ("#1b6e5a", "o", "-"),
    STOCK: ("#c8553d", "s", "-"),
}
_MB = 1e6
_Panel = tuple[str, Callable[[Cost], float], str]
_PANELS: tuple[_Panel, ...] = (
    ("to publish", lambda cost: cost.publish_s, "s"),
    ("to unpublish", lambda cost: cost.unpublish_s, "s"),
    ("decrease of available memory", lambda cost: cost.memory_bytes / _MB, "MB"),
)
_DOCKER_PANELS: tuple[_Panel, ...] = (
    ("docker run -p, until the last port answers", lambda cost: cost.publish_s, "s"),
    ("docker rm -f, until it is refused", lambda cost: cost.unpublish_s, "s"),
    ("memory (PSS)", lambda cost: cost.memory_bytes / _MB, "MB"),
)


def draw(curve: Curve, path: Path, subtitle: str) -> None:
    """Write the picture of publishing with commands as a PNG."""
    _draw(curve, _PANELS, path, f"the cost of many TCP ports, by their number\n{subtitle}")


def draw_docker(curve: Curve, path: Path, subtitle: str) -> None:
    """Write the picture of a container's ports under dockerd as a PNG."""
    _draw(curve, _DOCKER_PANELS, path, f"a container under dockerd, by the number of its TCP ports\n{subtitle}")


def _draw(curve: Curve, panels: Sequence[_Panel], path: Path, title: str) -> None:
    figure, axes = pyplot.subplots(1, len(panels), figsize=(11, 4.6), layout="constrained")
    last = curve.counts()[-1]
    for axis, (name, cost, unit) in zip(axes, panels, strict=True):
        _frame(axis, name, unit, last)
        for program in curve.programs():
            _line(axis, program, [(ports, cost(costs)) for ports, costs in curve.line(program)])
    figure.suptitle(title, color=_INK, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def _frame(axis: Any, title: str, unit: str, last: int) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.7, 2 * last)
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


def _line(axis: Any, program: str, points: list[tuple[int, float]]) -> None:
    """Draw a line, and the figure at its last point.

    Costs of zero or less have no place on the scale and are left out: they are noise of the machine's memory.
    """
    colour, marker, line = _STYLES[program]
    shown = [(ports, cost) for ports, cost in points if cost > 0]
    axis.plot(*(zip(*shown, strict=True) if shown else ((), ())), line, color=colour, marker=marker, label=program)
    if shown:
        ports, cost = shown[-1]
        figure = f"{cost:,.0f}" if cost >= 10 else f"{cost:.2g}"
        axis.annotate(figure, (ports, cost), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour)
