"""Entries of steering's trie: a range's keys are its ports and no others, and every byte is in its place."""

import re
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway import ebpf
from gangway.ebpf import port_table
from gangway.ebpf import steering_entries as layout
from gangway.ebpf.keys import KEY_BYTES, key_at, keys
from gangway.ebpf.redirect_entries import entries
from gangway.ebpf.steering_entries import KINDS, SERVED, TAKEN, VALUE_BYTES, row, stretch
from tests.unit.pretend_redirect import looked_up

MOST = 65535
PROTOCOLS = st.sampled_from(("tcp", "udp"))
PORTS = st.integers(1, MOST)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair)))
ADDRESSES = st.ip_addresses()
SOURCE = Path(layout.__file__).with_name("steering.bpf.c").read_text()
HEADER = (Path(ebpf.__file__).with_name("published.bpf.h")).read_text()


def is_four(address: IPv4Address | IPv6Address) -> bool:
    """As the kernel sees it: IPv6 maps IPv4's."""
    return address.version == 4 or address.ipv4_mapped is not None


@given(PROTOCOLS, ADDRESSES, RANGES, st.data())
@example("tcp", ip_address("0.0.0.0"), (1, MOST), None)
@example("udp", ip_address("::"), (MOST, MOST), None)
def test_the_keys_of_a_range_are_found_from_each_of_its_ports_and_from_no_other(
    protocol: str, host: IPv4Address | IPv6Address, ports: tuple[int, int], data: st.DataObject | None
) -> None:
    trie = dict.fromkeys(keys(protocol, host.packed, *ports), SERVED)
    first, last = ports
    edges = {max(first - 1, 0), first, last, min(last + 1, MOST)}
    drawn = set() if data is None else {data.draw(PORTS), data.draw(st.integers(first, last))}
    for asked in edges | drawn:
        found = looked_up(trie, key_at(protocol, host.packed, asked))
        assert found == (SERVED if first <= asked <= last else None)
    other = "udp" if protocol == "tcp" else "tcp"
    assert looked_up(trie, key_at(other, host.packed, first)) is None
    elsewhere = (int(host) ^ 1).to_bytes(len(host.packed), "big")
    assert looked_up(trie, key_at(protocol, elsewhere, first)) is None


@given(PROTOCOLS, ADDRESSES, RANGES)
@example("tcp", ip_address("0.0.0.0"), (1, MOST - 1))
@example("udp", ip_address("::"), (1, MOST))
@example("tcp", ip_address("::1"), (8000, 8000))
def test_the_stretches_of_the_keys_are_the_range_in_the_row_of_its_kind(
    protocol: str, host: IPv4Address | IPv6Address, ports: tuple[int, int]
) -> None:
    """In order, without a gap, and none twice."""
    stretches = [stretch(key) for key in keys(protocol, host.packed, *ports)]
    number = KINDS.index((protocol, 4 if is_four(host) else 6))
    assert {one[0] for one in stretches} == {number}
    assert (stretches[0][1], stretches[-1][2]) == ports
    assert all(last + 1 == first for (_, _, last), (_, first, _) in pairwise(stretches))
    assert len(stretches) <= 30


@given(PROTOCOLS, ADDRESSES, RANGES)
def test_the_keys_are_those_of_the_redirect(
    protocol: str, host: IPv4Address | IPv6Address, ports: tuple[int, int]
) -> None:
    found = list(keys(protocol, host.packed, *ports))
    assert found == [key for key, _ in entries(protocol, host.packed, ports, bytes(4), 80)]
    assert {len(key) for key in found} == {KEY_BYTES}


@pytest.mark.parametrize(("first", "last", "count"), [(80, 80, 1), (8000, 8010, 3), (1, MOST - 1, 30), (1, MOST, 16)])
def test_a_range_takes_as_many_keys_as_it_has_to(first: int, last: int, count: int) -> None:
    assert len(list(keys("tcp", bytes(4), first, last))) == count


def test_all_of_one_family_is_not_all_of_the_other() -> None:
    for at, other, number in ((bytes(4), bytes(16), 0), (bytes(16), bytes(4), 2)):
        (key,) = keys("tcp", at, 80, 80)
        assert looked_up({key: SERVED}, key_at("tcp", other, 80)) is None
        assert stretch(key) == (number, 80, 80)


def test_each_kind_has_a_row() -> None:
    rows = [row(*kind) for kind in (("tcp", 4), ("udp", 4), ("tcp", 6), ("udp", 6))]
    assert rows == [number.to_bytes(4, sys.byteorder) for number in range(4)]
    assert len(KINDS) == port_table.ROWS


@pytest.mark.parametrize("kind", [("sctp", 4), ("tcp", 5)])
def test_others_have_none(kind: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        row(*kind)


def test_sctp_has_no_keys() -> None:
    with pytest.raises(KeyError):
        list(keys("sctp", bytes(4), 80, 80))


def test_rows_and_values_are_what_the_programs_take_them_for() -> None:
    assert re.search(r"row_of\(bool is_udp, bool is_ipv6\) {\s+return is_udp \+ 2 \* is_ipv6;", SOURCE)
    assert f"enum {{ TAKEN = {TAKEN[0]}, SERVED = {SERVED[0]} }}" in SOURCE
    assert re.search(r"__type\(value, __u8\);[^}]*}\s*kept ", SOURCE)
    assert (len(TAKEN), len(SERVED), VALUE_BYTES) == (1, 1, 1)
    assert f"TABLE_ROWS = {port_table.ROWS}, TABLE_PORTS = {MOST + 1}" in HEADER
