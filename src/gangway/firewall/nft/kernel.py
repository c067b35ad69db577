"""What the kernel has of nftables, read by netlink(7): other programs' base chains, and our own table.

libnftables reads the elements of every table's sets before it lists chains, and those of a table before it lists the
table's rules.  Beside another program's address lists that takes seconds.

Attributes, and what they mean: include/uapi/linux/netfilter/nf_tables.h.
"""

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from gangway.errors import HostRefused
from gangway.firewall.nft.elements import Element
from gangway.host import netlink
from gangway.host.netlink import attributes, pack_attribute, pack_nested

_NETFILTER = 12  # NETLINK_NETFILTER
_SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GET_CHAIN, _GET_RULE, _GET_ELEMENT = _SUBSYSTEM | 4, _SUBSYSTEM | 7, _SUBSYSTEM | 13
_HEADER = struct.Struct(">BBH")  # struct nfgenmsg: family, version, resource
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}  # NFPROTO_…
_VERSIONS = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_NUMBERS = {name: number for number, name in _FAMILIES.items()}
_FORWARD, _DROP = 2, 0  # NF_INET_FORWARD, NF_DROP
# NFTA_LIST_ELEM; NFTA_CHAIN_…, NFTA_HOOK_…, NFTA_RULE_…, NFTA_EXPR_…, NFTA_SET_ELEM_…
_LIST_ELEMENT = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE, _HOOK_NUMBER = 1, 3, 4, 5, 7, 1
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2, 4, 1, 2
_SET_TABLE, _SET_NAME, _SET_ELEMENTS, _ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_KEY_END = 1, 2, 3, 1, 2, 10
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE = 1, 2, 1
_IMMEDIATE_DATA, _TARGET_NAME = 2, 1
_ELEMENT_PARTS = (_ELEMENT_KEY, _ELEMENT_KEY_END, _ELEMENT_DATA)
_ATTEMPTS = 10


class Chain(NamedTuple):
    """A base chain of the type `filter` for what is forwarded."""

    family: str  # as nft names it
    table: str
    name: str
    policy: str  # accept or drop

    @property
    def versions(self) -> tuple[int, ...]:
        """The IP versions that it filters."""
        return _VERSIONS.get(self.family, ())

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


def forward_chains() -> list[Chain]:
    """Return the base chains for what is forwarded.  HostRefused: the kernel has no nftables."""
    return [chain for body in _dump(_GET_CHAIN, 0) if (chain := _forward_chain(body))]


def last_rule_drops(chain: Chain) -> bool | None:
    """True if a chain's last rule drops or rejects every packet; None if the chain has no rules."""
    place = pack_attribute(_RULE_TABLE, _packed(chain.table)), pack_attribute(_RULE_CHAIN, _packed(chain.name))
    rules = list(_dump(_GET_RULE, _NUMBERS[chain.family], *place))
    return _drops_all(rules[-1]) if rules else None


def chains_and_rules(table: str) -> tuple[bytes, ...]:
    """Return all chains and rules of a table such as `inet gangway`, in order, in the kernel's own words.

    They stay the same, byte by byte, until one is changed: ours count nothing.
    """
    family, _, name = table.partition(" ")
    at = pack_attribute(_CHAIN_TABLE, _packed(name))
    chains = (body for body in _dump(_GET_CHAIN, _NUMBERS[family]) if at in body)
    return (*chains, *_dump(_GET_RULE, _NUMBERS[family], pack_attribute(_RULE_TABLE, _packed(name))))


def elements(table: str, name: str) -> frozenset[Element]:
    """Return the elements of a set or map of a table such as `inet gangway`; none if there is no such set."""
    try:
        return frozenset(one for body in _dump(_GET_ELEMENT, *_set(table, name)) for one in _elements(body))
    except HostRefused:
        return frozenset()


def element(table: str, name: str, key: bytes) -> Element | None:
    """Return the element of a set or map that a packet with this key matches; None if there is none."""
    wanted = pack_nested(_LIST_ELEMENT, pack_nested(_ELEMENT_KEY, pack_attribute(_DATA_VALUE, key)))
    try:
        found = _request(_GET_ELEMENT, netlink.ACK, *_set(table, name), pack_nested(_SET_ELEMENTS, wanted))
        return next((one for _, body in found for one in _elements(body)), None)
    except HostRefused:
        return None


def _set(table: str, name: str) -> tuple[int, bytes, bytes]:
    family, _, short = table.partition(" ")
    return _NUMBERS[family], pack_attribute(_SET_TABLE, _packed(short)), pack_attribute(_SET_NAME, _packed(name))


def _elements(body: bytes) -> Iterator[Element]:
    for _, data in netlink.each_attribute(attributes(body, _HEADER.size).get(_SET_ELEMENTS, b"")):
        found = attributes(data)
        key, last, target = (found.get(kind, b"") for kind in _ELEMENT_PARTS)
        yield Element(_value(key), _value(last), _value(target))


def _forward_chain(body: bytes) -> Chain | None:
    found = attributes(body, _HEADER.size)
    hook = attributes(found.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
    if hook is None or _number(hook) != _FORWARD or _text(found.get(_CHAIN_TYPE, b"")) != "filter":
        return None
    policy = "drop" if _number(found.get(_CHAIN_POLICY, b"\1")) == _DROP else "accept"
    family = _FAMILIES.get(body[0], "")
    return Chain(family, _text(found[_CHAIN_TABLE]), _text(found[_CHAIN_NAME]), policy)


def _drops_all(rule: bytes) -> bool:
    """True if a rule drops or rejects every packet."""
    listed = netlink.each_attribute(attributes(rule, _HEADER.size).get(_RULE_EXPRESSIONS, b""))
    expressions = [attributes(data) for _, data in listed]
    rest = [one for one in expressions if _text(one[_EXPRESSION_NAME]) != "counter"]
    if len(rest) != 1:
        return False
    name, data = _text(rest[0][_EXPRESSION_NAME]), attributes(rest[0].get(_EXPRESSION_DATA, b""))
    if name == "target":  # of iptables
        return _text(data.get(_TARGET_NAME, b"")) in ("DROP", "REJECT")
    if name != "immediate":
        return name == "reject"
    verdict = attributes(attributes(data.get(_IMMEDIATE_DATA, b"")).get(_DATA_VERDICT, b""))
    return _number(verdict.get(_VERDICT_CODE, b"\1")) == _DROP


def _dump(kind: int, family: int, *filters: bytes) -> list[bytes]:
    """Return the messages of a dump, without their headers.

    One that was interrupted by a change may lack objects: it is repeated.
    """
    for _ in range(_ATTEMPTS):
        found = _request(kind, netlink.DUMP, family, *filters)
        if not any(flags & netlink.INTERRUPTED for flags, _ in found):
            break
    return [body for _, body in found]


def _request(kind: int, flags: int, family: int, *parts: bytes) -> list[tuple[int, bytes]]:
    """Return flags and body of each message of the answer.  HostRefused: there is none."""
    found: list[tuple[int, bytes]] = []
    try:
        with netlink.connect(_NETFILTER) as sock:
            sock.send(netlink.pack_message(kind, netlink.REQUEST | flags, _HEADER.pack(family, 0, 0) + b"".join(parts)))
            while True:
                data = sock.recv(netlink.BUFFER_BYTES)
                for start, answer, _ in netlink.messages(data):
                    if answer in (netlink.ERROR, netlink.DONE):
                        if code := netlink.error_code(data, start):
                            raise OSError(code, os.strerror(code))
                        return found
                    length, _, marks, _, _ = netlink.MESSAGE.unpack_from(data, start)
                    found.append((marks, data[start + netlink.MESSAGE.size : start + length]))
    except OSError as error:
        raise HostRefused(f"nftables: the kernel refuses to list it: {error.strerror}") from None


def _value(data: bytes) -> bytes:
    return attributes(data).get(_DATA_VALUE, data)  # a verdict has none


def _packed(text: str) -> bytes:
    return f"{text}\0".encode()


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value: bytes) -> int:
    return int.from_bytes(value)
