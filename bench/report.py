"""The results as a table in Markdown, which is also what the terminal shows.

What this file knows: Markdown.  What it must not know: files, and how a figure was measured.
"""

from collections.abc import Iterable, Sequence
from itertools import count

from bench.rows import ALL, Row
from bench.tally import Tally, Verdict

_HEAD = ("127.0.0.1 → container", *ALL, "gangway / docker-proxy", "worst round", "at least", "aim", "")

_NONE = "-"
_EXPLANATION = """\
Figures are medians over the rounds; the ratio is the median of the rounds' ratios. Of times, CPU time and memory less
is better, and the bounds are what they may be at most. `direct` is a client of the container's own address.
socat, haproxy and direct have three rounds at most, connections for 30 s two, docker three."""


def document(tallies: Sequence[Tally], facts: Iterable[tuple[str, str]]) -> str:
    """The whole of RESULTS.md."""
    parts = [
        "# Results of `make bench`",
        summary(tallies),
        table(tallies),
        _EXPLANATION,
        "![ratios to docker-proxy](results.png)",
        "\n".join(f"- {name}: {value}" for name, value in facts),
    ]
    return "\n\n".join(parts) + "\n"


def summary(tallies: Iterable[Tally]) -> str:
    """One line: how many rows ended how, and which."""
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for tally in tallies:
        by_verdict[tally.verdict()].append(tally.row.key)
    parts = [f"{verdict.value}: {len(keys)} ({', '.join(keys)})" for verdict, keys in by_verdict.items() if keys]
    return f"{'; '.join(parts)}."


def table(tallies: Iterable[Tally]) -> str:
    """The table, and below it why a contender did not get through a row."""
    notes: list[str] = []
    lines = [_HEAD, *(_line(tally, notes) for tally in tallies)]
    footnotes = [f"({number}) {note}" for number, note in zip(count(1), notes, strict=False)]
    return "\n\n".join([_aligned(lines), *footnotes])


def _line(tally: Tally, notes: list[str]) -> tuple[str, ...]:
    row = tally.row
    figures = (_figure(tally, contender, notes) for contender in ALL)
    ratio, worst = _ratio(tally.ratio()), _ratio(tally.worst())
    bounds = _bound(row, row.at_least), _bound(row, row.aim)
    verdict = tally.verdict()
    said = f"**{verdict.value}**" if verdict is Verdict.SHORT else verdict.value
    return (row.title, *figures, ratio, worst, *bounds, said)


def _figure(tally: Tally, contender: str, notes: list[str]) -> str:
    median, failures = tally.median(contender), tally.failures.get(contender, [])
    shown = _NONE if median is None else tally.row.shown(median)
    if not failures:
        return shown
    of = len(failures) + sum(contender in figures for figures in tally.rounds)
    notes.append(f"{tally.row.key}, {contender}: {len(failures)} of {of} rounds failed: {failures[0]}")
    return f"{'fails' if median is None else shown} ({len(notes)})"


def _ratio(ratio: float | None) -> str:
    return _NONE if ratio is None else f"{ratio:.3f}" if ratio < 0.2 else f"{ratio:.2f}"


def _bound(row: Row, bound: float) -> str:
    return f"{'≤' if row.less_is_better else '≥'} {bound:g}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))
