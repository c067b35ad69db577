"""Entries of the redirect's trie: each port of a range is found and no other, and every byte is in its place."""

import ctypes
import re
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway import ebpf
from gangway.ebpf import redirect_entries as layout
from gangway.ebpf.keys import KEY_BYTES, key_at, sixteen, unpacked
from gangway.ebpf.redirect_entries import VALUE_BYTES, Led, entries, led_to, ports_of, without_count
from tests.unit.pretend_redirect import looked_up

MOST = 65535
BOX = ip_address("172.17.0.2").packed
PROTOCOLS = st.sampled_from(("tcp", "udp"))
PORTS = st.integers(0, MOST)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair)))
ADDRESSES = st.ip_addresses()
SOURCE = Path(layout.__file__).with_name("redirect.bpf.c")
HEADER = Path(ebpf.__file__).with_name("published.bpf.h")
TYPES: dict[str, Any] = {
    "__u16": ctypes.c_uint16,
    "__be16": ctypes.c_uint16.__ctype_be__,
    "__u32": ctypes.c_uint32,
    "__u64": ctypes.c_uint64,
    "struct address": ctypes.c_uint8 * 16,
}


def of_range(first: int, last: int) -> list[tuple[int, int, int]]:
    """The blocks of these ports: a row, the first and the last."""
    found = entries("tcp", bytes(4), (first, last), BOX, 80)
    return [list(ports_of(key, value))[-1] for key, value in found]


@given(RANGES)
@example((0, MOST))
@example((1, MOST - 1))
@example((MOST, MOST))
def test_the_blocks_of_a_range_are_its_ports(ports: tuple[int, int]) -> None:
    """In order, without a gap, and none twice; each begins where one of its size can."""
    blocks = [block[1:] for block in of_range(*ports)]
    assert (blocks[0][0], blocks[-1][1]) == ports
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(blocks))
    sizes = [last - first + 1 for first, last in blocks]
    assert all(size & (size - 1) == 0 and first % size == 0 for size, (first, _) in zip(sizes, blocks, strict=True))
    assert len(blocks) <= 30


def test_a_range_takes_as_many_entries_as_it_has_to() -> None:
    assert of_range(8000, 8010) == [(0, 8000, 8007), (0, 8008, 8009), (0, 8010, 8010)]
    assert [len(of_range(*ports)) for ports in ((80, 80), (1, MOST - 1), (0, MOST), (1024, MOST))] == [1, 30, 1, 6]


@given(PROTOCOLS, ADDRESSES, RANGES, st.data())
def test_whoever_asks_for_a_port_of_the_range_finds_it_and_nobody_else(
    protocol: str, host: IPv4Address | IPv6Address, ports: tuple[int, int], data: st.DataObject
) -> None:
    trie = dict(entries(protocol, host.packed, ports, BOX, ports[0]))
    first, last = ports
    asked = data.draw(
        st.integers(first, last) | PORTS | st.sampled_from(sorted({max(first - 1, 0), min(last + 1, MOST)}))
    )
    found = looked_up(trie, key_at(protocol, host.packed, asked))
    assert (found is not None) == (first <= asked <= last)
    other = "udp" if protocol == "tcp" else "tcp"
    assert looked_up(trie, key_at(other, host.packed, asked)) is None
    elsewhere = (int(host) ^ 1).to_bytes(len(host.packed), "big")
    assert looked_up(trie, key_at(protocol, elsewhere, asked)) is None


def test_all_of_one_family_is_not_all_of_the_other() -> None:
    four, six = bytes(4), bytes(16)
    for at, other in ((four, six), (six, four)):
        trie = dict(entries("tcp", at, (80, 80), BOX, 80))
        assert looked_up(trie, key_at("tcp", at, 80)) is not None
        assert looked_up(trie, key_at("tcp", other, 80)) is None


@given(RANGES.flatmap(lambda ports: st.tuples(st.just(ports), st.integers(*ports))), PORTS, ADDRESSES)
@example(((8000, 8010), 8010), MOST, ip_address("fd30::2"))
def test_a_port_leads_as_far_into_the_containers_range_as_it_is_into_the_hosts(
    asked_in: tuple[tuple[int, int], int], container_first: int, container: IPv4Address | IPv6Address
) -> None:
    """Modulo 65536, where a range is moved past the end: the kernel counts with 16 bits."""
    ports, asked = asked_in
    trie = dict(entries("udp", bytes(16), ports, container.packed, container_first))
    value = looked_up(trie, key_at("udp", bytes(16), asked))
    assert value is not None
    port = (container_first + asked - ports[0]) % (MOST + 1)
    as_told = getattr(container, "ipv4_mapped", None) or container
    assert led_to(value, asked) == Led(as_told.packed, port, 0)


def test_a_range_may_be_moved_past_the_end_and_back() -> None:
    ((_, value),) = entries("tcp", bytes(4), (60000, 60000), BOX, 80)
    assert [led_to(value, port).port for port in (60000, 60001, 59919)] == [80, 81, MOST]


@given(PROTOCOLS, ADDRESSES, PORTS)
def test_what_is_looked_up_is_the_entry_of_that_port_alone(
    protocol: str, host: IPv4Address | IPv6Address, port: int
) -> None:
    ((key, value),) = entries(protocol, host.packed, (port, port), BOX, 80)
    assert key == key_at(protocol, host.packed, port)
    row = int(protocol == "udp")
    assert list(ports_of(key, value)) == [(2 + row, 80, 80), (row, port, port)]


def test_the_containers_ports_of_a_moved_range_go_along() -> None:
    found = [list(ports_of(key, value)) for key, value in entries("udp", bytes(4), (8000, 8010), BOX, 90)]
    assert found == [
        [(3, 90, 97), (1, 8000, 8007)],
        [(3, 98, 99), (1, 8008, 8009)],
        [(3, 100, 100), (1, 8010, 8010)],
    ]


@given(ADDRESSES, RANGES, st.integers(0, 2**64 - 1))
def test_a_value_without_its_count_is_as_it_was_entered(
    container: IPv4Address | IPv6Address, ports: tuple[int, int], redirected: int
) -> None:
    _, value = next(entries("tcp", bytes(4), ports, container.packed, 80))
    used = value[:-8] + redirected.to_bytes(8, sys.byteorder)
    assert led_to(used, ports[0]).redirected == redirected
    assert without_count(used) == without_count(value) == value


@given(PROTOCOLS, ADDRESSES, RANGES)
def test_the_blocks_of_a_range_can_be_told_by_their_keys(
    protocol: str, host: IPv4Address | IPv6Address, ports: tuple[int, int]
) -> None:
    found = [unpacked(key) for key, _ in entries(protocol, host.packed, ports, BOX, 80)]
    as_told = getattr(host, "ipv4_mapped", None) or host
    assert {one[:2] for one in found} == {({"tcp": 6, "udp": 17}[protocol], as_told.packed)}
    assert [one[2:] for one in found] == [block[1:] for block in of_range(*ports)]


def test_sctp_has_no_entries() -> None:
    with pytest.raises(KeyError):
        list(entries("sctp", bytes(4), (80, 80), BOX, 80))


def number(value: int, size: int) -> bytes:
    """As this machine has it."""
    return value.to_bytes(size, sys.byteorder)


def test_every_byte_of_a_mapping_of_all_ipv4_addresses() -> None:
    ((key, value),) = entries("tcp", bytes(4), (8000, 8000), BOX, 80)
    assert key == number(176, 4) + number(6, 4) + bytes(10) + b"\xff\xff" + bytes(4) + b"\x1f\x40"
    assert value == bytes(10) + b"\xff\xff\xac\x11\x00\x02" + number(80 - 8000 + 65536, 2) + bytes(6) + bytes(8)


def test_every_byte_of_a_mapping_of_a_range_at_an_ipv6_address() -> None:
    host, box = ip_address("2001:db8::5").packed, ip_address("fd30::2").packed
    ((key, value),) = entries("udp", host, (5000, 5007), box, 5010)
    assert key == number(173, 4) + number(17, 4) + host + b"\x13\x88"
    assert value == box + number(10, 2) + bytes(6) + bytes(8)


def test_an_ipv4_address_has_sixteen_bytes_as_ipv6_maps_it() -> None:
    assert sixteen(BOX) == ip_address("::ffff:172.17.0.2").packed
    assert sixteen(bytes(16)) == bytes(16)


def as_in_the_kernel(name: str, source: Path) -> type[ctypes.Structure]:
    """A struct of a program in the kernel."""
    found = re.search(rf"^struct {name} {{(.*?)^}}(.*?);", source.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    fields = re.findall(r"^\s+(struct \w+|\w+) (\w+)(?:\[(\d+)\])?;", found[1], re.MULTILINE)
    kinds = [(field, TYPES[kind] * int(many) if many else TYPES[kind]) for kind, field, many in fields]
    packed = {"_pack_": 1} if "packed" in found[2] else {}
    return type(name, (ctypes.Structure,), {**packed, "_fields_": kinds})


def test_keys_and_values_are_laid_out_as_the_programs_read_them() -> None:
    published, backend = as_in_the_kernel("published", HEADER), as_in_the_kernel("backend", SOURCE)
    assert (ctypes.sizeof(published), ctypes.sizeof(backend)) == (KEY_BYTES, VALUE_BYTES) == (26, 32)
    host, box = ip_address("2001:db8::5").packed, ip_address("fd30::2").packed
    ((key, value),) = entries("udp", host, (5000, 5000), box, 5010)
    asked, led = published.from_buffer_copy(key), backend.from_buffer_copy(value[:-8] + number(7, 8))
    assert (asked.prefix_bits, asked.protocol, bytes(asked.address), asked.port) == (176, 17, host, 5000)
    assert (bytes(led.address), led.shift, led.redirected) == (box, 10, 7)
