"""Tracked connections are deleted by address, port and container, however many there are."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from gangway.errors import HostRefused, Unsupported
from gangway.host import conntrack, netlink
from gangway.host.conntrack import Destination
from lab.conntrack import Flow, count, flush, track, tracked
from lab.netns import Namespace

HOST, OTHER, BOX, NEXT = "10.77.0.1", "10.77.0.9", "172.30.0.2", "172.30.0.3"
HOST6, OTHER6, BOX6, NEXT6 = "fd77::1", "fd77::9", "fd30::2", "fd30::3"


@pytest.fixture(scope="module", autouse=True)
def host() -> Iterator[Namespace]:
    with Namespace("conntrack") as host, host.entered():
        yield host


@pytest.fixture(autouse=True)
def _empty_table(host: Namespace) -> None:
    flush()


@pytest.fixture(params=[4, 6])
def addresses(request: pytest.FixtureRequest) -> tuple[str, str, str, str]:
    """Two addresses that clients connect to, and two containers'."""
    return (HOST, OTHER, BOX, NEXT) if request.param == 4 else (HOST6, OTHER6, BOX6, NEXT6)


def family(address: str) -> int:
    return 6 if ":" in address else 4


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
def test_entries_of_the_destination_are_deleted_and_no_others(
    protocol: str, addresses: tuple[str, str, str, str]
) -> None:
    at, other, box, _ = addresses
    gone = [Flow(protocol, at, 8000, box), Flow(protocol, at, 8000, at)]
    left = [
        Flow(protocol, other, 8000, box),
        Flow(protocol, at, 8001, box),
        Flow("tcp" if protocol == "udp" else "udp", at, 8000, box),
    ]
    track(*gone, *left)
    conntrack.delete(protocol, family(at), [Destination({at}, range(8000, 8001))])
    assert tracked() == set(left)


def test_ranges_and_several_destinations(addresses: tuple[str, str, str, str]) -> None:
    at, other, box, _ = addresses
    gone = [Flow("tcp", at, 5000, box), Flow("tcp", at, 5009, box), Flow("tcp", other, 80, box)]
    left = [Flow("tcp", at, 4999, box), Flow("tcp", at, 5010, box), Flow("tcp", at, 80, box)]
    track(*gone, *left)
    wanted = [Destination({at, "192.0.2.1", "100::1"}, range(5000, 5010)), Destination({other}, range(80, 81))]
    conntrack.delete("tcp", family(at), wanted)
    assert tracked() == set(left)


def test_entries_that_lead_to_the_container_are_kept(addresses: tuple[str, str, str, str]) -> None:
    at, _, box, former = addresses
    left = Flow("udp", at, 53, box)
    track(left, Flow("udp", at, 54, former), Flow("udp", at, 55, at))
    conntrack.delete("udp", family(at), [Destination({at}, range(53, 60), box)])
    assert tracked() == {left}


def test_entries_of_late_answers_are_deleted(addresses: tuple[str, str, str, str]) -> None:
    at, other, box, _ = addresses
    left = Flow("udp", other, 7, other, (at, 54))
    track(left, Flow("udp", other, 7, other, (at, 53)))
    wanted = [Destination({at}, range(53, 54), box)]
    assert conntrack.delete("udp", family(at), wanted)
    assert tracked() == {left._replace(client=None)}
    assert not conntrack.delete("udp", family(at), wanted)


@pytest.mark.parametrize("can_filter", [True, False])
def test_many_entries(can_filter: bool, addresses: tuple[str, str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    at, other, box, _ = addresses
    if not can_filter:  # as before Linux 6.9
        monkeypatch.setattr(conntrack._Entries, "_delete_filtered", lambda *_: False)
    left = Flow("tcp", other, 8000, box)
    track(left, *(Flow("tcp", at, 8000 + number % 2, box) for number in range(6000)))
    conntrack.delete("tcp", family(at), [Destination({at}, range(8000, 8002))])
    assert tracked() == {left}


def test_the_kernel_deletes_by_a_filter_in_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it can: then most entries are not deleted one by one."""
    one_by_one: list[int] = []
    delete_batch = conntrack._Entries._delete_batch

    def counted(entries: conntrack._Entries, tuples: list[bytes]) -> None:
        one_by_one[-1] += len(tuples)
        delete_batch(entries, tuples)

    monkeypatch.setattr(conntrack._Entries, "_delete_batch", counted)
    for at, other, box, of_other_family in ((HOST, OTHER, BOX, HOST6), (HOST6, OTHER6, BOX6, HOST)):
        flush()
        one_by_one.append(0)
        left = {
            Flow("tcp", of_other_family, 8000, of_other_family),
            Flow("udp", at, 8000, box),
            Flow("tcp", at, 8001, box),
            Flow("tcp", other, 8001, box),
        }
        track(*left, *(Flow("tcp", at, 8000, box) for _ in range(8000)))
        conntrack.delete("tcp", family(at), [Destination({at}, range(8000, 8001))])
        assert tracked() == left
    assert len({number < 6000 for number in one_by_one}) == 1, one_by_one


def test_an_older_kernel_deletes_nothing_by_a_filter() -> None:
    """Without the attribute that it does not know, the request must be invalid: it must not mean all entries."""
    track(Flow("tcp", HOST, 8000, BOX))
    port, address = (8000).to_bytes(2, "big"), socket.inet_aton(HOST)
    original, _ = conntrack._filter(6, conntrack._DESTINATION, port, address)
    body = netlink.NETFILTER_HEADER.pack(socket.AF_INET, 0, 0) + original
    with netlink.connect(netlink.NETFILTER) as sock:
        sock.send(netlink.pack_message(conntrack._DELETE, netlink.REQUEST | netlink.ACK, body))
        assert [*netlink.errors(sock)] == [errno.EINVAL]
    assert count() == 1


def test_a_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(netlink, "dump", refuse)
    with pytest.raises(HostRefused, match=r"cannot delete tracked connections of tcp ports 80-80 \(IPv4\): Operation"):
        conntrack.delete("tcp", 4, [Destination({HOST}, range(80, 81))])
    monkeypatch.setattr(conntrack, "_STATISTICS", 0x3F << 8)  # a part of netfilter that no kernel has
    with pytest.raises(Unsupported, match="this kernel has no access to tracked connections"):
        conntrack.delete("tcp", 4, [Destination({HOST}, range(80, 81))])


def test_entries_that_end_meanwhile_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    track(*(Flow("tcp", HOST, 80, BOX) for _ in range(300)))
    delete_batch = conntrack._Entries._delete_batch

    def delete_twice(entries: conntrack._Entries, tuples: list[bytes]) -> None:
        delete_batch(entries, tuples)
        delete_batch(entries, tuples)

    monkeypatch.setattr(conntrack._Entries, "_delete_batch", delete_twice)
    conntrack.delete("tcp", 4, [Destination({HOST}, range(80, 81))])
    assert not count()
