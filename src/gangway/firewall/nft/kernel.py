"""What the kernel has of nftables, read by netlink(7): other programs' base chains, and our own table.

libnftables reads the elements of every table's sets before it lists chains, and those of a table before it lists the
table's rules.  Beside another program's address lists that takes seconds.

Attributes, and what they mean: include/uapi/linux/netfilter/nf_tables.h.
"""

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from gangway.errors import HostRefused
from gangway.firewall.nft.elements import Element
from gangway.host import netlink
from gangway.host.netlink import attributes, pack_attribute, pack_nested, text_of

_GET_CHAIN, _GET_RULE, _GET_SET, _GET_ELEMENT = (netlink.NFTABLES << 8 | number for number in (4, 7, 10, 13))
_HEADER_BYTES = netlink.NETFILTER_HEADER.size
_VERSIONS = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_NUMBERS = {name: number for number, name in netlink.TABLE_FAMILIES.items()}
_FORWARD, _DROP = 2, 0  # NF_INET_FORWARD, NF_DROP
_HOOKS = {0: "prerouting", 3: "output"}  # NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT
# NFTA_LIST_ELEM; NFTA_CHAIN_…, NFTA_HOOK_…, NFTA_RULE_…, NFTA_EXPR_…, NFTA_SET_ELEM_…
_LIST_ELEMENT = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE, _HOOK_NUMBER, _HOOK_PRIORITY = 1, 3, 4, 5, 7, 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2, 4, 1, 2
_SET_TABLE, _SET_NAME, _SET_ELEMENTS, _ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_KEY_END = 1, 2, 3, 1, 2, 10
_SET_FLAGS, _SET_ANONYMOUS, _SET_INTERVAL, _SET_MAP = 3, 1, 4, 8  # NFT_SET_…
_ELEMENT_FLAGS, _INTERVAL_END = 3, 1  # NFT_SET_ELEM_INTERVAL_END
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CODE, _VERDICT_CHAIN = 1, 2, 1, 2
_IMMEDIATE_DATA, _TARGET_NAME = 2, 1
_ELEMENT_PARTS = (_ELEMENT_KEY, _ELEMENT_KEY_END, _ELEMENT_DATA)

_MOST_BYTES = 2 << 20  # of a set: some 50,000 elements, which take two seconds


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


class NatChain(NamedTuple):
    """A base chain of the type `nat`."""

    family: str
    table: str
    name: str
    hook: str
    priority: int

    @property
    def versions(self) -> tuple[int, ...]:
        """The IP versions that it translates."""
        return _VERSIONS.get(self.family, ())


class SetElement(NamedTuple):
    """What an element of a set or map matches, and the chain that a verdict map leads to; without keys: anything."""

    first: bytes
    last: bytes
    target: str


def forward_chains() -> list[Chain]:
    """Return the base chains for what is forwarded.  HostRefused: the kernel has no nftables."""
    return [chain for body in _dump(_GET_CHAIN, 0) if (chain := _forward_chain(body))]


def last_rule_drops(chain: Chain) -> bool | None:
    """True if a chain's last rule drops or rejects every packet; None if the chain has no rules."""
    place = pack_attribute(_RULE_TABLE, _packed(chain.table)), pack_attribute(_RULE_CHAIN, _packed(chain.name))
    rules = list(_dump(_GET_RULE, _NUMBERS[chain.family], *place))
    return _drops_all(rules[-1]) if rules else None


def nat_chains(hooks: Collection[str]) -> list[NatChain]:
    """Return the base chains of the type `nat` in some hooks.  HostRefused: the kernel has no nftables."""
    return [chain for body in _dump(_GET_CHAIN, 0) if (chain := _nat_chain(body)) and chain.hook in hooks]


def rules(family: str, table: str) -> Iterator[tuple[str, list[tuple[str, dict[int, bytes]]]]]:
    """Yield the rules of a table, in order: the chain, and the name and attributes of each expression."""
    for body in _dump(_GET_RULE, _NUMBERS[family], pack_attribute(_RULE_TABLE, _packed(table))):
        yield text_of(attributes(body, _HEADER_BYTES)[_RULE_CHAIN]), _expressions(body)


def jump_target(immediate: Mapping[int, bytes]) -> str:
    """Return the chain that an expression `immediate` jumps or goes to; empty if it does neither."""
    return text_of(_verdict(immediate).get(_VERDICT_CHAIN, b""))


def value_of(data: bytes) -> bytes:
    """Return the value that an attribute of an expression has."""
    return attributes(data).get(_DATA_VALUE, b"")


def chains_and_rules(table: str) -> tuple[bytes, ...]:
    """Return all chains and rules of a table such as `inet gangway`, in order, in the kernel's own words.

    They stay the same, byte by byte, until one is changed: ours count nothing.
    """
    family, _, name = table.partition(" ")
    at = pack_attribute(_CHAIN_TABLE, _packed(name))
    chains = (body for body in _dump(_GET_CHAIN, _NUMBERS[family]) if at in body)
    return (*chains, *_dump(_GET_RULE, _NUMBERS[family], pack_attribute(_RULE_TABLE, _packed(name))))


def names(table: str) -> set[tuple[str, str]]:
    """Return the sets, maps and chains of a table such as `inet gangway`: what each is, as nft says, and its name.

    libnftables would read all elements before it lists a table without them.
    """
    family, _, name = table.partition(" ")
    at = pack_attribute(_CHAIN_TABLE, _packed(name))
    try:
        sets = [attributes(body, _HEADER_BYTES) for body in _dump(_GET_SET, _NUMBERS[family], at)]
    except HostRefused:  # there is no such table
        return set()
    chains = [attributes(body, _HEADER_BYTES) for body in _dump(_GET_CHAIN, _NUMBERS[family]) if at in body]
    flagged = [(_number(one.get(_SET_FLAGS, b"")), text_of(one[_SET_NAME])) for one in sets]
    named = {
        ("map" if flags & _SET_MAP else "set", set_name) for flags, set_name in flagged if not flags & _SET_ANONYMOUS
    }
    return named | {("chain", text_of(one[_CHAIN_NAME])) for one in chains}


def elements(table: str, name: str) -> frozenset[Element]:
    """Return the elements of a set or map of a table such as `inet gangway`; none if there is no such set."""
    try:
        return frozenset(one for body in _dump(_GET_ELEMENT, *_set(table, name)) for one in _elements(body))
    except HostRefused:
        return frozenset()


def set_elements(family: str, table: str, name: str) -> tuple[SetElement, ...]:
    """Return what the elements of a set or map match.  HostRefused: they cannot be read, or are too many."""
    place = pack_attribute(_SET_TABLE, _packed(table)), pack_attribute(_SET_NAME, _packed(name))
    with _connected() as sock:
        sock.send(_request(_GET_SET, netlink.ACK, _NUMBERS[family], *place))
        (head, *_), _ = netlink.answer(sock)
    is_interval = _number(attributes(bytes(head), _HEADER_BYTES).get(_SET_FLAGS, b"")) & _SET_INTERVAL
    bodies = _dump(_GET_ELEMENT, _NUMBERS[family], *place)
    if sum(map(len, bodies)) > _MOST_BYTES:
        raise HostRefused(f"nftables: {family} {table} has a set {name} that is too large to be read")
    listed = [
        attributes(data)
        for body in bodies
        for _, data in netlink.each_attribute(attributes(body, _HEADER_BYTES).get(_SET_ELEMENTS, b""))
    ]
    is_whole = not is_interval or any(_ELEMENT_KEY_END in one for one in listed)
    return tuple(map(_set_element, listed) if is_whole else _joined(listed))


def _set_element(found: Mapping[int, bytes], last: bytes = b"") -> SetElement:
    key = _value(found.get(_ELEMENT_KEY, b""))
    last = last or _value(found.get(_ELEMENT_KEY_END, b"")) or key
    return SetElement(key, last, jump_target({_IMMEDIATE_DATA: found.get(_ELEMENT_DATA, b"")}))


def _joined(listed: Iterable[Mapping[int, bytes]]) -> Iterator[SetElement]:
    """Yield the intervals of a set that lists where each begins and, as an element of its own, what comes after it."""
    begun: Mapping[int, bytes] | None = None
    ends = sorted(listed, key=lambda one: (_value(one.get(_ELEMENT_KEY, b"")), not _is_end(one)))
    for one in ends:
        key = _value(one.get(_ELEMENT_KEY, b""))
        if not key:  # `*`: what is in no interval
            yield _set_element(one)
            continue
        if begun is not None:
            yield _set_element(begun, (int.from_bytes(key) - 1).to_bytes(len(key)))
        begun = None if _is_end(one) else one
    if begun is not None:
        yield _set_element(begun, b"\xff" * len(_value(begun[_ELEMENT_KEY])))


def _is_end(found: Mapping[int, bytes]) -> bool:
    return bool(_number(found.get(_ELEMENT_FLAGS, b"")) & _INTERVAL_END)


def element(table: str, name: str, key: bytes) -> Element | None:
    """Return the element of a set or map that a packet with this key matches; None if there is none."""
    wanted = pack_nested(_LIST_ELEMENT, pack_nested(_ELEMENT_KEY, pack_attribute(_DATA_VALUE, key)))
    try:
        with _connected() as sock:
            sock.send(_request(_GET_ELEMENT, netlink.ACK, *_set(table, name), pack_nested(_SET_ELEMENTS, wanted)))
            bodies, _ = netlink.answer(sock)
        return next((one for body in bodies for one in _elements(bytes(body))), None)
    except HostRefused:
        return None


def _set(table: str, name: str) -> tuple[int, bytes, bytes]:
    family, _, short = table.partition(" ")
    return _NUMBERS[family], pack_attribute(_SET_TABLE, _packed(short)), pack_attribute(_SET_NAME, _packed(name))


def _elements(body: bytes) -> Iterator[Element]:
    for _, data in netlink.each_attribute(attributes(body, _HEADER_BYTES).get(_SET_ELEMENTS, b"")):
        found = attributes(data)
        key, last, target = (found.get(kind, b"") for kind in _ELEMENT_PARTS)
        yield Element(_value(key), _value(last), _value(target))


def _forward_chain(body: bytes) -> Chain | None:
    found = attributes(body, _HEADER_BYTES)
    hook = attributes(found.get(_CHAIN_HOOK, b"")).get(_HOOK_NUMBER)
    if hook is None or _number(hook) != _FORWARD or text_of(found.get(_CHAIN_TYPE, b"")) != "filter":
        return None
    policy = "drop" if _number(found.get(_CHAIN_POLICY, b"\1")) == _DROP else "accept"
    family = netlink.TABLE_FAMILIES.get(body[0], "")
    return Chain(family, text_of(found[_CHAIN_TABLE]), text_of(found[_CHAIN_NAME]), policy)


def _nat_chain(body: bytes) -> NatChain | None:
    found = attributes(body, _HEADER_BYTES)
    hook = attributes(found.get(_CHAIN_HOOK, b""))
    if not hook or text_of(found.get(_CHAIN_TYPE, b"")) != "nat":
        return None
    family, name = netlink.TABLE_FAMILIES.get(body[0], ""), _HOOKS.get(_number(hook[_HOOK_NUMBER]), "")
    priority = int.from_bytes(hook[_HOOK_PRIORITY], signed=True)
    return NatChain(family, text_of(found[_CHAIN_TABLE]), text_of(found[_CHAIN_NAME]), name, priority)


def _drops_all(rule: bytes) -> bool:
    """True if a rule drops or rejects every packet."""
    rest = [one for one in _expressions(rule) if one[0] != "counter"]
    if len(rest) != 1:
        return False
    name, data = rest[0]
    if name == "target":  # of iptables
        return text_of(data.get(_TARGET_NAME, b"")) in ("DROP", "REJECT")
    if name != "immediate":
        return name == "reject"
    return _number(_verdict(data).get(_VERDICT_CODE, b"\1")) == _DROP


def _expressions(rule: bytes) -> list[tuple[str, dict[int, bytes]]]:
    """Return the name and the attributes of each expression of a rule."""
    listed = netlink.each_attribute(attributes(rule, _HEADER_BYTES).get(_RULE_EXPRESSIONS, b""))
    found = (attributes(data) for _, data in listed)
    return [(text_of(one[_EXPRESSION_NAME]), attributes(one.get(_EXPRESSION_DATA, b""))) for one in found]


def _verdict(immediate: Mapping[int, bytes]) -> dict[int, bytes]:
    return attributes(attributes(immediate.get(_IMMEDIATE_DATA, b"")).get(_DATA_VERDICT, b""))


def _dump(kind: int, family: int, *filters: bytes) -> list[bytes]:
    """Return the messages of a dump, without their headers."""
    with _connected() as sock:
        return [bytes(body) for body in netlink.listed(sock, _request(kind, netlink.DUMP, family, *filters))]


def _request(kind: int, flags: int, family: int, *parts: bytes) -> bytes:
    body = netlink.NETFILTER_HEADER.pack(family, 0, 0) + b"".join(parts)
    return netlink.pack_message(kind, netlink.REQUEST | flags, body)


@contextmanager
def _connected() -> Iterator[socket.socket]:
    """Yield a socket for requests.  HostRefused: one failed."""
    try:
        with netlink.connect(netlink.NETFILTER) as sock:
            yield sock
    except OSError as error:
        raise HostRefused(f"nftables: the kernel refuses to list it: {error.strerror}") from None


def _value(data: bytes) -> bytes:
    return attributes(data).get(_DATA_VALUE, data)  # a verdict has none


def _packed(text: str) -> bytes:
    return f"{text}\0".encode()


def _number(value: bytes) -> int:
    return int.from_bytes(value)
