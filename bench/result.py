"""What came out of a row: medians, ratios, and whether it holds.

What this file knows: figures and bounds.  What it must not know: where the figures come from, how they are shown.

The ratio of a row is the median of its rounds' ratios, and not the ratio of the medians: what slows the machine down
for the time of a round slows both contenders, and their ratio stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

from bench.rows import SUBJECT, Row


class Verdict(Enum):
    """What is said of a row; the value is how the table says it."""

    AIM = "reaches the aim"
    HOLDS = "holds"
    SHORT = "falls short"
    MISSING = "not measured"


@dataclass
class RowResult:
    """A row's figures.  A round maps a contender's name to its figure; `failures` to why it has none."""

    row: Row
    rounds: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def median(self, contender: str) -> float | None:
        """A contender's median over the rounds that it got through."""
        figures = [figures[contender] for figures in self.rounds if contender in figures]
        return median(figures) if figures else None

    def ratios(self, of: str = SUBJECT, to: str = "") -> list[float]:
        """gangway to what it is compared with, or of another pair, for each round that both got through."""
        return list(self._ratios(of, to or self.row.reference))

    def ratio(self, of: str = SUBJECT, to: str = "") -> float | None:
        ratios = self.ratios(of, to)
        return median(ratios) if ratios else None

    def worst(self) -> float | None:
        ratios = self.ratios()
        return self.row.worst(ratios) if ratios else None

    def verdict(self) -> Verdict:
        """A failure of gangway's in any round is a bound missed: its good rounds do not make up for it."""
        if SUBJECT in self.failures:
            return Verdict.SHORT
        ratio = self.ratio()
        if ratio is None:
            return Verdict.MISSING
        if self.row.reaches(ratio, self.row.aim):
            return Verdict.AIM
        return Verdict.HOLDS if self.row.reaches(ratio, self.row.at_least) else Verdict.SHORT

    def _ratios(self, of: str, to: str) -> Iterator[float]:
        for figures in self.rounds:
            if of in figures and figures.get(to):
                yield figures[of] / figures[to]
