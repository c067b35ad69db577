"""Masqueraded connections to one destination share the ports of one address: how many are in use is counted."""

from collections.abc import Iterator
from itertools import count as count_from

import pytest

from gangway.host import source_ports, usage
from gangway.host.usage import LocalPorts, usages
from gangway.limits import Level, Usage, describe, level
from lab.conntrack import Flow, Masqueraded, count, flush, track, track_masqueraded
from lab.netns import Namespace

HOST, OTHER = {4: "192.0.2.1", 6: "2001:db8::1"}, {4: "192.0.2.2", 6: "2001:db8::2"}
_ports = count_from(2000)
BOX, SERVER = {4: "172.30.0.2", 6: "fd30::2"}, {4: "198.51.100.9", 6: "2001:db8:9::9"}


@pytest.fixture(scope="module", autouse=True)
def host() -> Iterator[Namespace]:
    with Namespace("masquerade") as host, host.entered():
        yield host
        flush()


def masqueraded(family: int, number: int, protocol: str = "tcp", to: int = 443, host: str = "") -> None:
    """Track connections of a container, which are seen from one address of the host."""
    seen_from, client, server = host or HOST[family], BOX[family], SERVER[family]
    ports = [next(_ports) for _ in range(number)]
    track_masqueraded(*(Masqueraded(protocol, (client, one), (server, to), (seen_from, one)) for one in ports))


def ports_in_use() -> Usage:
    found = usages(None, LocalPorts(0, -1, 0), tuple, source_ports.busiest)
    return next(one for one in found if one.what == "masquerade ports")


@pytest.mark.parametrize(("family", "text"), [(4, "198.51.100.9:443"), (6, "[2001:db8:9::9]:443")])
def test_the_busiest_address_and_destination_are_found(family: int, text: str) -> None:
    flush()
    track(*(Flow("tcp", HOST[family], 8000, BOX[family]) for _ in range(9)))  # only their destinations are translated
    assert source_ports.busiest()[0] == 0
    masqueraded(family, 7)
    for protocol, to, host in (("udp", 443, ""), ("tcp", 80, ""), ("tcp", 443, OTHER[family])):
        masqueraded(family, 5, protocol, to, host)
    assert source_ports.busiest() == (7, f"from {HOST[family]} to tcp {text}")


def test_ports_are_counted_when_they_may_be_nearly_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    flush()
    masqueraded(4, 10)
    assert ports_in_use()[1:3] == (10, 64512)
    assert ports_in_use().is_bound
    masqueraded(6, 10)
    monkeypatch.setattr(usage, "PORTS", range(11))
    found = ports_in_use()
    assert count() == 20
    assert (found.used, found.limit, found.is_bound, level(found)) == (10, 11, False, Level.NEARLY)
    assert describe(found).startswith("10 of 11 in use, nearly all; then new masqueraded connections from ")
    assert "lower net.netfilter.nf_conntrack_tcp_timeout_time_wait" in describe(found)


def test_a_recent_count_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([(5, "first"), (6, "second")])
    monkeypatch.setattr(source_ports, "busiest", lambda: next(numbers))
    recent = source_ports.RecentCount()
    assert recent.busiest() == recent.busiest() == (5, "first")
    monkeypatch.setattr(source_ports, "_AGE_S", 0.0)
    assert recent.busiest() == (6, "second")
