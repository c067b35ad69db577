"""The index of host ports finds the same mappings as a search through all of them."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.errors import Conflict
from gangway.model import Address, PortMapping, Protocol, Source
from gangway.state.port_index import PortIndex
from tests.unit.samples import APART, HOST_ADDRESSES, collide, lease, mapping, mappings

ANY4 = ip_address("0.0.0.0")


def index_of(many: Iterable[PortMapping]) -> PortIndex:
    found = PortIndex()
    for one in many:
        found.add(one)
    return found


def serves(one: PortMapping, protocol: Protocol, address: Address, port: int) -> bool:
    """True if the mapping serves clients of an address and port."""
    return (
        one.protocol is protocol
        and one.host_ports.first <= port <= one.host_ports.last
        and one.host_address.version == address.version
        and (one.host_address == address or int(one.host_address) == 0)
    )


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (mapping("0.0.0.0", "80"), mapping("10.0.0.1", "80"), True),
        (mapping("10.0.0.1", "80"), mapping("10.0.0.2", "80"), False),
        (mapping("10.0.0.1", "80-90"), mapping("10.0.0.1", "90-99"), True),
        (mapping("10.0.0.1", "80-89"), mapping("10.0.0.1", "90-99"), False),
        (mapping("0.0.0.0", "80"), mapping("::", "80"), False),
        (mapping("::", "80"), mapping("fd00::1", "80"), True),
        (mapping("0.0.0.0", "80"), mapping("0.0.0.0", "80", protocol=Protocol.UDP), False),
    ],
)
def test_mappings_collide_if_they_have_an_address_and_a_port_in_common(
    one: PortMapping, other: PortMapping, wanted: bool
) -> None:
    assert index_of([one]).collision(other) == (one if wanted else None)
    assert index_of([other]).collision(one) == (other if wanted else None)
    assert collide(one, other) == wanted


@given(APART, mappings())
@example([mapping("0.0.0.0", "8000-8004")], mapping("192.0.2.5", "8003"))
@example([mapping("192.0.2.5", "8003")], mapping("0.0.0.0", "8000-8004"))
@example([mapping("::", "8000")], mapping("0.0.0.0", "8000"))
def test_collision_is_found_if_there_is_one(many: list[PortMapping], more: PortMapping) -> None:
    found = index_of(many).collision(more)
    assert (found is not None) == any(collide(one, more) for one in many)
    assert found is None or (found in many and collide(found, more))


@given(APART, st.sampled_from(Protocol), st.sampled_from(HOST_ADDRESSES), st.integers(7999, 8013))
def test_lookup_finds_the_mapping_that_serves_a_port(
    many: list[PortMapping], protocol: Protocol, address: Address, port: int
) -> None:
    naive = [one for one in many if serves(one, protocol, address, port)]
    assert len(naive) <= 1
    assert index_of(many).at(protocol, address, port) == (naive[0] if naive else None)


@given(APART, st.data())
def test_ports_of_a_removed_mapping_are_free(many: list[PortMapping], data: st.DataObject) -> None:
    found = index_of(many)
    removed = data.draw(st.lists(st.sampled_from(many), unique=True)) if many else []
    for one in removed:
        found.remove(one)
    for one in many:
        left = one not in removed
        assert (found.collision(one) == one) is left
        assert (found.at(one.protocol, one.host_address, one.host_ports.last) == one) is left
    for one in removed:
        found.add(one)
    assert all(found.collision(one) == one for one in many)


def test_conflict_names_the_owner_and_adds_nothing() -> None:
    first, second = mapping("0.0.0.0", "8000-8004"), mapping("192.0.2.5", "8003", "80", container="other")
    found = index_of([first])
    with pytest.raises(Conflict, match=r"^0\.0\.0\.0:8000-8004/tcp is already published for container box: choose"):
        found.add(second)
    found.remove(first)
    assert found.collision(second) is None


def test_conflict_with_a_lease_names_docker() -> None:
    found = index_of([lease("0.0.0.0"), lease("::1", "80", protocol=Protocol.UDP)])
    with pytest.raises(Conflict) as refused:
        found.add(mapping("127.0.0.1", "7999-8001"))
    assert str(refused.value) == "0.0.0.0:8000/tcp is published by Docker for 172.17.0.2: choose another port"
    with pytest.raises(Conflict, match=r"^\[::1\]:80/udp is published by Docker for 172\.17\.0\.2: choose"):
        found.add(lease("::1", "80", protocol=Protocol.UDP, container="172.17.0.3"))


@pytest.mark.parametrize("there", ["192.0.2.5", "0.0.0.0"])
@pytest.mark.parametrize("ports", ["8000", "8000-8001", "8001-8004"])
def test_removing_an_unknown_mapping_is_an_error(ports: str, there: str) -> None:
    found = index_of([mapping(there, "8000-8001")])
    with pytest.raises(KeyError):
        found.remove(mapping("192.0.2.6", ports))
    with pytest.raises(KeyError):
        found.remove(mapping(there, "8001"))
    assert found.collision(mapping(there, "8001")) is not None


@pytest.mark.parametrize(
    ("ports", "collides"),
    [
        ("8004-8005", False),
        ("8004-8006", True),
        ("8011-8020", False),
        ("8000-8006", True),
        ("8006-8007", True),
        ("8010", True),
        ("8010-8011", True),
        ("8008-8009", True),
        ("1-65535", True),
        ("1-8006", True),
        ("8011-65535", False),
        ("1-8005", False),
    ],
)
@pytest.mark.parametrize("at", ["192.0.2.5", "2001:db8::5", "0.0.0.0", "::"])
def test_adjacent_ranges_do_not_collide(at: str, ports: str, collides: bool) -> None:
    there = mapping(at, "8006-8010")
    found = index_of([there])
    assert found.collision(mapping(at, ports)) == (there if collides else None)
    if not collides:
        found.add(mapping(at, ports))
        assert found.at(Protocol.TCP, there.host_address, 8006) == there


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize(
    ("at", "other", "collides"),
    [
        ("192.0.2.5", "192.0.2.6", False),
        ("0.0.0.0", "192.0.2.6", True),
        ("192.0.2.5", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("::", "2001:db8::5", True),
        ("::1", "::", True),
        ("::1", "2001:db8::5", False),
        ("0.0.0.0", "::", False),
        ("::", "0.0.0.0", False),
        ("::", "192.0.2.5", False),
        ("0.0.0.0", "2001:db8::5", False),
    ],
)
def test_unspecified_address_covers_its_family(at: str, other: str, collides: bool, protocol: Protocol) -> None:
    there, more = mapping(at, "8000-8010", protocol=protocol), mapping(other, "8010-8020", protocol=protocol)
    found = index_of([there])
    assert found.collision(more) == (there if collides else None)
    for apart in Protocol:
        if apart is not protocol:
            assert found.collision(mapping(other, "8010-8020", protocol=apart)) is None


def places(one: PortMapping) -> set[tuple[Protocol, Address, int]]:
    """Return each address and port of a mapping, of the addresses used in tests."""
    every = HOST_ADDRESSES if one.host_address.is_unspecified else (one.host_address,)
    ports = range(one.host_ports.first, one.host_ports.last + 1)
    family = [address for address in every if address.version == one.host_address.version]
    return {(one.protocol, address, port) for address in family for port in ports}


@given(st.lists(mappings(), max_size=10))
def test_mapping_is_refused_if_one_of_its_ports_is_in_use(many: list[PortMapping]) -> None:
    found, there = PortIndex(), dict[tuple[Protocol, Address, int], PortMapping]()
    for one in many:
        before = {there[place] for place in places(one) if place in there}
        if not before:
            found.add(one)
            there |= dict.fromkeys(places(one), one)
        else:
            assert found.collision(one) in before
            with pytest.raises(Conflict):
                found.add(one)
    for protocol, address, port in {place for one in many for place in places(one)}:
        assert found.at(protocol, address, port) == there.get((protocol, address, port))


def test_all_ports_of_an_address_in_one_mapping() -> None:
    every = mapping("0.0.0.0", "1-65535")
    found = index_of([every])
    assert [found.at(Protocol.TCP, every.host_address, port) for port in (1, 8000, 65535)] == [every] * 3
    with pytest.raises(
        Conflict, match=r"^0\.0\.0\.0:1-65535/tcp is already published for container box: choose another port$"
    ):
        found.add(mapping("127.0.0.1", "65535"))
    found.remove(every)
    found.add(mapping("127.0.0.1", "65535"))


def test_lease_and_held_mapping_may_have_the_same_port() -> None:
    held, leased = replace(mapping("0.0.0.0", "80"), source=Source.DOCKER, is_held=True), lease("0.0.0.0", "80")
    for first, second in ((held, leased), (leased, held)):
        index = index_of([first, second])
        assert index.at(Protocol.TCP, ANY4, 80) == held
        index.remove(held)
        assert index.at(Protocol.TCP, ANY4, 80) == leased
    with pytest.raises(Conflict):
        index_of([held, mapping("0.0.0.0", "80")])
    with pytest.raises(Conflict):
        index_of([leased, mapping("0.0.0.0", "80")])
