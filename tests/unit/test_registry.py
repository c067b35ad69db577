"""What is wanted, in memory and in a database: a later daemon reads what an earlier one has written."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given

from gangway.errors import Conflict, HostRefused, InvalidRequest
from gangway.model import Endpoint, Network, PortMapping, Protocol
from gangway.neighbours import further_neighbours
from gangway.reconcile.state import link_name
from gangway.state.database import Database, Place
from gangway.state.registry import Registry
from tests.unit.samples import APART, BACK, FOUR, INNER, NFTABLES, NO_REDIRECT, NONE, WEB, endpoint, mapping

PLACE = Place("/run/netns/box", 4026532000)
RANGE = mapping("0.0.0.0", "8000-8010", "80-90")
MAPPINGS = [RANGE, mapping("::", "8000-8010", "80-90"), mapping("127.0.0.1", "53", protocol=Protocol.UDP)]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    found = Database(tmp_path / "state.db")
    yield found
    found.close()


def decided(database: Database) -> Registry:
    """Return the registry of a daemon that starts."""
    found = Registry(database)
    found.decide(NFTABLES)
    return found


def add(registry: Registry, *mappings: PortMapping) -> None:
    """Add mappings as a request does, after their ports were reserved."""
    for one in mappings:
        registry.index.add(one)
    registry.add_mappings(mappings)


@pytest.fixture
def registry(database: Database) -> Registry:
    """A registry with a network, a container and its mappings."""
    found = decided(database)
    found.add_network(WEB, on_demand=False)
    found.add_endpoint(endpoint(WEB), PLACE)
    add(found, *MAPPINGS)
    return found


def content(registry: Registry) -> object:
    """Return everything that is wanted."""
    places = {one.container: registry.place(one.container) for one in registry.endpoints()}
    unneeded = {one.name for one in registry.networks if registry.is_unneeded(one.name)}
    return set(registry.networks), set(registry.endpoints()), set(registry.mappings()), places, unneeded


def test_later_daemon_reads_everything(database: Database, registry: Registry) -> None:
    for network, on_demand in ((BACK, False), (INNER, True), (replace(FOUR, bridge="br-4", mtu=9000), True)):
        registry.add_network(network, on_demand)
    registry.add_endpoint(endpoint(BACK, "pid:12"), Place("/proc/12/ns/net", 4026532001))
    later = decided(database)
    assert content(later) == content(registry)
    assert later.is_unneeded("inner")
    assert later.index.at(Protocol.TCP, ip_address("192.0.2.5"), 8005) == RANGE


def test_removed_things_are_removed_from_the_database(database: Database, registry: Registry) -> None:
    registry.remove_mappings(registry.mappings()[1:])
    assert content(decided(database)) == content(registry)
    registry.remove_container("box")
    assert content(decided(database)) == content(registry)
    registry.remove_network("web")
    later = decided(database)
    assert (later.networks, later.endpoints(), later.mappings(), later.plan()) == ((), (), (), None)
    assert later.index.collision(RANGE) is None
    assert registry.index.collision(RANGE) is None


def on_several(registry: Registry, *networks: Network) -> list[Endpoint]:
    """Put the container on more networks, and return all of its endpoints."""
    for one in networks:
        registry.add_network(one, on_demand=True)
        registry.add_endpoint(replace(endpoint(one), is_first=False), PLACE)
    return list(registry.endpoints_of("box"))


def test_endpoints_of_several_networks(database: Database, registry: Registry) -> None:
    first, back, four = on_several(registry, BACK, FOUR)
    for found in (registry, decided(database)):
        assert found.endpoint("box") == first
        assert {*found.endpoints_of("box")} == {first, back, four}
        assert (found.containers, found.network_of("box")) == (("box",), WEB)
        assert found.endpoints("back") == (back,)
        assert found.endpoints_of("box")[0].is_first
    assert registry.link_names("box") == (link_name("box"), link_name("box", "back"), link_name("box", "four"))
    registry.remove_endpoint(back)
    assert content(decided(database)) == content(registry)
    assert (registry.endpoints_of("box"), registry.is_unneeded("back")) == ((first, four), True)
    assert len(registry.mappings("box")) == len(MAPPINGS)
    registry.rename_endpoint("box", "bax")
    assert content(decided(database)) == content(registry)
    registry.remove_container("bax")
    assert content(decided(database)) == content(registry)
    assert (registry.endpoints(), registry.mappings(), registry.index.collision(RANGE)) == ((), (), None)


def test_mappings_belong_to_the_first_endpoint(registry: Registry) -> None:
    first, back = on_several(registry, BACK)
    assert registry.state_of_endpoints([back]).mappings == {}
    assert list(registry.state_of_endpoints([back]).attachments) == [link_name("box", "back")]
    assert list(registry.state_of_endpoints([back, first]).attachments) == [link_name("box", "back"), link_name("box")]
    assert len(registry.state_of_endpoints([back, first]).mappings) == len(MAPPINGS)


def test_neighbours_belong_to_the_further_endpoints(registry: Registry) -> None:
    first, back = on_several(registry, BACK)
    of_back = registry.state_of_endpoints([back]).neighbours
    assert of_back == {*further_neighbours(first, WEB, BACK)}
    assert registry.state_of_endpoints([back, first]).neighbours == of_back
    assert registry.state_of_endpoints([first]).neighbours == frozenset()
    plan = registry.plan()
    assert plan is not None
    assert plan.further == of_back
    assert registry.state(plan).neighbours == frozenset()  # the plan has them


def test_a_further_link_is_made_with_the_udp_ports_whose_clients_there_were_not_masqueraded(registry: Registry) -> None:
    endpoints = on_several(registry, BACK)
    add(registry, mapping("0.0.0.0", "5000", protocol=Protocol.UDP))
    made = registry.state_of_endpoints(endpoints).attachments.values()
    assert [[str(one.mapping) for one in link.udp] for link in made if link is not None] == [
        [],
        ["0.0.0.0:5000:5000/udp"],
    ]


def test_there_is_no_state_of_a_container_that_was_removed(registry: Registry) -> None:
    first, back = on_several(registry, BACK)
    published = registry.mappings("box")
    registry.remove_container("box")
    for one in (first, back):
        with pytest.raises(Conflict, match="no container named 'box' is attached"):
            registry.state_of_endpoints([one])
    with pytest.raises(Conflict, match="no container named 'box' is attached"):
        registry.state_of(published)


def test_a_container_whose_first_endpoint_is_damaged_keeps_its_ports(database: Database, registry: Registry) -> None:
    _, back = on_several(registry, BACK)
    with closing(sqlite3.connect(database.path)) as damaged, damaged:
        damaged.execute("UPDATE endpoints SET addresses = 'x' WHERE is_first")
    later = Database(database.path)
    found = decided(later)
    assert found.endpoint("box") == replace(back, is_first=True)
    assert {one.container_address for one in found.mappings("box")} == {*back.addresses}
    later.close()


@given(APART)
def test_any_mappings_are_stored(many: list[PortMapping]) -> None:
    with TemporaryDirectory() as folder:
        database = Database(Path(folder, "state.db"))
        registry = decided(database)
        registry.add_network(WEB, on_demand=False)
        registry.add_endpoint(endpoint(WEB), PLACE)
        add(registry, *many)
        assert {one.mapping for one in decided(database).mappings("box")} == set(many)
        database.close()


def test_mapping_that_cannot_be_stored_is_not_in_the_registry(database: Database, registry: Registry) -> None:
    """All mappings of a request are stored, or none."""
    before = content(registry)
    with pytest.raises(HostRefused, match=r"the database .* cannot be written"):
        registry.add_mappings([mapping("0.0.0.0", "9000"), RANGE])
    assert content(registry) == content(decided(database)) == before


def test_undecided_mappings_are_decided_by_the_first_facts(database: Database, registry: Registry) -> None:
    later = Registry(database)
    assert later.mappings() == ()
    later.decide(NONE)
    assert {one.mapping for one in later.mappings()} == set(MAPPINGS)
    assert not any(one.is_nat for one in later.mappings())


def test_changed_facts_change_every_decision(registry: Registry) -> None:
    assert all(one.is_redirected for one in registry.mappings())
    registry.decide(NO_REDIRECT)
    assert not any(one.is_redirected for one in registry.mappings())


def test_named_mappings(registry: Registry) -> None:
    def named(text: str) -> list[str]:
        return [str(one.mapping) for one in registry.named("box", text)]

    assert named("8000-8010:80-90") == ["0.0.0.0:8000-8010:80-90/tcp", "[::]:8000-8010:80-90/tcp"]
    assert named("0.0.0.0:8000-8010:80-90") == ["0.0.0.0:8000-8010:80-90/tcp"]
    assert named("127.0.0.1::53/udp") == ["127.0.0.1:53:53/udp"]
    for text in ("8000:80", "53/udp", "127.0.0.1:53:53"):
        with pytest.raises(Conflict, match="container box has no mapping -p "):
            named(text)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ([], ["172.30.0.3", "fd30::3"]),
        (["172.30.0.9"], ["172.30.0.9", "fd30::3"]),
        (["fd30::9", "172.30.0.9"], ["172.30.0.9", "fd30::9"]),
    ],
)
def test_addresses_of_a_new_endpoint(registry: Registry, wanted: list[str], given: list[str]) -> None:
    found = registry.addresses_for(WEB, [ip_address(one) for one in wanted])
    assert list(map(str, found)) == given


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [
        (["172.30.0.2"], Conflict, "address 172.30.0.2 is in use on network web"),
        (["172.30.0.1"], Conflict, "address 172.30.0.1 is in use on network web"),
        (["172.30.0.255"], InvalidRequest, "it is the network or broadcast address of 172.30.0.0/24"),
        (["172.30.1.2"], InvalidRequest, "address 172.30.1.2 is in no subnet of network web"),
        (["172.30.0.8", "172.30.0.9"], InvalidRequest, "or there are two for one subnet"),
    ],
)
def test_address_that_cannot_be_given(registry: Registry, wanted: list[str], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as refused:
        registry.addresses_for(WEB, [ip_address(one) for one in wanted])
    assert text in str(refused.value)


def test_unknown_names_are_refused_with_the_known_ones(registry: Registry) -> None:
    with pytest.raises(Conflict, match="no network named 'wob'; networks: web"):
        registry.network("wob")
    with pytest.raises(Conflict, match="no container named 'bax' is attached; attached: box"):
        registry.mappings("bax")


def test_state_of_the_whole_is_that_of_the_parts(registry: Registry) -> None:
    plan = registry.plan()
    assert plan is not None
    whole, part = registry.state(plan), registry.state_of_endpoints(registry.endpoints_of("box"))
    assert (whole.ports, whole.steered, whole.redirects) == (part.ports, part.steered, part.redirects)
    assert whole.attachments == part.attachments == {link_name("box"): part.attachments[link_name("box")]}
    assert (list(whole.bridges), whole.plan, whole.mappings) == (["gw-web"], plan, {})
    assert list(part.mappings) == list(map(str, MAPPINGS))
    assert registry.plan(without="web") is None


def test_protocol_without_sockets_has_no_ports_of_the_relay(registry: Registry) -> None:
    add(registry, mapping("0.0.0.0", "9000", protocol=Protocol.SCTP))
    registry.decide(replace(NFTABLES, missing_protocols=frozenset({Protocol.SCTP})))
    state = registry.state_of(registry.mappings())
    assert {ports.protocol for ports in state.ports} == {"tcp", "udp"}
    assert len(state.mappings) == 4


def test_database_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_text("not a database, but longer than a header of one hundred bytes " * 2)
    with pytest.raises(HostRefused, match=r".*state\.db is not a database of gangway's: name another one"):
        Database(tmp_path / "state.db")


def test_memory_of_the_database(database: Database) -> None:
    assert database.recall("setting") is None
    database.remember("setting", "1")
    database.remember("setting", "2")
    assert database.recall("setting") == "2"
    database.forget("setting")
    assert database.recall("setting") is None
