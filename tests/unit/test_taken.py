"""The mappings of a host, found by port: the same as looking at every one of them."""

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway.daemon.taken import Taken
from gangway.errors import Conflict
from gangway.model import Address, PortMapping, Protocol
from tests.unit.samples import APART, HOST_ADDRESSES, mapping, mappings


def taken(many: Iterable[PortMapping]) -> Taken:
    found = Taken()
    for one in many:
        found.add(one)
    return found


def holds(one: PortMapping, protocol: Protocol, address: Address, port: int) -> bool:
    """Whether a client that asks there meets a mapping."""
    return (
        one.protocol is protocol
        and one.host_ports.first <= port <= one.host_ports.last
        and one.host_address.version == address.version
        and (one.host_address == address or int(one.host_address) == 0)
    )


@given(APART, mappings())
@example([mapping("0.0.0.0", "8000-8004")], mapping("192.0.2.5", "8003"))
@example([mapping("192.0.2.5", "8003")], mapping("0.0.0.0", "8000-8004"))
@example([mapping("::", "8000")], mapping("0.0.0.0", "8000"))
def test_a_collision_is_found_if_there_is_one(many: list[PortMapping], more: PortMapping) -> None:
    found = taken(many).collision(more)
    assert (found is not None) == any(one.collides(more) for one in many)
    assert found is None or (found in many and found.collides(more))


@given(APART, st.sampled_from(Protocol), st.sampled_from(HOST_ADDRESSES), st.integers(7999, 8013))
def test_a_client_meets_the_mapping_that_holds_what_it_asks(
    many: list[PortMapping], protocol: Protocol, address: Address, port: int
) -> None:
    naive = [one for one in many if holds(one, protocol, address, port)]
    assert len(naive) <= 1
    assert taken(many).at(protocol, address, port) == (naive[0] if naive else None)


@given(APART, st.data())
def test_what_is_removed_leaves_its_place_to_another(many: list[PortMapping], data: st.DataObject) -> None:
    found = taken(many)
    gone = data.draw(st.lists(st.sampled_from(many), unique=True)) if many else []
    for one in gone:
        found.remove(one)
    for one in many:
        left = one not in gone
        assert (found.collision(one) == one) is left
        assert (found.at(one.protocol, one.host_address, one.host_ports.last) == one) is left
    for one in gone:
        found.add(one)
    assert all(found.collision(one) == one for one in many)


def test_who_has_a_port_is_told_and_nothing_is_added() -> None:
    first, second = mapping("0.0.0.0", "8000-8004"), mapping("192.0.2.5", "8003", "80", container="other")
    found = taken([first])
    with pytest.raises(Conflict, match=r"192\.0\.2\.5:8003:80/tcp is taken: container box has 0\.0\.0\.0:8000-8004"):
        found.add(second)
    found.remove(first)
    assert found.collision(second) is None


@pytest.mark.parametrize("ports", ["8000", "8000-8001"])
def test_what_is_not_there_cannot_be_removed(ports: str) -> None:
    with pytest.raises(ValueError, match="not in list"):
        taken([mapping("192.0.2.5", ports)]).remove(mapping("192.0.2.6", ports))
