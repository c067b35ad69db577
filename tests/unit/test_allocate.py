"""Host ports for a `-p`: taken whole, by a socket or by steering, or not at all."""

import socket
from collections.abc import Iterator
from functools import partial

import pytest

from gangway.ebpf.program import LinkHolder
from gangway.ebpf.steering import Reservation, Steering
from gangway.errors import Conflict, PortInUse, Unsupported
from gangway.host import sockets as ports
from gangway.model import parse_port
from gangway.plan import HostFacts
from gangway.reconcile.diff import HostPorts
from gangway.state.allocate import Reserved, Reserving
from gangway.state.port_index import PortIndex
from lab.holder import Holder
from tests.unit.samples import NFTABLES, NO_STEERING, mapping, planned

FOUR, SIX = HostPorts("tcp", "0.0.0.0", 8000, 8010), HostPorts("tcp", "::", 8000, 8010)


class FakeSteering(Steering):
    """Reserves whatever it is asked for, except what is in `refused`."""

    def __init__(self, relay: LinkHolder) -> None:
        self.reserved: set[HostPorts] = set()
        self.refused: dict[HostPorts, Exception] = {}

    def reserve(self, protocol: str, address: str, first: int, last: int) -> Reservation:
        ports = HostPorts(protocol, address, first, last)
        if ports in self.refused:
            raise self.refused[ports]
        self.reserved.add(ports)
        return Reservation(self, ports)

    def release(self, protocol: str, address: str, first: int, last: int) -> None:
        self.reserved.discard(HostPorts(protocol, address, first, last))


class Office:
    """Where one asks for ports of a host, and who has got some."""

    def __init__(self) -> None:
        self.steered = FakeSteering(Holder())
        self.taken = PortIndex()
        self.sockets: dict[HostPorts, socket.socket] = {}
        """All that were opened."""
        self.refused: dict[HostPorts, Exception] = {}

    def ask(self, text: str, facts: HostFacts = NFTABLES) -> tuple[list[str], Reserved]:
        """The mappings, and what takes their ports."""
        reserving = Reserving("box", self.taken, self.steered, partial(planned, facts=facts))
        mappings, reserved = reserving.reserve(parse_port(text))
        for at, found in reserved.items():
            if isinstance(found, socket.socket):
                self.sockets[at] = found
        return [str(one) for one in mappings], reserved

    def take(self, protocol: str, address: str, port: int) -> socket.socket:
        """As the kernel gives a port, but that it is none."""
        at = HostPorts(protocol, address, port, port)
        if at in self.refused:
            raise self.refused[at]
        self.sockets[at] = socket.socket()
        return self.sockets[at]

    def is_free(self) -> bool:
        """Nobody has any port."""
        return not self.steered.reserved and all(sock.fileno() == -1 for sock in self.sockets.values())

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    made = Office()
    monkeypatch.setattr(ports, "take", made.take)
    monkeypatch.setattr(ports, "named", lambda _protocol, _address, port: f"port {port} is taken by somebody")
    yield made
    made.close()


def test_a_range_is_taken_by_steering_at_all_its_addresses(office: Office) -> None:
    mappings, reserved = office.ask("8000-8010:80-90")
    assert mappings == ["0.0.0.0:8000-8010:80-90/tcp", "[::]:8000-8010:80-90/tcp"]
    assert list(reserved) == [FOUR, SIX]
    assert office.steered.reserved == {FOUR, SIX}
    for hold in reserved.values():
        assert isinstance(hold, Reservation)
        hold.close()
    assert office.is_free()


@pytest.mark.parametrize(
    ("text", "facts", "protocol"),
    [("127.0.0.1:8000-8002:80-82", NO_STEERING, "tcp"), ("127.0.0.1:8000-8002:80-82/sctp", NFTABLES, "sctp")],
)
def test_where_nothing_is_steered_each_port_is_taken_by_a_socket(
    office: Office, text: str, facts: HostFacts, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "has_sockets", lambda _protocol: True)
    mappings, reserved = office.ask(text, facts)
    assert mappings == [f"127.0.0.1:8000-8002:80-82/{protocol}"]
    assert list(reserved) == [HostPorts(protocol, "127.0.0.1", port, port) for port in (8000, 8001, 8002)]
    assert list(reserved.values()) == list(office.sockets.values())
    assert not office.steered.reserved


def test_one_port_of_udp_is_taken_by_a_socket(office: Office) -> None:
    _, reserved = office.ask("127.0.0.1:53:53/udp")
    assert reserved == office.sockets
    assert list(reserved) == [HostPorts("udp", "127.0.0.1", 53, 53)]


@pytest.mark.parametrize("facts", [NFTABLES, NO_STEERING])
def test_what_cannot_be_had_at_one_address_is_had_at_none(office: Office, facts: HostFacts) -> None:
    office.steered.refused[SIX] = PortInUse("port 8003 is taken by somebody")
    office.refused[HostPorts("tcp", "::", 8003, 8003)] = PortInUse("it is taken")
    with pytest.raises(PortInUse, match="port 8003 is taken by somebody"):
        office.ask("8000-8010:80-90", facts)
    assert office.is_free()


def test_of_a_choice_the_next_one_is_tried(office: Office) -> None:
    for port in (8000, 8001):
        office.steered.refused[HostPorts("tcp", "127.0.0.1", port, port)] = PortInUse("it is taken")
    mappings, reserved = office.ask("127.0.0.1:8000-8010:80")
    assert (mappings, list(reserved)) == (["127.0.0.1:8002:80/tcp"], [HostPorts("tcp", "127.0.0.1", 8002, 8002)])
    assert len(office.steered.reserved) == 1


def test_if_none_of_a_choice_is_free_that_is_told(office: Office) -> None:
    for port in range(8000, 8011):
        office.steered.refused[HostPorts("tcp", "127.0.0.1", port, port)] = PortInUse("it is taken")
    with pytest.raises(PortInUse, match="none of the host ports 8000-8010 is free; the last one tried: it is taken"):
        office.ask("127.0.0.1:8000-8010:80")
    assert office.is_free()


def test_a_port_of_another_mapping_is_not_asked_for(office: Office) -> None:
    office.taken.add(mapping("0.0.0.0", "8010-8020", container="other"))
    with pytest.raises(Conflict, match=r"8000-8010:80-90/tcp is taken: container other has 0\.0\.0\.0:8010-8020"):
        office.ask("8000-8010:80-90")
    assert office.is_free()
    assert not office.sockets
    mappings, _ = office.ask("127.0.0.1:8009-8010:80")
    assert mappings == ["127.0.0.1:8009:80/tcp"]


@pytest.mark.parametrize("text", ["8000-8010:80-90", "8000:80"])
def test_without_ipv6_all_addresses_are_those_of_ipv4(office: Office, text: str) -> None:
    last = 8010 if "-" in text else 8000
    office.steered.refused[HostPorts("tcp", "::", 8000, last)] = Unsupported("this kernel has no IPv6 sockets")
    mappings, reserved = office.ask(text)
    assert [one.address for one in reserved] == ["0.0.0.0"]
    assert len(mappings) == 1
    with pytest.raises(Unsupported, match="no IPv6 sockets"):
        office.ask(f"[::]:{text}")
