"""The result of a row: medians, ratios, and whether its bound holds.

The ratio of a row is the median of its rounds' ratios, not the ratio of the medians: what slows the machine down during
a round slows both contenders, and their ratio stays the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

from bench.rows import SUBJECT, Row


class Verdict(Enum):
    """Whether a row holds; the value is the text in the table."""

    AIM = "reaches the aim"
    HOLDS = "holds"
    SHORT = "falls short"
    MISSING = "not measured"


@dataclass
class RowResult:
    """A row's figures. A round maps a contender's name to its figure; `failures` maps it to the errors."""

    row: Row
    rounds: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def median(self, contender: str) -> float | None:
        """Return a contender's median over the rounds in which it did not fail."""
        figures = [figures[contender] for figures in self.rounds if contender in figures]
        return median(figures) if figures else None

    def ratios(self, of: str = SUBJECT, to: str = "") -> list[float]:
        """Return the ratio of each round in which neither failed: gangway to its reference, or of another pair."""
        return list(self._ratios(of, to or self.row.reference))

    def ratio(self, of: str = SUBJECT, to: str = "") -> float | None:
        ratios = self.ratios(of, to)
        return median(ratios) if ratios else None

    def worst(self) -> float | None:
        ratios = self.ratios()
        return self.row.worst(ratios) if ratios else None

    def verdict(self) -> Verdict:
        """Return the verdict. If gangway failed in any round, the row falls short, whatever its other rounds."""
        if SUBJECT in self.failures or not self.keeps_other_bound():
            return Verdict.SHORT
        ratio = self.ratio()
        if ratio is None:
            return Verdict.MISSING
        if self.row.reaches(ratio, self.row.aim):
            return Verdict.AIM
        return Verdict.HOLDS if self.row.reaches(ratio, self.row.bound) else Verdict.SHORT

    def keeps_other_bound(self) -> bool:
        """False if the ratio to the contender that gangway is also compared with is worse than the limit for it."""
        ratio, bound = self.ratio(to=self.row.also_compared_with), self.row.also_bound
        return ratio is None or bound is None or self.row.reaches(ratio, bound)

    def _ratios(self, of: str, to: str) -> Iterator[float]:
        for figures in self.rounds:
            if of in figures and figures.get(to):
                yield figures[of] / figures[to]
