"""Batches of datagrams: labels, order, and errors of single datagrams."""

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gangway.relay.core.batch import BATCH, Inbox, Outbox, read_label, write_label

_IP_PKTINFO = 8
_LARGEST_BYTES = 65507
_ADDRESS = struct.pack("@H", socket.AF_INET) + struct.pack("!H4s8x", 9, socket.inet_aton("127.0.0.1"))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two UDP sockets on loopback; the second reports destination addresses."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2))
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            sock.settimeout(5)
        other.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        yield one, other


def sockaddr(sock: socket.socket) -> bytes:
    """Return a socket's own address as a struct sockaddr_in."""
    address, port = sock.getsockname()
    return struct.pack("@H", socket.AF_INET) + struct.pack("!H4s8x", port, socket.inet_aton(address))


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 300), st.binary(min_size=12, max_size=20)), min_size=0, max_size=2
    )
)
def test_written_label_can_be_read(ancillary: list[tuple[int, int, bytes]]) -> None:
    room = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(20)
    assume(sum(socket.CMSG_SPACE(len(data)) for _, _, data in ancillary) <= room)
    assert read_label(write_label(_ADDRESS, ancillary).text) == (_ADDRESS, ancillary)


def test_batch_is_received_in_order_with_senders(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    sent = [b"", b"x" * _LARGEST_BYTES, *(b"%d" % number for number in range(BATCH))]
    for data in sent:
        one.sendto(data, other.getsockname())
    inbox, got = Inbox(), []
    while batch := [(read_label(label), bytes(data)) for label, data in inbox.receive(other.fileno())]:
        assert len(batch) <= BATCH
        got += batch
    assert [data for _, data in got] == sent
    for (sender, ancillary), _ in got:
        assert sender == sockaddr(one)
        assert [(level, kind, data[4:8]) for level, kind, data in ancillary] == [
            (socket.IPPROTO_IP, _IP_PKTINFO, socket.inet_aton("127.0.0.1"))
        ]


def test_batch_is_sent_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    outbox, errors = Outbox(), list[OSError]()
    sent = [b"x" * _LARGEST_BYTES, b"", b"last"]
    for data in sent:
        outbox.room()[: len(data)] = data
        outbox.add(len(data), write_label(sockaddr(other), []))
    outbox.send(one.fileno(), errors.append)
    assert [other.recv(1 << 16) for _ in sent] == sent
    assert (outbox.count, errors) == (0, [])


def test_failing_datagram_does_not_stop_the_others(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    outbox, errors = Outbox(), list[OSError]()
    foreign = [(socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, socket.inet_aton("192.0.2.1"), bytes(4)))]
    for data, ancillary in ((b"a", []), (b"b", foreign), (b"c", []), (b"d", foreign)):
        outbox.room()[:1] = data
        outbox.add(1, write_label(sockaddr(other), ancillary))
    outbox.send(one.fileno(), errors.append)
    assert [other.recv(10), other.recv(10)] == [b"a", b"c"]
    assert len(errors) == 2
