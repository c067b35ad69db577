"""The number of map entries for each port."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.ebpf.keys import Span
from gangway.ebpf.port_map import PortCounts

PORTS, ROWS = 65536, 4
SPANS = st.lists(
    st.tuples(st.integers(0, ROWS - 1), st.integers(0, 9), st.integers(0, 9)).map(
        lambda one: (one[0], min(one[1:]), max(one[1:]))
    ),
    max_size=6,
)


class Memory:
    """The counts in this process's own memory, in place of a map's."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("ports")
        os.truncate(self._fd, ROWS * PORTS)
        self.counts = PortCounts(self._fd, ROWS)

    def count(self, row: int, port: int) -> int:
        return os.pread(self._fd, 1, row * PORTS + port)[0]

    def total(self) -> int:
        return sum(os.pread(self._fd, ROWS * PORTS, 0))

    def close(self) -> None:
        self.counts.close()
        os.close(self._fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


def naive(spans: list[Span]) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for row, first, last in spans:
        for port in range(first, last + 1):
            found[row, port] = found.get((row, port), 0) + 1
    return found


@given(SPANS, st.data())
def test_each_port_is_counted_once_for_each_span(spans: list[Span], data: st.DataObject) -> None:
    memory = Memory()
    memory.counts.add(spans)
    assert {place: memory.count(*place) for place in naive(spans)} == naive(spans)
    assert memory.total() == sum(naive(spans).values())
    removed = data.draw(st.permutations(spans).map(lambda order: order[: len(order) // 2]))
    memory.counts.remove(removed)
    left = list(spans)
    for one in removed:
        left.remove(one)
    assert memory.total() == sum(naive(left).values())
    memory.close()


def test_a_span_does_not_reach_into_other_rows(memory: Memory) -> None:
    memory.counts.add([(1, 0, PORTS - 1)])
    assert [memory.count(row, port) for row in range(3) for port in (0, PORTS - 1)] == [0, 0, 1, 1, 0, 0]
    assert memory.total() == PORTS


def test_a_count_of_255_stays_until_it_is_reset(memory: Memory) -> None:
    for _ in range(257):
        memory.counts.add([(2, 80, 80)])
    assert memory.count(2, 80) == 255
    for _ in range(257):
        memory.counts.remove([(2, 80, 80)])
    assert memory.count(2, 80) == 255


def test_a_count_of_zero_stays_at_zero(memory: Memory) -> None:
    memory.counts.remove([(0, 80, 90)])
    assert memory.total() == 0


def test_reset_replaces_all_counts(memory: Memory) -> None:
    memory.counts.add([(0, 80, 90), (3, 1, 1)])
    memory.counts.reset([(1, 85, 86), (1, 86, 87)])
    assert [memory.count(1, port) for port in (85, 86, 87)] == [1, 2, 1]
    assert memory.total() == 4
