"""Ranges of ports that do not overlap, each with a value: which one has a port?

What this file knows: numbers and their order.  What it must not know: what a value is.

A range costs the same whatever its length, and looking one up takes as many steps as their number has digits.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Intervals(Generic[_Value]):
    """The ranges, ordered by their first port."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self._values: list[_Value] = []

    def __len__(self) -> int:
        return len(self._firsts)

    def add(self, first: int, last: int, value: _Value) -> None:
        """One more, which overlaps none."""
        place = bisect_left(self._firsts, first)
        self._firsts.insert(place, first)
        self._lasts.insert(place, last)
        self._values.insert(place, value)

    def remove(self, first: int) -> None:
        """The one that begins with this port.  KeyError: there is none."""
        place = bisect_left(self._firsts, first)
        if place == len(self._firsts) or self._firsts[place] != first:
            raise KeyError(first)
        del self._firsts[place], self._lasts[place], self._values[place]

    def at(self, port: int) -> _Value | None:
        """The value of the range that a port is in."""
        place = bisect_right(self._firsts, port) - 1
        return self._values[place] if place >= 0 and port <= self._lasts[place] else None

    def overlapping(self, first: int, last: int) -> Iterator[_Value]:
        """The values of all that have a port from `first` to `last`."""
        place = max(bisect_right(self._firsts, first) - 1, 0)
        while place < len(self._firsts) and self._firsts[place] <= last:
            if self._lasts[place] >= first:
                yield self._values[place]
            place += 1
