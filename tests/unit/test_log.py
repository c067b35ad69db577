"""The log: one warning of each kind per second, what an event looks like, and where it goes."""

import json
import os
import re
import socket
import syslog
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gangway.log_targets as log_module
from gangway.log import LEVELS, Event, Log, event
from gangway.log_targets import AUTO, _for_file, _for_journal, _for_stderr, open_file, open_log, unusable


class Written:
    """The events of a log, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 50.0
        self.events: list[Event] = []
        self.log = Log(self.events.append, lambda: self.now_s)

    @property
    def lines(self) -> list[tuple[int, str]]:
        """The texts, each with its level."""
        return [(one.level, one.text) for one in self.events]

    def texts(self) -> list[str]:
        return [one.text for one in self.events]


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


def test_events_of_a_kind_are_limited_as_warnings_are(written: Written) -> None:
    for number in range(5):
        for user in ("root", "other"):
            written.log.write_limited(event("refused", f"{user} {number}", {}), user)
    written.now_s += 1
    written.log.write_limited(event("refused", "root again", {}), "root")
    assert written.texts() == ["root 0", "other 0", "root again (4 more like this were suppressed)"]


def test_information_is_never_suppressed(written: Written) -> None:
    for _ in range(3):
        written.log.info("up: %s", "all")
    assert written.lines == [(syslog.LOG_INFO, "up: all")] * 3


def test_less_important_events_are_left_out(written: Written) -> None:
    written.log.level = LEVELS["warning"]
    written.log.info("started", event="started")
    written.log.warning("repaired", event="repaired")
    written.log.level = LEVELS["debug"]
    written.log.write(event("answered", "GET /mappings: 200", {}, syslog.LOG_DEBUG))
    assert [one.name for one in written.events] == ["repaired", "answered"]


def test_a_second_writer_gets_the_same_events(written: Written) -> None:
    others: list[Event] = []
    written.log.add_writer(others.append)
    written.log.info("container %s exited", "box", event="exited", container="box")
    assert others == written.events
    assert (others[0].name, others[0].text, others[0].fields) == (
        "exited",
        "container box exited",
        {"container": "box"},
    )


def test_event_as_json() -> None:
    made = Event(1764371411.25, syslog.LOG_WARNING, "refused", "no “port”", {"status": 409, "is_last": True})
    found = json.loads(made.as_json())
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.250[+-]\d\d:\d\d", found.pop("time"))
    assert found == {"level": "warning", "event": "refused", "message": "no “port”", "status": 409, "is_last": True}


@given(text=st.text(max_size=3000), value=st.text(max_size=3000))
def test_whatever_an_event_says_it_is_one_line_of_each_format(text: str, value: str) -> None:
    made = event("refused", text, {"error": value, "status": 400})
    for form in (_for_file, _for_stderr):
        for as_json in (False, True):
            line = form(as_json, made)
            assert line.endswith(b"\n")
            assert len(line) <= 4096
            assert line.count(b"\n") == len(line.decode(errors="replace").splitlines()) == 1
            if as_json:
                assert json.loads(line)["event"] == "refused"
    fields = dict(line.split(b"=", 1) for line in _for_journal(made).splitlines())
    assert fields.keys() >= {b"MESSAGE", b"PRIORITY", b"GANGWAY_EVENT", b"GANGWAY_ERROR", b"GANGWAY_STATUS"}
    assert len(fields) == 6


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


def test_log_that_blocks_loses_lines_and_says_how_many(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    log = open_log(str(path))  # nobody reads it yet
    for number in range(3000):
        log.info("a line that is long enough to fill a pipe of 64 KiB soon: number %d", number)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    taken = os.read(fd, 1 << 20).decode().splitlines()
    log.info("the next line")
    assert [line.split(": ", 1)[1] for line in os.read(fd, 1 << 16).decode().splitlines()] == [
        f"{3000 - len(taken)} lines were lost: the log did not take them",
        "the next line",
    ]
    os.close(fd)


def test_daemon_does_not_wait_for_a_reader_of_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(log_module, "_STDERR", writer)
    log = open_log(AUTO, foreground=True)
    for _ in range(20):
        log.info("x" * 10000)
    assert len(os.read(reader, 1 << 20)) <= 1 << 16
    for fd in (reader, writer):
        os.close(fd)


@pytest.mark.parametrize("target", ["syslog", "auto"])
def test_syslog_that_hangs_or_comes_back(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listen() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(tmp_path / "log"))
        return sock

    monkeypatch.setattr(log_module, "_SYSLOG", str(tmp_path / "log"))
    monkeypatch.setattr(log_module, "_JOURNAL", str(tmp_path / "nowhere"))
    log = open_log(target)
    log.info("lost: there is none yet")
    with listen() as server:
        for _ in range(2000):  # the queue of a socket holds fewer
            log.info("text")
        server.setblocking(False)
        assert (
            server.recv(1000).decode().endswith(f"gangway[{os.getpid()}]: 1 lines were lost: the log did not take them")
        )
    (tmp_path / "log").unlink()
    with listen() as server:
        log.info("lost: the former one is closed")
        log.info("back")
        assert "lines were lost" in server.recv(1000).decode()
        assert re.fullmatch(r"<30>\w{3} [ \d]\d \d\d:\d\d:\d\d gangway\[\d+\]: back", server.recv(1000).decode())


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What the journal listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.setblocking(False)
        monkeypatch.setattr(log_module, "_JOURNAL", str(tmp_path / "journal"))
        yield sock


def test_journal_gets_fields(journal: socket.socket) -> None:
    open_log("auto").warning("no route to box", event="unreachable", container="box", port=80)
    fields = "PRIORITY=4 SYSLOG_IDENTIFIER=gangway GANGWAY_EVENT=unreachable GANGWAY_CONTAINER=box GANGWAY_PORT=80"
    assert journal.recv(4096).decode().splitlines() == ["MESSAGE=no route to box", *fields.split()]


def test_program_in_the_foreground_uses_the_journal_if_it_is_connected_to_it(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/null", "w") as file:
        monkeypatch.setattr(log_module, "_STDERR", file.fileno())
        found = os.fstat(file.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino + 1}")
        open_log("auto", foreground=True).info("to standard error")
        with pytest.raises(BlockingIOError):
            journal.recv(4096)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        open_log("auto", foreground=True).info("to the journal")
        assert journal.recv(4096).startswith(b"MESSAGE=to the journal\n")


def test_json_in_a_file(tmp_path: Path) -> None:
    open_log(str(tmp_path / "log"), form="json").info("up", event="started", pid=12)
    found = json.loads((tmp_path / "log").read_text())
    assert (found["event"], found["message"], found["pid"]) == ("started", "up", 12)


@pytest.mark.parametrize(
    ("name", "reason"), [("nowhere/log", "there is no folder .*/nowhere"), ("", "Is a directory"), ("log", "")]
)
def test_unusable_file(tmp_path: Path, name: str, reason: str) -> None:
    assert re.fullmatch(reason, unusable(f"{tmp_path}/{name}"))
    assert not (tmp_path / "log").exists()


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
