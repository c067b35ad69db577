"""The order of the turns, and what happens with their figures.

A round measures every row once, so that a minute in which the machine is slow affects one round of some rows instead of
all rounds of one. Within a row the contenders that are compared have consecutive turns, in alternating order; the
others, which are for orientation only, have turns in the first round. A measurement that compares two things by
itself has one turn for both, and one that measures several rows has one turn for all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, Self

from bench.chapters import Chapter
from bench.curve import Curve
from bench.database import Database, database
from bench.errors import CannotCarry
from bench.measures import MEASURES, PAIRS, SHARED
from bench.result import RowResult
from bench.rows import SUBJECT, Row
from bench.setup import Contender
from bench.traffic import Load
from bench.turn import Outcome, Turn


@dataclass(frozen=True)
class Settings:
    """How many rounds are measured, and for how long."""

    rounds: int
    seconds: float
    quick: bool


class Slot(NamedTuple):
    """One turn of the schedule."""

    round: int
    row: Row
    contender: str


def schedule(rows: Sequence[Row], rounds: int) -> list[Slot]:
    """Return all turns, in order."""
    return [
        Slot(number, row, contender)
        for number in range(rounds)
        for row in rows
        if row.max_rounds is None or number < row.max_rounds
        for contender in _order(row, number)
    ]


class Runner:
    """Runs the turns. What several of them use is created on first use, and deleted after the block."""

    def __init__(self, contenders: Mapping[Chapter, Mapping[str, Contender]], load: Load, settings: Settings) -> None:
        self._contenders = contenders
        self._load = load
        self._settings = settings
        self.curve = Curve()
        self._shared: dict[Any, dict[str, Outcome]] = {}
        self._stack = ExitStack()
        self._database: Callable[[], Database] = cache(lambda: self._stack.enter_context(database()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, rows: Sequence[Row], say: Callable[[str], None]) -> list[RowResult]:
        """Run all turns, and report the figure of each with `say`."""
        results = {row.key: RowResult(row) for row in rows}
        slots = schedule(rows, self._settings.rounds)
        for number, slot in enumerate(slots, 1):
            outcome = self._take(slot, results[slot.row.key])
            say(f"{number:4}/{len(slots)}  round {slot.round + 1}  {slot.row.key:<15}  {slot.contender:<12}  {outcome}")
        return list(results.values())

    def _take(self, slot: Slot, result: RowResult) -> str:
        if len(result.rounds) <= slot.round:
            result.rounds.append({})
        try:
            figures = self._measure(slot)
        except CannotCarry as error:
            result.failures.setdefault(slot.contender, []).append(str(error))
            return f"failed: {error}"
        result.rounds[slot.round] |= figures
        return ", ".join(slot.row.format_as(figure) for figure in figures.values())

    def _measure(self, slot: Slot) -> dict[str, float]:
        """Run a turn, and return its figures, by contender."""
        row = slot.row
        if row.key in SHARED:
            outcome = self._figures(slot)[row.key]
            if isinstance(outcome, CannotCarry):
                raise outcome
            return dict(zip((slot.contender, row.reference), outcome, strict=False))
        with self._turn(slot) as turn:
            if row.key in PAIRS and slot.contender == SUBJECT:
                return dict(zip((SUBJECT, row.reference), PAIRS[row.key](turn), strict=True))
            return {slot.contender: MEASURES[row.key](turn)}

    def _figures(self, slot: Slot) -> dict[str, Outcome]:
        """Return the figures of all rows with this measurement, which runs once in each round."""
        measure = SHARED[slot.row.key]
        key = slot.round, slot.contender, measure
        if key not in self._shared:
            try:
                with self._turn(slot) as turn:
                    self._shared[key] = measure(turn)
            except CannotCarry as error:
                self._shared[key] = {row: error for row, other in SHARED.items() if other is measure}
        return self._shared[key]

    @contextmanager
    def _turn(self, slot: Slot) -> Iterator[Turn]:
        contenders, settings = self._contenders[slot.row.chapter], self._settings
        name = slot.row.road if slot.row.road and slot.contender == SUBJECT else slot.contender
        with contenders[name].set_up() as setup:
            yield Turn(setup, self._load, self._database, self.curve, settings.seconds, settings.quick)


def _order(row: Row, number: int) -> Iterator[str]:
    """Yield a row's contenders in a round: those that are compared, and in the first round the others."""
    compared = [name for name in (SUBJECT, row.reference, row.also_compared_with) if name in row.contenders]
    yield from compared[:: -1 if number % 2 else 1]
    if number == 0:
        yield from (name for name in row.contenders if name not in compared)
