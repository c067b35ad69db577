"""The log: one warning of each kind per second, and the number of suppressed ones."""

import os
import re
import syslog
from pathlib import Path

import pytest

from gangway.log import Log, open_file, open_log


class Written:
    """The lines of a log, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.lines: list[tuple[int, str]] = []
        self.log = Log(self._write, lambda: self.now_s)

    def _write(self, level: int, line: str) -> None:
        self.lines.append((level, line))

    def texts(self) -> list[str]:
        """Return the lines without their levels."""
        return [line for _, line in self.lines]


@pytest.fixture
def written() -> Written:
    return Written()


def test_first_warning_is_written(written: Written) -> None:
    written.log.warning("no %s: %d", "route", 7)
    assert written.lines == [(syslog.LOG_WARNING, "no route: 7")]


def test_warning_of_a_kind_is_written_once_a_second(written: Written) -> None:
    for number in range(100):
        written.log.warning("lost %d", number)
        written.now_s += 0.03125  # a power of two: no rounding
    assert [line.split(" (")[0] for line in written.texts()] == ["lost 0", "lost 32", "lost 64", "lost 96"]


def test_suppressed_warnings_are_counted(written: Written) -> None:
    for number in range(5):
        written.log.warning("lost %d", number)
    written.now_s += 1
    written.log.warning("lost %d", 5)
    written.now_s += 1
    written.log.warning("lost %d", 6)
    assert written.texts() == ["lost 0", "lost 5 (4 more like this were suppressed)", "lost 6"]


def test_kinds_do_not_suppress_each_other(written: Written) -> None:
    for kind in ("a %d", "b %d", "a %d"):
        written.log.warning(kind, 1)
    assert written.texts() == ["a 1", "b 1"]


def test_information_is_never_suppressed(written: Written) -> None:
    for _ in range(3):
        written.log.info("up: %s", "all")
    assert written.lines == [(syslog.LOG_INFO, "up: all")] * 3


def test_failure_is_written_with_its_traceback(written: Written) -> None:
    try:
        raise ValueError("unexpected")
    except ValueError as error:
        written.log.failure(error)
    assert {level for level, _ in written.lines} == {syslog.LOG_ERR}
    assert written.texts()[-1] == "ValueError: unexpected"
    assert any("test_log.py" in line for line in written.texts())


def test_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    open_log(str(path)).info("after")
    before, after = path.read_text().splitlines()
    assert before == "before"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} gangway\[\d+\] info: after", after)


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_log(str(tmp_path / "nowhere" / "log"))


def test_a_renamed_log_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = open_log(str(path))
    log.info("one")
    path.rename(tmp_path / "log.1")
    fd = open_file(str(path))
    log.use(fd)
    os.close(fd)
    log.info("two")
    assert (tmp_path / "log.1").read_text().endswith(" info: one\n")
    assert path.read_text().endswith(" info: two\n")
    assert path.read_text().count("\n") == 1
