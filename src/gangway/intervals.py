"""A map from ranges of ports, which do not overlap, to values.

A range costs the same whatever its length; a lookup is a binary search over the ranges.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class Intervals(Generic[_Value]):
    """The ranges with their values, ordered by first port."""

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self._values: list[_Value] = []

    def __len__(self) -> int:
        return len(self._firsts)

    def add(self, first: int, last: int, value: _Value) -> None:
        """Add a range, which must not overlap another one."""
        index = bisect_left(self._firsts, first)
        self._firsts.insert(index, first)
        self._lasts.insert(index, last)
        self._values.insert(index, value)

    def remove(self, first: int) -> None:
        """Remove the range that begins with this port.  KeyError: there is none."""
        index = bisect_left(self._firsts, first)
        if index == len(self._firsts) or self._firsts[index] != first:
            raise KeyError(first)
        del self._firsts[index], self._lasts[index], self._values[index]

    def at(self, port: int) -> _Value | None:
        """Return the value of the range that contains `port`, or None."""
        index = bisect_right(self._firsts, port) - 1
        return self._values[index] if index >= 0 and port <= self._lasts[index] else None

    def overlapping(self, first: int, last: int) -> Iterator[_Value]:
        """Yield the values of all ranges that contain a port from `first` to `last`, in order."""
        index = max(bisect_right(self._firsts, first) - 1, 0)
        while index < len(self._firsts) and self._firsts[index] <= last:
            if self._lasts[index] >= first:
                yield self._values[index]
            index += 1
