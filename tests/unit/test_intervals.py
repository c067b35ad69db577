"""Ranges of ports, compared with a value for each port."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.intervals import Intervals

MAX = 65535
# Mostly close to each other and to the limits, where ranges touch and overlap.
PORTS = st.integers(1, 12) | st.integers(MAX - 5, MAX) | st.integers(1, MAX)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair)))


def disjoint(many: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges that overlap none before them."""
    found: list[tuple[int, int]] = []
    for first, last in many:
        if all(last < other_first or first > other_last for other_first, other_last in found):
            found.append((first, last))
    return found


DISJOINT = st.lists(RANGES, max_size=8).map(disjoint)


def intervals_of(ranges: Iterable[tuple[int, int]]) -> Intervals[str]:
    """Return intervals whose values are their own text."""
    intervals = Intervals[str]()
    for first, last in ranges:
        intervals.add(first, last, f"{first}-{last}")
    return intervals


def by_port(ranges: Iterable[tuple[int, int]]) -> dict[int, str]:
    return {port: f"{first}-{last}" for first, last in ranges for port in range(first, last + 1)}


@given(DISJOINT, PORTS)
@example([(1, 1)], 1)
@example([(1, 1)], 2)
@example([(MAX, MAX)], MAX)
@example([(MAX, MAX)], MAX - 1)
@example([(1, MAX)], MAX)
@example([(5, 6), (7, 8)], 6)
@example([(7, 8), (5, 6)], 7)
@example([(5, 6), (8, 9)], 7)
def test_at_returns_the_value_of_the_range_with_the_port(ranges: list[tuple[int, int]], port: int) -> None:
    assert intervals_of(ranges).at(port) == by_port(ranges).get(port)


@given(DISJOINT)
def test_at_respects_both_ends_of_a_range(ranges: list[tuple[int, int]]) -> None:
    intervals, expected = intervals_of(ranges), by_port(ranges)
    for first, last in ranges:
        assert intervals.at(first) == intervals.at(last) == f"{first}-{last}"
        assert (intervals.at(first - 1), intervals.at(last + 1)) == (expected.get(first - 1), expected.get(last + 1))


@given(DISJOINT, RANGES)
@example([(1, 4), (5, 9)], (4, 5))
@example([(1, 4), (6, 9)], (5, 5))
@example([(2, 4)], (1, MAX))
@example([(1, MAX)], (3, 3))
@example([(1, 1), (2, 2), (3, 3)], (2, 2))
def test_overlapping_yields_each_range_once_in_order(ranges: list[tuple[int, int]], query: tuple[int, int]) -> None:
    expected = by_port(ranges)
    found = list(intervals_of(ranges).overlapping(*query))
    assert found == list(dict.fromkeys(expected[port] for port in sorted(expected) if query[0] <= port <= query[1]))


@given(DISJOINT, st.data())
def test_remove_leaves_the_other_ranges_and_frees_the_ports(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    intervals = intervals_of(ranges)
    removed = data.draw(st.lists(st.sampled_from(ranges), unique=True)) if ranges else []
    for first, _ in removed:
        intervals.remove(first)
    left = [one for one in ranges if one not in removed]
    assert len(intervals) == len(left)
    assert bool(intervals) == bool(left)
    expected = by_port(left)
    for port in {port for one in ranges for port in one}:
        assert intervals.at(port) == expected.get(port)
    for first, last in removed:
        intervals.add(first, last, f"{first}-{last}")
    assert list(intervals.overlapping(1, MAX)) == [f"{first}-{last}" for first, last in sorted(ranges)]


@pytest.mark.parametrize("first", [1, 7, 9, 10, 11, MAX])
def test_remove_needs_the_first_port(first: int) -> None:
    intervals = intervals_of([(8, 10)])
    with pytest.raises(KeyError):
        intervals.remove(first)
    assert (len(intervals), intervals.at(9)) == (1, "8-10")


def test_empty_intervals() -> None:
    intervals = Intervals[str]()
    assert (len(intervals), intervals.at(1), list(intervals.overlapping(1, MAX))) == (0, None, [])
    with pytest.raises(KeyError):
        intervals.remove(1)
