"""The results as tables in Markdown, which the terminal shows, too."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, groupby

from bench.curve import DOCKERD, FRONT, GANGWAY, STOCK, Cost, Curve
from bench.result import RowResult, Verdict
from bench.rows import SUBJECT, Row, megabytes, seconds, times

_NONE = "-"
_EXPLANATION = """\
Figures are medians over the rounds; the ratio is the median of the ratios of each round. For times, CPU time and memory
less is better, and the bounds are upper limits."""


_COLUMNS: tuple[tuple[str, Callable[[Cost], str]], ...] = (
    ("publish", lambda cost: seconds(cost.publish_s)),
    ("unpublish", lambda cost: seconds(cost.unpublish_s)),
    ("memory", lambda cost: megabytes(cost.memory_bytes)),
)
_DOCKER_CURVE = """\
## Under dockerd, by the number of ports

{table}

All ports are TCP ports of one container. The times are those of the docker command until the last port answers, or is
refused, and include the container's own.

![cost under dockerd by the number of ports](docker.png)"""
_CURVE = """\
## By the number of ports

{table}

All ports are TCP ports. The times are those of the whole command. The memory is the decrease of the machine's
available memory (MemAvailable); it includes what a program takes for its first port and, with dockerd, the container.

![cost by the number of ports](scale.png)"""


@dataclass(frozen=True)
class Document:
    """A file with the results of one run, and the picture of its ratios."""

    name: str
    picture: str
    command: str
    other_run: str
    """What is measured in the run that this one does not include."""


RESULTS = Document(
    "RESULTS.md",
    "results.png",
    "make bench",
    """\
What takes containers with many ports is measured in a run of its own, `make bench-docker`: [DOCKER.md](DOCKER.md).""",
)
DOCKER = Document(
    "DOCKER.md",
    "docker-ratios.png",
    "make bench-docker",
    "All other rows are in [RESULTS.md](RESULTS.md) (`make bench`).",
)


def document(
    results: Sequence[RowResult], facts: Iterable[tuple[str, str]], curve: Curve, of_run: Document = RESULTS
) -> str:
    """Return the text of the file with the results of a run."""
    ports, docker = curve.only(GANGWAY, DOCKERD), curve.only(FRONT, STOCK)
    parts = [
        f"# Results of `{of_run.command}`",
        summary(results),
        f"{_EXPLANATION}\n{of_run.other_run}",
        *(f"## {of[0].row.chapter.title}\n\n{_table(of)}\n\n{of[0].row.chapter.note}" for of in _by_chapter(results)),
        *([_CURVE.format(table=_points(ports))] if ports.counts() else []),
        *([_DOCKER_CURVE.format(table=_points(docker))] if docker.counts() else []),
        f"![the ratios]({of_run.picture})",
        "\n".join(f"- {name}: {value}" for name, value in facts),
    ]
    return "\n\n".join(parts) + "\n"


def summary(results: Iterable[RowResult]) -> str:
    """Return one line: for each verdict the number of rows, and which."""
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for result in results:
        by_verdict[result.verdict()].append(result.row.key)
    parts = [f"{verdict.value}: {len(keys)} ({', '.join(keys)})" for verdict, keys in by_verdict.items() if keys]
    return f"{'; '.join(parts)}."


def tables(results: Iterable[RowResult], curve: Curve) -> str:
    """Return all tables."""
    curves = curve.only(GANGWAY, DOCKERD), curve.only(FRONT, STOCK)
    return "\n\n".join([*map(_table, _by_chapter(results)), *(_points(one) for one in curves if one.counts())])


def _points(curve: Curve) -> str:
    """Return the curve as a table."""
    programs = curve.programs()
    head = ("ports", *(f"{program}: {title}" for program in programs for title, _ in _COLUMNS))
    lines = [
        (f"{ports:,}", *(cell for program in programs for cell in _costs(curve, program, ports)))
        for ports in curve.counts()
    ]
    return _aligned([head, *lines])


def _costs(curve: Curve, program: str, ports: int) -> list[str]:
    cost = curve.cost(program, ports)
    if cost is None:
        return ["failed" if curve.has(program, ports) else _NONE] * len(_COLUMNS)
    return [format_as(cost) for _, format_as in _COLUMNS]


def _by_chapter(results: Iterable[RowResult]) -> list[list[RowResult]]:
    return [list(found) for _, found in groupby(results, lambda result: result.row.chapter)]


def _table(results: Sequence[RowResult]) -> str:
    """Return a chapter's table, with a note below it for each contender that failed in a row."""
    notes: list[str] = []
    references = {result.row.reference for result in results}
    also = list(dict.fromkeys(result.row.also_compared_with for result in results if result.row.also_compared_with))
    compared_names = {SUBJECT, *references}
    others = dict.fromkeys(name for result in results for name in result.row.contenders if name not in compared_names)
    compared, ratio = "compared with", "ratio"
    if len(references) == 1:
        compared = references.pop()
        ratio = f"{SUBJECT} / {compared}"
    bound = "at most" if all(result.row.less_is_better for result in results) else "at least"
    ratios = (ratio, "worst round", bound, "aim", "")
    head = (
        results[0].row.chapter.direction,
        SUBJECT,
        compared,
        *others,
        *(f"{SUBJECT} / {name}" for name in also),
        *ratios,
    )
    lines = [head, *(_line(result, others, also, bool(references), notes) for result in results)]
    footnotes = [f"({number}) {note}" for number, note in zip(count(1), notes, strict=False)]
    return "\n\n".join([_aligned(lines), *footnotes])


def _line(
    result: RowResult, others: Iterable[str], also: Iterable[str], names_reference: bool, notes: list[str]
) -> tuple[str, ...]:
    """Return a row of the table; with `names_reference` it names what gangway is compared with."""
    row = result.row
    figure, reference = (_figure(result, name, notes) for name in (SUBJECT, row.reference))
    compared = f"{reference} ({row.reference})" if names_reference else reference
    figures = (figure, compared, *(_figure(result, name, notes) for name in others))
    other_ratios = (_other_ratio(result, name) for name in also)
    ratio, worst = _ratio(result.ratio()), _ratio(result.worst())
    bounds = _bound(row, row.bound), _bound(row, row.aim)
    verdict = result.verdict()
    shown_verdict = f"**{verdict.value}**" if verdict is Verdict.SHORT else verdict.value
    return (row.title, *figures, *other_ratios, ratio, worst, *bounds, shown_verdict)


def _figure(result: RowResult, contender: str, notes: list[str]) -> str:
    median, failures = result.median(contender), result.failures.get(contender, [])
    shown = _NONE if median is None else result.row.format_as(median)
    if not failures:
        return shown
    of = len(failures) + sum(contender in figures for figures in result.rounds)
    notes.append(f"{result.row.key}, {contender}: {len(failures)} of {of} rounds failed: {failures[0]}")
    return f"{'failed' if median is None else shown} ({len(notes)})"


def _ratio(ratio: float | None) -> str:
    return _NONE if ratio is None else times(ratio)


def _other_ratio(result: RowResult, contender: str) -> str:
    """Return the ratio to a contender that is not the reference, with its limit if it has one."""
    ratio, row = _ratio(result.ratio(to=contender)), result.row
    if row.also_bound is None or contender != row.also_compared_with:
        return ratio
    return f"{ratio} ({_bound(row, row.also_bound)})"


def _bound(row: Row, bound: float) -> str:
    return f"{'≤' if row.less_is_better else '≥'} {bound:g}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))
