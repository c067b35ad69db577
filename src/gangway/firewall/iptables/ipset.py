"""Reads the sets of ipset(8), which iptables' rules match by `-m set`, by netlink(7): the tool need not be installed.

Attributes, and what they mean: include/uapi/linux/netfilter/ipset/ip_set.h.
"""

from collections.abc import Collection, Iterator, Mapping
from ipaddress import ip_network

from gangway.errors import HostRefused
from gangway.firewall.translations import Match
from gangway.host import netlink
from gangway.host.netlink import attributes, each_attribute, pack_attribute, text_of

_LIST = 6 << 8 | 7  # NFNL_SUBSYS_IPSET, IPSET_CMD_LIST
_PROTOCOL = b"\6"  # the oldest version that kernels understand: Linux 2.6.39
# IPSET_ATTR_…, of a set and of an entry; IPSET_ATTR_IPADDR_…
_VERSION, _NAME, _TYPE, _ENTRIES = 1, 2, 3, 8
_ADDRESS, _PREFIX, _PORT, _ENTRY_PROTOCOL, _FLAGS, _MEMBER = 1, 3, 4, 7, 8, 18
_VERSIONS = {1: 4, 2: 6}
_NO_MATCH = 1 << 2  # IPSET_FLAG_NOMATCH: an exception from a net


def set_matches(name: str, directions: str) -> Iterator[Match]:
    """Yield what the entries of a set match, as `-m set --match-set NAME DIRECTIONS`.  HostRefused: it cannot be read.

    What is compared with a packet's source does not matter.
    """
    for body in _listed(name):
        found = attributes(body, netlink.NETFILTER_HEADER.size)
        fields = text_of(found[_TYPE]).partition(":")[2].split(",")[:2]  # a third one is another address
        wanted = [field for field, to in zip(fields, directions.split(","), strict=False) if to == "dst"]
        for _, data in each_attribute(found.get(_ENTRIES, b"")):
            entry = attributes(data)
            if member := text_of(entry.get(_MEMBER, b"")):
                yield from set_matches(member, directions)
            elif not int.from_bytes(entry.get(_FLAGS, b"")) & _NO_MATCH:
                yield _match(entry, wanted)


def _listed(name: str) -> list[bytes]:
    body = netlink.NETFILTER_HEADER.pack(0, 0, 0)
    body += pack_attribute(_VERSION, _PROTOCOL) + pack_attribute(_NAME, f"{name}\0".encode())
    try:
        with netlink.connect(netlink.NETFILTER) as sock:
            request = netlink.pack_message(_LIST, netlink.REQUEST | netlink.DUMP, body)
            return [bytes(one) for one in netlink.listed(sock, request)]
    except OSError as error:
        raise HostRefused(f"the kernel refuses to list the ipset {name}: {error.strerror}") from None


def _match(entry: Mapping[int, bytes], fields: Collection[str]) -> Match:
    """Return what some fields of an entry require of a packet."""
    found = Match()
    if _ADDRESS in entry and not {"ip", "net"}.isdisjoint(fields):
        ((version, packed),) = attributes(entry[_ADDRESS]).items()
        length = int.from_bytes(entry[_PREFIX]) if _PREFIX in entry else 8 * len(packed)
        net = ip_network((packed, length), strict=False)
        found = Match(addresses=((int(net[0]), int(net[-1])),), family=_VERSIONS[version])
    if "port" in fields:
        protocol, port = (int.from_bytes(entry.get(kind, b"")) for kind in (_ENTRY_PROTOCOL, _PORT))
        found = found._replace(ports=((port, port),), protocols=((protocol, protocol),) if protocol else None)
    return found
