"""Ranges of ports: the same as a value for each port."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.intervals import Intervals

MOST = 65535
# Mostly near to one another and to the ends, where they touch and overlap.
PORTS = st.integers(1, 12) | st.integers(MOST - 5, MOST) | st.integers(1, MOST)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair)))


def apart(many: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that have no port of one before."""
    found: list[tuple[int, int]] = []
    for first, last in many:
        if all(last < other_first or first > other_last for other_first, other_last in found):
            found.append((first, last))
    return found


APART = st.lists(RANGES, max_size=8).map(apart)


def made(ranges: Iterable[tuple[int, int]]) -> Intervals[str]:
    """Each with its own text as value."""
    intervals = Intervals[str]()
    for first, last in ranges:
        intervals.add(first, last, f"{first}-{last}")
    return intervals


def by_port(ranges: Iterable[tuple[int, int]]) -> dict[int, str]:
    return {port: f"{first}-{last}" for first, last in ranges for port in range(first, last + 1)}


@given(APART, PORTS)
@example([(1, 1)], 1)
@example([(1, 1)], 2)
@example([(MOST, MOST)], MOST)
@example([(MOST, MOST)], MOST - 1)
@example([(1, MOST)], MOST)
@example([(5, 6), (7, 8)], 6)
@example([(7, 8), (5, 6)], 7)
@example([(5, 6), (8, 9)], 7)
def test_a_port_has_the_value_of_the_range_that_it_is_in(ranges: list[tuple[int, int]], port: int) -> None:
    assert made(ranges).at(port) == by_port(ranges).get(port)


@given(APART)
def test_at_its_ends_a_range_has_its_value_and_beyond_them_another(ranges: list[tuple[int, int]]) -> None:
    intervals, naive = made(ranges), by_port(ranges)
    for first, last in ranges:
        assert intervals.at(first) == intervals.at(last) == f"{first}-{last}"
        assert (intervals.at(first - 1), intervals.at(last + 1)) == (naive.get(first - 1), naive.get(last + 1))


@given(APART, RANGES)
@example([(1, 4), (5, 9)], (4, 5))
@example([(1, 4), (6, 9)], (5, 5))
@example([(2, 4)], (1, MOST))
@example([(1, MOST)], (3, 3))
@example([(1, 1), (2, 2), (3, 3)], (2, 2))
def test_all_that_have_a_port_of_a_range_overlap_it(ranges: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    """In their order, and each once."""
    naive = by_port(ranges)
    found = list(made(ranges).overlapping(*asked))
    assert found == list(dict.fromkeys(naive[port] for port in sorted(naive) if asked[0] <= port <= asked[1]))


@given(APART, st.data())
def test_what_is_removed_leaves_the_others_and_its_place(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    intervals = made(ranges)
    gone = data.draw(st.lists(st.sampled_from(ranges), unique=True)) if ranges else []
    for first, _ in gone:
        intervals.remove(first)
    left = [one for one in ranges if one not in gone]
    assert len(intervals) == len(left)
    assert bool(intervals) == bool(left)
    naive = by_port(left)
    for port in {port for one in ranges for port in one}:
        assert intervals.at(port) == naive.get(port)
    for first, last in gone:
        intervals.add(first, last, f"{first}-{last}")
    assert list(intervals.overlapping(1, MOST)) == [f"{first}-{last}" for first, last in sorted(ranges)]


@pytest.mark.parametrize("first", [1, 7, 9, 10, 11, MOST])
def test_only_a_first_port_names_a_range(first: int) -> None:
    intervals = made([(8, 10)])
    with pytest.raises(KeyError):
        intervals.remove(first)
    assert (len(intervals), intervals.at(9)) == (1, "8-10")


def test_of_none_nothing_is_found() -> None:
    intervals = Intervals[str]()
    assert (len(intervals), intervals.at(1), list(intervals.overlapping(1, MOST))) == (0, None, [])
    with pytest.raises(KeyError):
        intervals.remove(1)
