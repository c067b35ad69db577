"""Which clients are admitted: the subnets that are requested, and what the relay decides by them."""

from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.admission import MOST_SUBNETS, parse_admitted, parse_label
from gangway.errors import InvalidRequest
from gangway.relay import protocol
from gangway.relay.core.library import End, Subnet, library
from gangway.state.database import Database
from gangway.state.parked import ParkedPorts
from tests.unit.samples import admitting, mapping

ADDRESSES = st.ip_addresses().filter(lambda one: getattr(one, "ipv4_mapped", None) is None)
SUBNETS = st.tuples(ADDRESSES, st.integers(0, 32)).map(lambda pair: ip_network(pair, strict=False))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], ""),
        (["fd00::/8", "10.1.0.0/16", "10.0.0.0/16", "192.0.2.5"], "10.0.0.0/15 192.0.2.5/32 fd00::/8"),
        (["10.0.0.0/8", "10.2.0.0/16", "10.0.0.0/8"], "10.0.0.0/8"),
        (["0.0.0.0/0", "fe80::/10"], "0.0.0.0/0 fe80::/10"),
    ],
)
def test_subnets_are_sorted_and_merged(texts: list[str], expected: str) -> None:
    assert " ".join(map(str, parse_admitted(texts))) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "write ADDRESS/PREFIX-LENGTH"),
        ("10.0.0.0/8,", "write ADDRESS/PREFIX-LENGTH"),
        ("office", "write ADDRESS/PREFIX-LENGTH"),
        ("10.1.0.0/8", "write 10.0.0.0/8"),
        ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
        ("fe80::1%eth0", "without a zone"),
        (",".join(f"10.0.{2 * number}.0/24" for number in range(MOST_SUBNETS + 1)), "too many"),
    ],
)
def test_invalid_label_says_what_to_write(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        parse_label(text)


def test_relay_takes_as_many_subnets_as_may_be_requested() -> None:
    assert protocol.MOST_SUBNETS == MOST_SUBNETS


@given(st.lists(SUBNETS, min_size=1, max_size=5), st.data())
def test_relay_admits_the_addresses_of_the_subnets(subnets: list, data: st.DataObject) -> None:  # type: ignore[type-arg]
    inside = data.draw(st.sampled_from(subnets).flatmap(lambda one: st.ip_addresses(network=one)))
    client = data.draw(ADDRESSES | st.just(inside))
    asked = [Subnet.of(str(one)) for one in subnets]
    is_within = any(client in one for one in subnets if one.version == client.version)
    admits = library.core_admits((Subnet * len(asked))(*asked), len(asked), End.at(str(client)))
    assert bool(admits) is is_within


def test_parked_port_that_was_published_anew_has_its_last_clients(tmp_path: Path) -> None:
    parked = ParkedPorts(Database(tmp_path / "state.db"))
    for_all = replace(mapping("0.0.0.0"), container="docker:box")
    restricted = admitting(for_all, "10.0.0.0/8")
    parked.park("3fa9", "docker:box", [for_all])
    parked.park("3fa9", "docker:box", [restricted])
    assert parked.of("3fa9", "docker:box") == [restricted]
    parked.remove([for_all])
    assert parked.of("3fa9", "docker:box") == []


def test_parked_ports_stay_restricted(tmp_path: Path) -> None:
    with_clients, without = admitting(mapping("0.0.0.0"), "10.0.0.0/8", "fd00::/8"), mapping("::", "9000-9001")
    database = Database(tmp_path / "state.db")
    ParkedPorts(database).park("3fa9", "docker:box", [with_clients, without])
    assert ParkedPorts(database).of("3fa9", "box") == [with_clients, without]
    database.remember("parked", '{"3fa9": ["0.0.0.0:8000:8000/tcp"]}')  # by a daemon that did not store names
    assert [str(one) for one in ParkedPorts(database).of("3fa9", "box")] == ["0.0.0.0:8000:8000/tcp"]
    database.remember("parked", '{"3fa9": ["0.0.0.0:8000:8000/tcp 10.0.0.0/99"]}')
    assert ParkedPorts(database).of("3fa9", "box") == []
