"""What many ports at once cost, by their number: the points of a curve.

What this file knows: points, medians.  What it must not know: how a point is measured, how it is shown.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

GANGWAY, DOCKERD, DROP_IN = "gangway", "dockerd", "dockerd, gangway's drop-in"


class Cost(NamedTuple):
    """Of some ports: the time to publish them and to withdraw them, and what they take of the machine's memory."""

    publish_s: float
    withdraw_s: float
    memory_bytes: float


@dataclass
class Curve:
    """Costs, by who published and how many ports.  One for which there is none could not be paid."""

    _points: dict[tuple[str, int], list[Cost]] = field(default_factory=dict)

    def add(self, who: str, ports: int, cost: Cost | None) -> None:
        """One more measurement; None: it failed."""
        self._points.setdefault((who, ports), []).extend([] if cost is None else [cost])

    def names(self) -> list[str]:
        """Who has published."""
        return list(dict.fromkeys(who for who, _ in self._points))

    def counts(self) -> list[int]:
        """How many ports somebody has published, or has tried to."""
        return sorted({ports for _, ports in self._points})

    def has(self, who: str, ports: int) -> bool:
        """Whether it was tried."""
        return (who, ports) in self._points

    def cost(self, who: str, ports: int) -> Cost | None:
        """The medians."""
        found = self._points.get((who, ports), ())
        return Cost(*map(median, zip(*found, strict=True))) if found else None

    def line(self, who: str) -> list[tuple[int, Cost]]:
        """All points of one, with more and more ports."""
        found = ((ports, self.cost(who, ports)) for ports in self.counts())
        return [(ports, cost) for ports, cost in found if cost is not None]
