"""The benchmark's arithmetic and its load generator: bounds, the schedule, points of the curve, and shared turns."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bench import report, rounds
from bench.chapters import ALL_PORTS, RELAYED_IPV6
from bench.contenders import DockerProxy, relayed_ipv6
from bench.curve import DOCKERD, FRONT, GANGWAY, STOCK, Cost, Curve
from bench.errors import CannotCarry
from bench.measures import MEASURES, PAIRS, SHARED, bulk, request_response
from bench.result import RowResult, Verdict
from bench.rounds import Runner, Settings, schedule
from bench.rows import DOCKER_PROXY, DOCKER_ROWS, HAPROXY, ROWS, SUBJECT, Row, per_second
from bench.setup import Contender, Port
from bench.traffic import Load, LoadResult

_TOGETHER = [replace(row, max_rounds=None) for row in ROWS if row.key in ("scale-one-more", "scale-restart")]


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

    monkeypatch.setattr(rounds, "SHARED", dict.fromkeys((row.key for row in _TOGETHER), measure))
    set_up = _WithoutHost("gangway")
    contenders = {ALL_PORTS: {row.road: set_up for row in _TOGETHER}}
    with Runner(contenders, Load(Path("load")), Settings(2, 1.0, False)) as runner:
        results = runner.run(_TOGETHER, say=lambda _line: None)
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


def _row(less_is_better: bool = False) -> Row:
    contenders = (SUBJECT, DOCKER_PROXY, "socat", HAPROXY)
    bound, aim = (0.8, 0.6) if less_is_better else (1.25, 1.5)
    row = Row("row", "a row", per_second, bound, aim, contenders, less_is_better)
    return replace(row, also_compared_with=HAPROXY, also_bound=1.0)


def _result(row: Row, *figures: tuple[float, float, float]) -> RowResult:
    return RowResult(row, [dict(zip((SUBJECT, DOCKER_PROXY, HAPROXY), each, strict=True)) for each in figures])


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ((150.0, 100.0, 140.0), Verdict.AIM),
        ((130.0, 100.0, 130.0), Verdict.HOLDS),
        ((150.0, 100.0, 160.0), Verdict.SHORT),
        ((120.0, 100.0, 50.0), Verdict.SHORT),
    ],
)
def test_a_row_has_to_keep_both_bounds(figures: tuple[float, float, float], verdict: Verdict) -> None:
    assert _result(_row(), figures).verdict() is verdict


def test_of_a_latency_less_is_better_than_both() -> None:
    row = _row(less_is_better=True)
    verdicts = [_result(row, (0.7, 1.0, haproxy)).verdict() for haproxy in (0.7, 0.6)]
    assert verdicts == [Verdict.HOLDS, Verdict.SHORT]


def test_a_row_without_the_other_contender_is_judged_by_the_reference() -> None:
    result = RowResult(_row(), [{SUBJECT: 150.0, DOCKER_PROXY: 100.0}], {HAPROXY: ["did not start"]})
    assert result.verdict() is Verdict.AIM


def test_the_table_names_the_limit_for_the_other_contender() -> None:
    assert "| 0.80 (≥ 1) " in report.tables([_result(_row(), (160.0, 100.0, 200.0))], Curve())


def test_contenders_in_no_ratio_have_a_turn_in_the_first_round_only() -> None:
    found = [[slot.contender for slot in schedule([_row()], 3) if slot.round == number] for number in range(3)]
    compared = [SUBJECT, DOCKER_PROXY, HAPROXY]
    assert found == [[*compared, "socat"], compared[::-1], compared]


def test_rows_of_docker_have_a_run_of_their_own() -> None:
    documents = [report.document([], [], Curve(), of_run) for of_run in (report.RESULTS, report.DOCKER)]
    assert all(row.key.startswith("docker") for row in DOCKER_ROWS)
    assert "`make bench-docker`" in documents[0]
    assert documents[1].startswith("# Results of `make bench-docker`")


def test_every_row_is_measured_by_one_function() -> None:
    """A row that is measured together with others has no turn of its own, by mistake."""
    keys = [row.key for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {*MEASURES, *PAIRS, *SHARED}
    assert not {*MEASURES, *PAIRS} & {*SHARED}


class _FakeTurn:
    """A turn whose processes use a CPU second between two looks, and whose client has the given result."""

    seconds = 1.0

    def __init__(self, result: LoadResult) -> None:
        self.setup = self.load = self.group = self
        self._result = result
        self._cpu_s = 0.0

    def serve(self, _setup: object) -> None: ...

    def publish(self, *_ports: object) -> None: ...

    def run(self, *_words: object) -> LoadResult:
        return self._result

    def cpu_s(self) -> float:
        self._cpu_s += 1.0
        return self._cpu_s


def test_rate_cpu_time_and_latency_are_of_one_turn() -> None:
    turn: Any = _FakeTurn(LoadResult(20_000.0, 50_000, 0, 0.004, []))
    assert request_response(64, ("rate", "cpu", "p99"), turn) == {"rate": (20_000.0,), "cpu": (2.0,), "p99": (0.004,)}
    assert request_response(1, ("rate", "cpu"), turn) == {"rate": (20_000.0,), "cpu": (2.0,)}


def test_bulk_is_of_both_directions_in_one_turn() -> None:
    turn: Any = _FakeTurn(LoadResult(1e9, 2_000_000_000, 0, 0.0, []))
    assert bulk(1, ("up", "down", "cpu"), turn) == {"up": (1e9,), "down": (1e9,), "cpu": (0.5e-9,)}


def test_ipv6_clients_use_a_port_at_the_wildcard_address() -> None:
    found = relayed_ipv6(Path("gangway"), Path("docker-proxy"))
    assert set(found) == {contender for row in ROWS if row.chapter is RELAYED_IPV6 for contender in row.contenders}
    assert {contender.address("172.30.0.2") for contender in found.values()} == {"fd77::1"}
    proxy = found[DOCKER_PROXY]
    assert isinstance(proxy, DockerProxy)
    command = proxy.command("172.30.0.2", Port("tcp", 80, 8080))
    assert command[command.index("-host-ip") + 1] == "::"


@contextmanager
def _echo_server(slow_s: float, first: int, every: int) -> Iterator[int]:
    """Run a server that answers some requests late, and yield its port; the first request is number 0."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(ConnectionError):  # the client leaves with a request unanswered
            for number in count():
                if not (request := connection.recv(1)):
                    return
                if number >= first and (number - first) % every == 0:
                    time.sleep(slow_s)
                connection.sendall(request)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        server = Thread(target=serve)
        server.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.join()


@pytest.fixture(scope="module")
def load_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load")
    Load.built(folder)
    return folder / "load"


@pytest.mark.parametrize(("slow_s", "first", "every", "is_seen"), [(0.02, 5, 20, True), (0.3, 50, 1 << 40, False)])
def test_p99_has_seen_one_slow_answer_in_20_and_not_a_single_one(
    load_program: Path, slow_s: float, first: int, every: int, is_seen: bool
) -> None:
    with _echo_server(slow_s, first, every) as port:
        words = [str(load_program), "rr", "127.0.0.1", str(port), "1", "0.8"]
        done = subprocess.run(words, text=True, capture_output=True, check=True)
    _rate, answers, _failed, p99_s = map(float, done.stdout.split())
    assert answers > 100
    assert (p99_s >= slow_s) == is_seen
