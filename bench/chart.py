"""The picture of the ratios: for each row how much better or worse gangway is than its reference.

A chapter has up to two panels, one for figures where more is better and one where less is better. The scale is
logarithmic: twice and half are equally far from 1, and 0.02 and 15 fit into one picture.
"""

from collections.abc import Sequence
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.chapters import Chapter
from bench.result import RowResult, Verdict
from bench.rows import DOCKER_PROXY, HAPROXY, times

_COLOURS = {
    Verdict.AIM: "#1b6e5a",
    Verdict.HOLDS: "#6fb49f",
    Verdict.SHORT: "#c8553d",
    Verdict.MISSING: "#a9b0b7",
}
_INK, _GRID = "#22282e", "#e3e6e9"
# The ticks of a scale, by the ratio of its ends: the first entry whose limit is larger.
_TICKS = (
    (2.0, (0.8, 0.85, 0.9, 0.95, 1, 1.05, 1.1, 1.15, 1.2)),
    (6.0, (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 4, 5)),
    (inf, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)),
)
_FLOOR = 0.005  # ratios of zero or less are drawn as this
_ROW_INCHES = 0.36


def draw(results: Sequence[RowResult], path: Path, subtitle: str) -> None:
    """Write the picture as a PNG."""
    panels = [list(rows) for _, rows in groupby(results, _panel_key)]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(11, 1.9 + _ROW_INCHES * len(results) + 0.55 * len(panels)),
        height_ratios=[len(rows) + 0.6 for rows in panels],
        squeeze=False,
        layout="constrained",
    )
    for axis, rows in zip(axes[:, 0], panels, strict=True):
        _panel(axis, rows)
    figure.suptitle(f"gangway, with its reference = 1\n{subtitle}", color=_INK, fontsize=11)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=6, frameon=False, fontsize=9, labelcolor=_INK)
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def _panel_key(result: RowResult) -> tuple[Chapter, bool]:
    """Return what the rows of one panel have in common."""
    return result.row.chapter, result.row.less_is_better


def _title(results: Sequence[RowResult]) -> str:
    row, references = results[0].row, {result.row.reference for result in results}
    one = f" ({references.pop()} = 1)" if len(references) == 1 else ""
    return f"{row.chapter.title}{one}: {'← less is better' if row.less_is_better else 'more is better →'}"


def _panel(axis: Any, results: Sequence[RowResult]) -> None:
    _frame(axis, results)
    for place, result in enumerate(results):
        _bounds(axis, place, result)
        _bar(axis, place, result)


def _frame(axis: Any, results: Sequence[RowResult]) -> None:
    low, high = _span(results)
    ticks = next(ticks for limit, ticks in _TICKS if high / low < limit)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_yticks(range(len(results)), [result.row.title.replace("`", "") for result in results])
    axis.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axis.set_title(_title(results), loc="right", fontsize=9, color=_INK)
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=_GRID)
    axis.axvline(1, color=_INK, linewidth=1)
    axis.spines[:].set_visible(False)


def _span(results: Sequence[RowResult]) -> tuple[float, float]:
    """Return the ends of the scale: it holds all bars and marks, and has some space beside them."""
    marks = [
        mark
        for result in results
        for mark in (result.ratio(), _second_ratio(result), result.row.bound, result.row.aim)
        if mark is not None
    ]
    low, high = min([1.0, *marks]), max([1.0, *marks])
    return max(low, _FLOOR) / 1.25, high * 1.25


def _second_ratio(result: RowResult) -> float | None:
    """Return the ratio of the row's second contender to the reference."""
    return result.ratio(of=result.row.also_compared_with) if result.row.also_compared_with else None


def _bar(axis: Any, place: int, result: RowResult) -> None:
    """Draw the bar, and the ratio in a separate column, where no mark covers it."""
    ratio, verdict = result.ratio(), result.verdict()
    text = "none" if ratio is None else times(ratio)
    column = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points", "va": "center", "ha": "right"}
    colour = _COLOURS[verdict] if verdict is Verdict.SHORT else _INK
    axis.annotate(text, (1, place), (42, 0), fontsize=9, color=colour, fontweight="bold", **column)
    if ratio is not None:
        axis.barh(place, max(ratio, _FLOOR) - 1, left=1, height=0.56, color=_COLOURS[verdict])


def _bounds(axis: Any, place: int, result: RowResult) -> None:
    axis.plot([result.row.bound] * 2, [place - 0.38, place + 0.38], color=_INK, linewidth=2, zorder=3)
    second = _second_ratio(result)
    if second is not None:
        axis.plot(max(second, _FLOOR), place, "X", markersize=7, color=_INK, markeredgecolor="white", zorder=4)
    axis.plot(result.row.aim, place, "D", markersize=5.5, color="white", markeredgecolor=_INK, zorder=4)


def _legend() -> list[Patch | Line2D]:
    bars = [
        Patch(color=_COLOURS[verdict], label=verdict.value) for verdict in (Verdict.AIM, Verdict.HOLDS, Verdict.SHORT)
    ]
    bound = Line2D(
        [], [], color=_INK, linewidth=0, marker="|", markersize=11, markeredgewidth=2, label="bound (at least, at most)"
    )
    second = Line2D([], [], color=_INK, marker="X", markersize=7, markeredgecolor="white", linewidth=0)
    second.set_label(f"{HAPROXY}, or {DOCKER_PROXY} where it is not the reference")
    aim = Line2D([], [], color="white", marker="D", markersize=5.5, markeredgecolor=_INK, linewidth=0, label="aim")
    return [*bars, bound, aim, second]
