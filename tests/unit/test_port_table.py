"""The table of ports: how many entries have to do with each."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.ebpf.port_table import ROWS, PortTable, Stretch

PORTS = 65536
STRETCHES = st.lists(
    st.tuples(st.integers(0, ROWS - 1), st.integers(0, 9), st.integers(0, 9)).map(
        lambda one: (one[0], min(one[1:]), max(one[1:]))
    ),
    max_size=6,
)


class Memory:
    """A table in memory of this process's own."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("ports")
        os.truncate(self._fd, ROWS * PORTS)
        self.table = PortTable(self._fd)

    def count(self, row: int, port: int) -> int:
        return os.pread(self._fd, 1, row * PORTS + port)[0]

    def total(self) -> int:
        return sum(os.pread(self._fd, ROWS * PORTS, 0))

    def close(self) -> None:
        self.table.close()
        os.close(self._fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


def naive(stretches: list[Stretch]) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for row, first, last in stretches:
        for port in range(first, last + 1):
            found[row, port] = found.get((row, port), 0) + 1
    return found


@given(STRETCHES, st.data())
def test_each_port_is_counted_as_often_as_a_stretch_has_it(stretches: list[Stretch], data: st.DataObject) -> None:
    memory = Memory()
    memory.table.add(stretches)
    assert {place: memory.count(*place) for place in naive(stretches)} == naive(stretches)
    assert memory.total() == sum(naive(stretches).values())
    gone = data.draw(st.permutations(stretches).map(lambda order: order[: len(order) // 2]))
    memory.table.remove(gone)
    left = list(stretches)
    for one in gone:
        left.remove(one)
    assert memory.total() == sum(naive(left).values())
    memory.close()


def test_the_ends_of_a_row_are_no_others(memory: Memory) -> None:
    memory.table.add([(1, 0, PORTS - 1)])
    assert [memory.count(row, port) for row in range(3) for port in (0, PORTS - 1)] == [0, 0, 1, 1, 0, 0]
    assert memory.total() == PORTS


def test_a_count_at_its_highest_stays_there(memory: Memory) -> None:
    """Who has to do with that port looks twice until it is counted anew."""
    for _ in range(257):
        memory.table.add([(2, 80, 80)])
    assert memory.count(2, 80) == 255
    for _ in range(257):
        memory.table.remove([(2, 80, 80)])
    assert memory.count(2, 80) == 255


def test_a_port_that_nobody_has_stays_at_nothing(memory: Memory) -> None:
    memory.table.remove([(0, 80, 90)])
    assert memory.total() == 0


def test_what_was_counted_by_somebody_else_is_forgotten(memory: Memory) -> None:
    memory.table.add([(0, 80, 90), (3, 1, 1)])
    memory.table.count_anew([(1, 85, 86), (1, 86, 87)])
    assert [memory.count(1, port) for port in (85, 86, 87)] == [1, 2, 1]
    assert memory.total() == 4
