"""Host ports for a `-p`: taken whole, by a socket or by steering, or not at all."""

import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from gangway.ebpf.daemon_steering import Hold, Steered
from gangway.errors import Conflict, PortInUse, Unsupported
from gangway.host import sockets as ports
from gangway.model import parse_port
from gangway.plan import HostFacts
from gangway.reconcile.diff import HostPorts
from gangway.relay.client import Relay
from gangway.relay.settings import Settings
from gangway.state.allocate import Reserved, Reserving
from gangway.state.port_index import PortIndex
from tests.unit.pretend_steering import Pretended
from tests.unit.samples import NFTABLES, NO_STEERING, mapping, planned

FOUR, SIX = HostPorts("tcp", "0.0.0.0", 8000, 8010), HostPorts("tcp", "::", 8000, 8010)


class Office:
    """Where one asks for ports of a host, and who has got some."""

    def __init__(self) -> None:
        self.steered = Steered(Relay(Path("/nowhere"), Settings()))
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
        return not Pretended.made[-1].trie and all(sock.fileno() == -1 for sock in self.sockets.values())

    def close(self) -> None:
        self.steered.close()
        for sock in self.sockets.values():
            sock.close()


@pytest.fixture
def office(monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    monkeypatch.setattr("gangway.ebpf.daemon_steering.Steering", Pretended)
    monkeypatch.setattr(Pretended, "made", [], raising=False)
    made = Office()
    monkeypatch.setattr(ports, "bind_port", made.take)
    monkeypatch.setattr(ports, "first_port_in_use", lambda *_: None)
    monkeypatch.setattr(ports, "describe_holder", lambda _protocol, _address, port: f"port {port} is taken by somebody")
    yield made
    made.close()


def test_a_range_is_taken_by_steering_at_all_its_addresses(office: Office) -> None:
    mappings, reserved = office.ask("8000-8010:80-90")
    assert mappings == ["0.0.0.0:8000-8010:80-90/tcp", "[::]:8000-8010:80-90/tcp"]
    assert list(reserved) == [FOUR, SIX]
    assert len(Pretended.made[-1].trie) == 6
    for hold in reserved.values():
        assert isinstance(hold, Hold)
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
    assert Pretended.made[-1].trie == {}


def test_one_port_of_udp_is_taken_by_a_socket(office: Office) -> None:
    _, reserved = office.ask("127.0.0.1:53:53/udp")
    assert reserved == office.sockets
    assert list(reserved) == [HostPorts("udp", "127.0.0.1", 53, 53)]


@pytest.mark.parametrize("facts", [NFTABLES, NO_STEERING])
def test_what_cannot_be_had_at_one_address_is_had_at_none(
    office: Office, facts: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "first_port_in_use", lambda *of: 8003 if of[1] == "::" else None)
    office.refused[HostPorts("tcp", "::", 8003, 8003)] = PortInUse("it is taken")
    with pytest.raises(PortInUse, match="port 8003 is taken by somebody"):
        office.ask("8000-8010:80-90", facts)
    assert office.is_free()


def test_of_a_choice_the_next_one_is_tried(office: Office) -> None:
    for port in (8000, 8001):
        office.refused[HostPorts("tcp", "127.0.0.1", port, port)] = PortInUse("it is taken")
    mappings, reserved = office.ask("127.0.0.1:8000-8010:80")
    assert (mappings, list(reserved)) == (["127.0.0.1:8002:80/tcp"], [HostPorts("tcp", "127.0.0.1", 8002, 8002)])
    assert len(Pretended.made[-1].trie) == 1


def test_if_none_of_a_choice_is_free_that_is_told(office: Office) -> None:
    for port in range(8000, 8011):
        office.refused[HostPorts("tcp", "127.0.0.1", port, port)] = PortInUse("it is taken")
    with pytest.raises(PortInUse, match="none of the host ports 8000-8010 is free; the last one tried: it is taken"):
        office.ask("127.0.0.1:8000-8010:80")
    assert office.is_free()


def test_a_port_of_another_mapping_is_not_asked_for(office: Office) -> None:
    office.taken.add(mapping("0.0.0.0", "8010-8020", container="other"))
    with pytest.raises(Conflict, match=r"0\.0\.0\.0:8010-8020/tcp is already published for container other: choose"):
        office.ask("8000-8010:80-90")
    assert office.is_free()
    assert not office.sockets
    mappings, _ = office.ask("127.0.0.1:8009-8010:80")
    assert mappings == ["127.0.0.1:8009:80/tcp"]


@pytest.mark.parametrize("text", ["8000-8010:80-90", "8000:80"])
def test_without_ipv6_all_addresses_are_those_of_ipv4(
    office: Office, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "has_family", lambda family: family == 4)
    office.steered.close()
    office.steered = Steered(Relay(Path("/nowhere"), Settings()))
    mappings, reserved = office.ask(text)
    assert [one.address for one in reserved] == ["0.0.0.0"]
    assert len(mappings) == 1
    with pytest.raises(Unsupported, match="no sockets of IPv6"):
        office.ask(f"[::]:{text}")
