"""The benchmark's arithmetic: points of the curve, and rows that share a turn."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import report, rounds
from bench.curve import DOCKERD, FRONT, GANGWAY, STOCK, Cost, Curve
from bench.errors import CannotCarry
from bench.rounds import Runner, Settings
from bench.rows import ALL_PORTS, ROWS, SUBJECT
from bench.setup import Contender
from bench.traffic import Load

_ONCE = [row for row in ROWS if row.key in ("scale-one-more", "scale-restart")]


class _WithoutHost(Contender):
    """A contender without a host."""

    turns = 0

    @contextmanager
    def set_up(self) -> Iterator[Any]:
        self.turns += 1
        yield None

    def address(self, container: str) -> str:
        raise NotImplementedError

    def publish(self, setup: object, ports: object) -> None:
        raise NotImplementedError


def _run(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> tuple[Any, int]:
    def measure(_turn: object) -> Any:
        if isinstance(outcome, CannotCarry):
            raise outcome
        return outcome

    monkeypatch.setattr(rounds, "SHARED", dict.fromkeys((row.key for row in _ONCE), measure))
    set_up = _WithoutHost("gangway")
    contenders = {ALL_PORTS: {row.road: set_up for row in _ONCE}}
    with Runner(contenders, Load(Path("load")), Settings(2, 1.0, False)) as runner:
        results = runner.run(_ONCE, say=lambda _line: None)
    return {result.row.key: result for result in results}, set_up.turns


def test_rows_of_one_measure_share_a_turn_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    results, turns = _run(monkeypatch, {"scale-one-more": (3.0, 2.0), "scale-restart": CannotCarry("was refused")})
    assert turns == 2
    assert results["scale-one-more"].ratios() == [1.5, 1.5]
    assert results["scale-restart"].failures == {SUBJECT: ["was refused"] * 2}


def test_a_turn_that_fails_has_failed_for_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    results, turns = _run(monkeypatch, CannotCarry("does not start"))
    assert turns == 2
    assert all(result.failures == {SUBJECT: ["does not start"] * 2} for result in results.values())


def test_a_point_is_the_median_and_one_that_failed_is_none() -> None:
    curve = Curve()
    for publish_s in (3.0, 1.0, 2.0):
        curve.add(GANGWAY, 10, Cost(publish_s, 1.0, 1e6))
    curve.add(GANGWAY, 1000, None)
    curve.add(DOCKERD, 10, Cost(9.0, 9.0, 9e6))
    assert curve.line(GANGWAY) == [(10, Cost(2.0, 1.0, 1e6))]
    assert curve.counts() == [10, 1000]
    *_, ten, thousand = report.tables([], curve).splitlines()
    assert [cell.strip() for cell in ten.strip("|").split("|")][:4] == ["10", "2.00 s", "1.00 s", "1.0 MB"]
    assert [cell.strip() for cell in thousand.strip("|").split("|")] == ["1,000", *["failed"] * 3, *["-"] * 3]


def test_curves_of_commands_and_of_docker_are_separate_tables() -> None:
    curve = Curve()
    curve.add(GANGWAY, 10_000, Cost(1.0, 1.0, 1e6))
    curve.add(STOCK, 300, Cost(9.0, 9.0, 9e6))
    shown = report.document([], [], curve)
    assert ["docker.png" in part for part in shown.split("## ")] == [False, False, True]
    commands, docker = (part.partition("\n\nAll ports")[0] for part in shown.split("## ")[1:])
    assert (GANGWAY in commands, STOCK in commands) == (True, False)
    assert (GANGWAY in docker.replace(FRONT, ""), STOCK in docker) == (False, True)
