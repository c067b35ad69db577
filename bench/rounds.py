"""Who has a turn when, and what becomes of its figure.

What this file knows: rounds and their order.  What it must not know: what a measure does.

How it works.  A round takes every row once, so that a bad minute of the machine spoils one round of some rows and not
all rounds of one.  In each row the two that are compared stay neighbours, in turns the one and the other first; the
others come before or after them, another one first each time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import NamedTuple, Self

from bench.contenders import Contender
from bench.database import Database, database
from bench.errors import CannotCarry
from bench.measures import MEASURES, Turn
from bench.rows import REFERENCE, SUBJECT, Row
from bench.stage import staged
from bench.tally import Tally
from bench.traffic import Load

OTHERS_ROUNDS = 3  # socat, haproxy and direct are there for orientation: their medians need no more


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    rounds: int
    seconds: float
    quick: bool


class Slot(NamedTuple):
    """One turn to come."""

    round: int
    row: Row
    contender: str


def schedule(rows: Sequence[Row], rounds: int) -> list[Slot]:
    """All turns, in their order."""
    return [
        Slot(number, row, contender)
        for number in range(rounds)
        for row in rows
        if row.most_rounds is None or number < row.most_rounds
        for contender in _order(row, number)
    ]


class Runner:
    """Runs turns.  What several of them need is made when the first of them needs it, and gone with the block."""

    def __init__(self, contenders: dict[str, Contender], load: Load, settings: Settings) -> None:
        self._contenders = contenders
        self._load = load
        self._settings = settings
        self._stack = ExitStack()
        self._database: Callable[[], Database] = cache(lambda: self._stack.enter_context(database()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, rows: Sequence[Row], say: Callable[[str], None]) -> list[Tally]:
        """Takes all turns, and says after each one what came out."""
        tallies = {row.key: Tally(row) for row in rows}
        slots = schedule(rows, self._settings.rounds)
        for number, slot in enumerate(slots, 1):
            outcome = self._take(slot, tallies[slot.row.key])
            say(f"{number:4}/{len(slots)}  round {slot.round + 1}  {slot.row.key:<13}  {slot.contender:<12}  {outcome}")
        return list(tallies.values())

    def _take(self, slot: Slot, tally: Tally) -> str:
        if len(tally.rounds) <= slot.round:
            tally.rounds.append({})
        try:
            figure = self._measure(slot)
        except CannotCarry as error:
            tally.failures.setdefault(slot.contender, []).append(str(error))
            return f"fails: {error}"
        tally.rounds[slot.round][slot.contender] = figure
        return slot.row.shown(figure)

    def _measure(self, slot: Slot) -> float:
        with staged(self._contenders[slot.contender]) as stage:
            turn = Turn(stage, self._load, self._database, self._settings.seconds, self._settings.quick)
            return MEASURES[slot.row.key](turn)


def _order(row: Row, number: int) -> Iterator[str]:
    pair = [SUBJECT, REFERENCE][:: -1 if number % 2 else 1]
    others = [name for name in row.contenders if name not in pair]
    if others and number < OTHERS_ROUNDS:
        first = number % len(others)
        others = others[first:] + others[:first]
    else:
        others = []
    yield from (*others, *pair) if number % 2 else (*pair, *others)
