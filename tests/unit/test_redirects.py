"""The daemon's redirect: what the relay holds for it, what becomes of it when somebody ends it, what is told of it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gangway.ebpf.daemon_redirect import SWITCHED_OFF, Redirects
from gangway.ebpf.keys import sixteen
from gangway.ebpf.redirect_entries import led_to
from gangway.errors import HostRefused, Unsupported
from gangway.plan import MappingPlan
from gangway.reconcile.diff import redirects_of
from gangway.relay.client import Relay
from gangway.relay.settings import Settings
from tests.unit.pretend_redirect import Pretended
from tests.unit.samples import NO_REDIRECT, SIX, mapping, planned

FOUR_OWN, SIX_OWN = bytes([192, 0, 2, 5]), bytes.fromhex("20010db8000000000000000000000005")


class Holder(Relay):
    """A relay, as far as it holds something."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), Settings())
        self.holds: list[list[int]] = []
        self.from_before: list[int] = []

    def hold(self, name: str, fds: Sequence[int]) -> None:
        assert name == "redirect"
        self.holds.append(list(fds))

    def held(self, name: str) -> list[int]:
        assert name == "redirect"
        return self.from_before


@pytest.fixture(autouse=True)
def a_host_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gangway.ebpf.daemon_redirect.Redirect", Pretended)


@pytest.fixture
def relay() -> Holder:
    return Holder()


def made(relay: Relay, wanted: bool = True, of_host: bool = False, lent_fd: int | None = None) -> Redirects:
    return Redirects(relay, wanted, of_host, lambda: lent_fd)


def entered(found: MappingPlan, relay: Relay, times: int = 0) -> Redirects:
    """With the entries of a mapping, each of which was used so often."""
    redirects = made(relay)
    redirects.enter(redirects_of(found))
    for key, value in Pretended.last.trie.items():
        Pretended.last.trie[key] = value[:-8] + times.to_bytes(8, sys.byteorder)
    return redirects


def test_the_relay_holds_what_keeps_it_going(relay: Holder) -> None:
    assert made(relay).lacking == ""
    assert relay.holds == [Pretended.last.links]
    assert Pretended.last.host_too is False


def test_one_that_is_switched_off_says_so_and_ends_the_former(relay: Holder) -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    relay.from_before = [fd]
    switched_off = made(relay, wanted=False)
    assert (switched_off.lacking, relay.holds) == (SWITCHED_OFF, [[]])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_where_there_can_be_none_it_says_why(relay: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretended, "able", False)
    lacking = made(relay)
    assert (lacking.lacking, relay.holds) == ("this kernel does not take the programs", [[]])
    with pytest.raises(Unsupported, match="does not take the programs"):
        lacking.enter(redirects_of(planned(mapping("0.0.0.0"))))
    lacking.erase(redirects_of(planned(mapping("0.0.0.0"))))
    lacking.learn_addresses(lambda: ["192.0.2.5"])
    lacking.mend()
    lacking.close()
    assert (lacking.found(), lacking.is_intact()) == ({}, True)


def test_a_successor_takes_over_what_was_entered(relay: Holder) -> None:
    entered(planned(mapping("0.0.0.0", "8000-8010")), relay, times=3)
    relay.from_before = [os.open(os.devnull, os.O_RDONLY)]
    successor = made(relay)
    assert successor.found() == dict(redirects_of(planned(mapping("0.0.0.0", "8000-8010")))), "without the counts"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(relay.from_before[0])


def test_what_is_entered_is_found_and_can_be_erased(relay: Holder) -> None:
    one, other = (dict(redirects_of(planned(mapping("::", ports)))) for ports in ("8000-8010", "9000"))
    redirects = made(relay)
    redirects.enter(one.items())
    redirects.enter(other.items())
    assert redirects.found() == one | other
    redirects.erase(one.items())
    redirects.erase(one.items())
    assert redirects.found() == other


def test_all_entries_or_none(relay: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    redirects = entered(planned(mapping("::", "80")), relay)
    before = redirects.found()
    monkeypatch.setattr(Pretended, "room", 3)
    with pytest.raises(HostRefused, match="takes no more"):
        redirects.enter(redirects_of(planned(mapping("::", "8000-8010"))))
    assert redirects.found() == before


def test_one_that_somebody_ended_is_attached_anew(relay: Holder) -> None:
    redirects = entered(planned(mapping("0.0.0.0")), relay)
    before, found = Pretended.last, redirects.found()
    redirects.mend()
    assert Pretended.last is before, "nobody has"
    before.attached = False
    assert not redirects.is_intact()
    redirects.mend()
    assert redirects.is_intact()
    assert (before.closed, Pretended.last.closed, redirects.found()) == (True, False, found)
    assert relay.holds == [before.links, Pretended.last.links]


def test_one_that_cannot_be_attached_anew_is_none(relay: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    redirects = entered(planned(mapping("0.0.0.0")), relay)
    Pretended.last.attached = False
    monkeypatch.setattr(Pretended, "able", False)
    with pytest.raises(Unsupported):
        redirects.mend()
    assert redirects.lacking == "this kernel does not take the programs"
    assert (redirects.is_intact(), redirects.found(), Pretended.last.closed) == (True, {}, True)
    assert relay.holds[-1] == []
    redirects.mend()
    redirects.close()


@pytest.mark.parametrize("lent_fd", [None, 7])
def test_ports_that_are_lent_are_known_to_each_one_that_is_attached(relay: Holder, lent_fd: int | None) -> None:
    redirects = made(relay, lent_fd=lent_fd)
    before = Pretended.last
    before.attached = False
    redirects.mend()
    assert Pretended.last is not before
    assert (before.lent_fd, Pretended.last.lent_fd) == (lent_fd, lent_fd)


def test_the_hosts_own_addresses_are_told_when_they_change(relay: Holder) -> None:
    redirects = made(relay, of_host=True)
    assert Pretended.last.host_too
    addresses = ["127.0.0.1", "192.0.2.5", "::1", "fe80::5", "2001:db8::5"]
    for _ in range(2):
        redirects.learn_addresses(lambda: addresses)
    addresses.pop()
    redirects.learn_addresses(lambda: addresses)
    four, six = sixteen(FOUR_OWN), sixteen(SIX_OWN)
    assert Pretended.last.own == [frozenset({four, six}), frozenset({four})]


def test_where_rules_serve_the_host_its_addresses_are_not_asked(relay: Holder) -> None:
    redirects = made(relay)
    redirects.learn_addresses(lambda: pytest.fail("asked"))
    assert Pretended.last.own == []


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            planned(mapping("0.0.0.0", "8000", "80")),
            "redirect map: tcp 0.0.0.0:8000 -> 172.30.0.2:80; the mapping was used 7 times so far",
        ),
        (
            planned(mapping("::1", "8000")),
            "redirect map: tcp [::1]:8000 -> [fd30::2]:8000; the mapping was used 7 times so far",
        ),
    ],
)
def test_the_entry_that_a_socket_meets_is_told_as_the_kernel_has_it(
    relay: Holder, found: MappingPlan, line: str
) -> None:
    redirects = entered(found, relay, times=7)
    assert redirects.met(found, 8000) == line
    assert redirects.met(found, 8001) == "no entry in the redirect's map"
    redirects.erase(redirects_of(found))
    assert redirects.met(found, 8000) == "no entry in the redirect's map"


def test_a_mapping_is_counted_over_all_its_entries(relay: Holder) -> None:
    found = planned(mapping("0.0.0.0", "8000-8010"))
    redirects = entered(found, relay, times=5)
    assert [led_to(value, 0).redirected for value in Pretended.last.trie.values()] == [5, 5, 5]
    assert redirects.count(found) == 15
    assert redirects.count(planned(mapping("0.0.0.0", "9000"))) == 0
    assert redirects.count(planned(mapping("0.0.0.0", "8000-8010"), NO_REDIRECT)) == 0
    assert redirects.count(planned(mapping("0.0.0.0", "8000-8010"), of=SIX)) == 0
