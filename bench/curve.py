"""The cost of publishing many ports at once, by their number: the points of a curve."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

GANGWAY, DOCKERD = "gangway", "dockerd"
FRONT, STOCK = "dockerd with gangway", "dockerd as it comes"


class Cost(NamedTuple):
    """The seconds to publish and to unpublish some ports, and the memory of the machine that they take."""

    publish_s: float
    unpublish_s: float
    memory_bytes: float


def median_cost(costs: Iterable[Cost]) -> Cost:
    """Return the medians of the seconds and of the memory."""
    return Cost(*map(median, zip(*costs, strict=True)))


@dataclass
class Curve:
    """Costs by program and number of ports. A point without costs was tried, and failed."""

    _points: dict[tuple[str, int], list[Cost]] = field(default_factory=dict)

    def add(self, program: str, ports: int, cost: Cost | None) -> None:
        """Add a measurement; None: it failed."""
        self._points.setdefault((program, ports), []).extend([] if cost is None else [cost])

    def only(self, *programs: str) -> "Curve":
        """Return the points of some programs."""
        return Curve({key: costs for key, costs in self._points.items() if key[0] in programs})

    def programs(self) -> list[str]:
        """Return the programs that were measured."""
        return list(dict.fromkeys(program for program, _ in self._points))

    def counts(self) -> list[int]:
        """Return the numbers of ports that were tried, in ascending order."""
        return sorted({ports for _, ports in self._points})

    def has(self, program: str, ports: int) -> bool:
        """True if this program was tried with this number of ports."""
        return (program, ports) in self._points

    def cost(self, program: str, ports: int) -> Cost | None:
        """Return the medians; None if there is no measurement."""
        found = self._points.get((program, ports), ())
        return median_cost(found) if found else None

    def line(self, program: str) -> list[tuple[int, Cost]]:
        """Return the points of one program, in ascending order of the number of ports."""
        found = ((ports, self.cost(program, ports)) for ports in self.counts())
        return [(ports, cost) for ports, cost in found if cost is not None]
