"""What a command shows while it waits."""

import os
import pty
import re
import select
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gangway.cli import progress
from gangway.cli.client import ask_running
from gangway.cli.progress import wait_readable
from tests.unit.answering import ANSWERS, answering


@contextmanager
def terminal(step_s: float) -> Iterator[int]:
    """Make standard error a terminal; what it shows can be read from this descriptor."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    with open(theirs, "w") as stream, open(ours, "rb", buffering=0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "_STEP_S", step_s)
        patch.setattr(sys, "stderr", stream)
        yield ours


def answered_after(delay_s: float) -> socket.socket:
    """Return a socket that becomes readable after some time."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with theirs:
            theirs.send(b"0")

    timer = threading.Timer(delay_s, answer)
    timer.start()
    return ours


def read_until_removed(shown: int) -> str:
    """Return what a terminal shows until the line is removed; the kernel delivers it a moment after it was written."""
    received = ""
    while not received.endswith(" \r"):
        select.select([shown], [], [])
        received += os.read(shown, 65536).decode()
    return received


def test_a_terminal_shows_what_is_waited_for_and_then_nothing() -> None:
    with answered_after(0.2) as sock, terminal(0.02) as shown:
        assert wait_readable(sock, 5, "waiting for the daemon")
        received = read_until_removed(shown)
    first, *texts, blanks, last = received.split("\r")
    assert texts
    assert all(re.fullmatch(r"gangway: waiting for the daemon: \d+ s", text) for text in texts)
    assert (first, blanks, last) == ("", " " * len(texts[-1]), "")


def test_a_quick_answer_shows_nothing() -> None:
    with answered_after(0) as sock, terminal(1.0) as shown:
        assert wait_readable(sock, 5, "waiting")
        with pytest.raises(BlockingIOError):
            os.read(shown, 1)


def test_nothing_is_shown_but_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_STEP_S", 0.01)
    with answered_after(0.1) as sock:
        assert wait_readable(sock, 5, "waiting")
    assert capsys.readouterr() == ("", "")


def test_a_limit_ends_the_wait() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, terminal(0.02):
        assert not wait_readable(ours, 0.05, "waiting")


def test_a_command_shows_that_it_waits_for_the_daemon(tmp_path: Path) -> None:
    with answering(tmp_path / "gangway.sock", delay_s=0.2), terminal(0.02) as shown:
        assert ask_running(f"{tmp_path}/gangway.sock", "GET", "/networks") == ANSWERS["/networks"]
        assert "gangway: waiting for the daemon: 0 s" in read_until_removed(shown)
