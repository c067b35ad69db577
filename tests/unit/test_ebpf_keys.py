"""Keys and values of the maps: a range's blocks are its ports and no others, and every byte is in its place."""

import ctypes
import re
import struct
import sys
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gangway import ebpf
from gangway.ebpf import keys
from gangway.ebpf.keys import KINDS, PortBlock, SteeringState, Target, blocks, pack_key, pack_target, unpack_target
from gangway.inet import pack_address

MOST = 65535
BOX = "172.17.0.2"
PROTOCOLS = st.sampled_from(("tcp", "udp"))
PORTS = st.integers(0, MOST)
RANGES = st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair)))
ADDRESSES = st.ip_addresses().map(str)
FOLDER = Path(ebpf.__file__).parent
HEADER, REDIRECT, STEERING = (FOLDER / name for name in ("published.bpf.h", "redirect.bpf.c", "steering.bpf.c"))
TYPES: dict[str, Any] = {
    "__u16": ctypes.c_uint16,
    "__be16": ctypes.c_uint16.__ctype_be__,
    "__u32": ctypes.c_uint32,
    "__u64": ctypes.c_uint64,
    "struct address": ctypes.c_uint8 * 16,
}


def canonical(address: str) -> str:
    """An IPv4-mapped address is the IPv4 address."""
    parsed = ip_address(address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def lookup(trie: dict[bytes, bytes], key: bytes) -> bytes | None:
    """As BPF_MAP_TYPE_LPM_TRIE does: of the entries whose prefix the key has, the one with the longest prefix."""

    def prefix(of: bytes) -> str:
        (bits,) = struct.unpack_from("=I", of)
        return "".join(f"{byte:08b}" for byte in of[4:])[:bits]

    found = [one for one in trie if prefix(key).startswith(prefix(one))]
    return trie[max(found, key=lambda one: len(prefix(one)))] if found else None


def single(protocol: str, address: str, port: int) -> bytes:
    """The key that a program looks up."""
    return pack_key(PortBlock(protocol, address, port, port))


# Blocks


@given(PROTOCOLS, ADDRESSES, RANGES)
@example("tcp", "0.0.0.0", (0, MOST))
@example("udp", "::", (1, MOST - 1))
@example("tcp", "::1", (MOST, MOST))
def test_the_blocks_of_a_range_are_its_ports(protocol: str, host: str, ports: tuple[int, int]) -> None:
    """In order, without gap or overlap, and each aligned to its size."""
    found = [*blocks(protocol, host, *ports)]
    assert {block[:2] for block in found} == {(protocol, canonical(host))}
    assert (found[0].first, found[-1].last) == ports
    assert all(one.last + 1 == other.first for one, other in pairwise(found))
    sizes = [block.last - block.first + 1 for block in found]
    assert all(size & (size - 1) == 0 and block.first % size == 0 for size, block in zip(sizes, found, strict=True))
    assert len(found) <= 30


@pytest.mark.parametrize(
    ("first", "last", "count"), [(80, 80, 1), (1, MOST - 1, 30), (1, MOST, 16), (0, MOST, 1), (1024, MOST, 6)]
)
def test_a_range_has_as_few_blocks_as_possible(first: int, last: int, count: int) -> None:
    assert len([*blocks("tcp", "0.0.0.0", first, last)]) == count


def test_blocks_of_a_small_range() -> None:
    found = [(block.first, block.last) for block in blocks("tcp", "0.0.0.0", 8000, 8010)]
    assert found == [(8000, 8007), (8008, 8009), (8010, 8010)]


# Keys


@given(PROTOCOLS, ADDRESSES, RANGES)
def test_a_key_stands_for_its_block(protocol: str, host: str, ports: tuple[int, int]) -> None:
    for block in blocks(protocol, host, *ports):
        assert keys.unpack_key(pack_key(block)) == block


@given(PROTOCOLS, ADDRESSES, RANGES, st.data())
@example("tcp", "0.0.0.0", (1, MOST), None)
@example("udp", "::", (MOST, MOST), None)
def test_a_lookup_finds_the_ports_of_the_range_and_no_others(
    protocol: str, host: str, ports: tuple[int, int], data: st.DataObject | None
) -> None:
    trie = {pack_key(block): b"found" for block in blocks(protocol, host, *ports)}
    first, last = ports
    edges = {max(first - 1, 0), first, last, min(last + 1, MOST)}
    drawn = set() if data is None else {data.draw(PORTS), data.draw(st.integers(first, last))}
    for port in edges | drawn:
        assert lookup(trie, single(protocol, host, port)) == (b"found" if first <= port <= last else None)
    other = "udp" if protocol == "tcp" else "tcp"
    assert lookup(trie, single(other, host, first)) is None
    elsewhere = str(type(ip_address(host))(int(ip_address(host)) ^ 1))
    assert lookup(trie, single(protocol, elsewhere, first)) is None


def test_all_addresses_of_one_family_are_not_those_of_the_other() -> None:
    for address, other in (("0.0.0.0", "::"), ("::", "0.0.0.0")):
        trie = {single("tcp", address, 80): b"found"}
        assert lookup(trie, single("tcp", address, 80)) == b"found"
        assert lookup(trie, single("tcp", other, 80)) is None


def test_sctp_has_no_keys() -> None:
    with pytest.raises(KeyError):
        single("sctp", "0.0.0.0", 80)


@given(ADDRESSES)
@example("::ffff:172.17.0.2")
@example("::1.2.3.4")
def test_an_address_is_unpacked_in_its_canonical_form(address: str) -> None:
    assert keys.unpack_address(pack_address(address)) == canonical(address)


def test_an_ipv4_address_is_packed_as_ipv6_maps_it() -> None:
    assert pack_address(BOX) == ip_address(f"::ffff:{BOX}").packed
    assert pack_address("::") == bytes(16)


# Values


@given(RANGES.flatmap(lambda ports: st.tuples(st.just(ports), st.integers(*ports))), PORTS, ADDRESSES)
@example(((8000, 8010), 8010), MOST, "fd30::2")
def test_a_port_is_as_far_into_the_target_as_into_its_block(
    ports_and_port: tuple[tuple[int, int], int], container_first: int, container: str
) -> None:
    """Modulo 65536: the kernel calculates with 16 bits."""
    ports, port = ports_and_port
    (block,) = (block for block in blocks("udp", "::", *ports) if block.first <= port <= block.last)
    value = pack_target(block, Target(container, container_first))
    expected = (container_first + port - block.first) % (MOST + 1)
    assert unpack_target(value, port) == Target(canonical(container), expected, 0)


@given(ADDRESSES, PORTS, st.integers(0, 2**64 - 1))
def test_a_value_has_its_use_count(container: str, port: int, uses: int) -> None:
    value = pack_target(PortBlock("tcp", "0.0.0.0", 80, 80), Target(container, port))
    assert unpack_target(value[:-8] + number(uses, 8), 80) == Target(canonical(container), port, uses)


@pytest.mark.parametrize(
    ("block", "target", "spans"),
    [
        (PortBlock("tcp", "::1", 80, 80), Target(BOX, 90), [(2, 90, 90), (0, 80, 80)]),
        (PortBlock("udp", "0.0.0.0", 8000, 8007), Target(BOX, 90), [(3, 90, 97), (1, 8000, 8007)]),
    ],
)
def test_a_redirect_counts_for_the_containers_ports_and_the_hosts(
    block: PortBlock, target: Target, spans: list[keys.Span]
) -> None:
    assert list(keys.redirect_spans(block, pack_target(block, target))) == spans


@given(PROTOCOLS, ADDRESSES, RANGES)
def test_steering_counts_in_the_row_of_protocol_and_family(protocol: str, host: str, ports: tuple[int, int]) -> None:
    for block in blocks(protocol, host, *ports):
        row = KINDS.index((protocol, 6 if ":" in canonical(host) else 4))
        every, reserved = ((one, block.first, block.last) for one in (row, row + len(KINDS)))
        assert list(keys.steering_spans(block, SteeringState.SERVED)) == [every, reserved]
        assert list(keys.steering_spans(block, SteeringState.RESERVED)) == [every, reserved]
        assert list(keys.steering_spans(block, SteeringState.HELD)) == [every]


def test_each_protocol_and_family_has_a_row() -> None:
    rows = [keys.pack_kind(*kind) for kind in (("tcp", 4), ("udp", 4), ("tcp", 6), ("udp", 6))]
    assert rows == [number(row, 4) for row in range(4)]


@pytest.mark.parametrize("kind", [("sctp", 4), ("tcp", 5)])
def test_other_kinds_have_no_row(kind: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match="not in tuple"):
        keys.pack_kind(*kind)


@pytest.mark.parametrize("pair", [("tcp", 80), ("udp", 65535)])
def test_an_auto_bound_port_is_unpacked(pair: tuple[str, int]) -> None:
    protocol, port = pair
    assert keys.unpack_auto_bound(number((protocol == "udp") << 16 | port, 4)) == pair


# As the programs read them


def number(value: int, size: int) -> bytes:
    """In this machine's byte order."""
    return value.to_bytes(size, sys.byteorder)


def test_every_byte_of_an_entry_for_all_ipv4_addresses() -> None:
    block = PortBlock("tcp", "0.0.0.0", 8000, 8000)
    assert pack_key(block) == number(176, 4) + number(6, 4) + bytes(10) + b"\xff\xff" + bytes(4) + b"\x1f\x40"
    value = bytes(10) + b"\xff\xff\xac\x11\x00\x02" + number(80 - 8000 + 65536, 2) + bytes(6) + bytes(8)
    assert pack_target(block, Target(BOX, 80)) == value


def test_every_byte_of_an_entry_for_a_range_at_an_ipv6_address() -> None:
    (block,) = blocks("udp", "2001:db8::5", 5000, 5007)
    assert pack_key(block) == number(173, 4) + number(17, 4) + ip_address("2001:db8::5").packed + b"\x13\x88"
    value = ip_address("fd30::2").packed + number(10, 2) + bytes(6) + bytes(8)
    assert pack_target(block, Target("fd30::2", 5010)) == value


def struct_of(name: str, source: Path) -> type[ctypes.Structure]:
    """A struct of the programs, from their source."""
    found = re.search(rf"^struct {name} {{(.*?)^}}(.*?);", source.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    fields = re.findall(r"^\s+(struct \w+|\w+) (\w+)(?:\[(\d+)\])?;", found[1], re.MULTILINE)
    kinds = [(field, TYPES[kind] * int(many) if many else TYPES[kind]) for kind, field, many in fields]
    packed = {"_pack_": 1} if "packed" in found[2] else {}
    return type(name, (ctypes.Structure,), {**packed, "_fields_": kinds})


def test_keys_and_values_have_the_layout_of_the_programs_structs() -> None:
    port_key, target = struct_of("port_key", HEADER), struct_of("target", REDIRECT)
    assert (ctypes.sizeof(port_key), ctypes.sizeof(target)) == (keys.KEY_BYTES, keys.TARGET_BYTES) == (26, 32)
    block = PortBlock("udp", "2001:db8::5", 5000, 5000)
    key = port_key.from_buffer_copy(pack_key(block))
    value = target.from_buffer_copy(pack_target(block, Target("fd30::2", 5010))[:-8] + number(7, 8))
    host, container = (ip_address(text).packed for text in ("2001:db8::5", "fd30::2"))
    assert (key.prefix_bits, key.protocol, bytes(key.address), key.port) == (176, 17, host, 5000)
    assert (bytes(value.address), value.shift, value.uses) == (container, 10, 7)


def test_rows_and_states_are_those_of_the_programs() -> None:
    steering = STEERING.read_text()
    assert re.search(r"row_of\(bool is_udp, bool is_ipv6\) {\s+return is_udp \+ 2 \* is_ipv6;", steering)
    states = ", ".join(f"{state.name} = {state[0]}" for state in SteeringState)
    assert f"enum {{ {states} }}" in steering
    assert re.search(r"__type\(value, __u8\);[^}]*}\s*published ", steering)
    assert {len(state) for state in SteeringState} == {keys.STATE_BYTES} == {1}
    assert f"SOCKET_ROWS = {len(KINDS)}, RESERVED_ROWS = {len(KINDS)} }}" in steering
    assert "enum rows { HOST_PORTS, CONTAINER_PORTS = 2 };" in REDIRECT.read_text()
    for source, rows in ((steering, keys.STEERING_ROWS), (REDIRECT.read_text(), keys.REDIRECT_ROWS)):
        assert f"enum {{ COUNT_ROWS = {rows} }}" in source
    assert f"enum {{ COUNTED_PORTS = {MOST + 1} }}" in HEADER.read_text()
