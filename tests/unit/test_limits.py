"""What is logged, and what `doctor` says, when a limit of the kernel is nearly reached."""

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.daemon.doctor import limit_checks
from gangway.daemon.messages import CheckAnswer
from gangway.inet import PROTOCOLS
from gangway.limits import Level, LimitWatch, Usage, describe, exhausted, level, out_of_ports


def tracked(used: int, limit: int = 1000) -> Usage:
    return Usage("connections", used, limit, "net.limit (sysctl)", "new ones are dropped")


NEARLY = "connections: 900 of 1000 in use, nearly all; then new ones are dropped: raise net.limit (sysctl)"
REACHED = "connections: 1000 of 1000 in use: new ones are dropped: raise net.limit (sysctl)"
OVER = "connections: 799 of 1000 in use: no longer nearly all"


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0, 899), []),
        ((900, 950, 900, 880, 900), [NEARLY]),
        ((900, 1000, 1001, 1000), [NEARLY, REACHED]),
        ((1000, 990, 1000, 900, 810, 1000), [REACHED]),
        ((900, 799, 500, 900), [NEARLY, OVER, NEARLY]),
        ((1000, 799, 0), [REACHED, OVER]),
    ],
)
def test_each_change_is_logged_once(shares: tuple[int, ...], expected: list[str]) -> None:
    watch = LimitWatch()
    assert [line for used in shares for line in watch.update([tracked(used)])] == expected


def test_what_has_ended_is_forgotten() -> None:
    watch = LimitWatch()
    assert len(list(watch.update([tracked(950)]))) == 1
    assert list(watch.update([])) == []
    assert len(list(watch.update([tracked(950)]))) == 1


@given(st.lists(st.integers(0, 1100), max_size=30))
def test_reached_limit_is_logged_between_two_that_are_over(numbers: list[int]) -> None:
    watch, is_said = LimitWatch(), False
    for used in numbers:
        lines = list(watch.update([tracked(used)]))
        is_said = (is_said or any("dropped" in line for line in lines)) and not any("no longer" in one for one in lines)
        if level(tracked(used)) is not Level.FREE:
            assert is_said
        if used < 800:
            assert not is_said


def test_doctor_lists_number_limit_and_setting() -> None:
    bound = tracked(10)._replace(is_bound=True)
    assert list(limit_checks([bound, tracked(900)])) == [
        CheckAnswer("limit: connections", True, "at most 10 of 1000 in use; set by net.limit (sysctl)"),
        CheckAnswer("limit: connections", False, describe(tracked(900))),
    ]


def test_other_remedy_than_the_setting() -> None:
    usage = tracked(950)._replace(remedy="keep fewer")
    assert describe(usage) == "950 of 1000 in use, nearly all; then new ones are dropped: keep fewer"
    assert describe(usage._replace(used=1000)) == "1000 of 1000 in use: new ones are dropped: keep fewer"


@pytest.mark.parametrize(
    ("error", "setting"),
    [
        (errno.EMFILE, "LimitNOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOSPC, "fs.epoll.max_user_watches"),
        (errno.ENOMEM, "kernel memory"),
        (errno.ECONNABORTED, ""),
    ],
)
def test_refused_descriptor_names_the_setting(error: int, setting: str) -> None:
    text = exhausted(OSError(error, os.strerror(error)))
    assert (setting in text) if setting else not text


@pytest.mark.parametrize(
    ("protocol", "error"), [("tcp", errno.EADDRNOTAVAIL), ("udp", errno.EAGAIN), ("sctp", errno.EADDRINUSE)]
)
def test_missing_local_port_names_the_range(protocol: str, error: int) -> None:
    number = PROTOCOLS[protocol]
    assert "net.ipv4.ip_local_port_range" in out_of_ports(error, number, is_ipv6=False)
    assert not out_of_ports(errno.ECONNREFUSED, number, is_ipv6=False)
    assert "IPv6 address" in out_of_ports(error, number, is_ipv6=True)
