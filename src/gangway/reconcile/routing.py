"""Reads how the kernel routes what a rule would translate: the clients and sources that have to be relayed instead.

Facts that it leans on:

* What comes in by an interface is forwarded if that interface's own switch is on; the host's switch sets all of them,
  but any of them can be changed later (net/ipv4/route.c, ip_route_input_slow: IN_DEV_FORWARD).  IPv6 has one switch for
  the whole host (net/ipv6/ip6_output.c, ip6_forward); the interface's own only says whether it is a router's.
* A policy rule `from ADDRESS` routes what a socket of the host sends from that address.  A container's answer is routed
  by the container's address, before its source is translated back: it would leave by the main table's way.  For the
  same reason a packet of the host's own from such an address, once its destination is translated, is routed by the
  rule's table, which need not have a route to the container.
"""

import socket
from collections.abc import Collection, Iterator
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from gangway.facts import Detour, LostSource
from gangway.host import dump, sysctl
from gangway.host.links import attempting
from gangway.host.sockets import UNREACHABLE
from gangway.inet import FAMILIES
from gangway.model import Address, is_interface_name
from gangway.reasons import Code, Reason

_USUAL_TABLES = (253, 254, 255)  # default, main, local: include/uapi/linux/rtnetlink.h
# Nobody has these addresses, so their route is the default one.
_FAR = UNREACHABLE


class Routing(NamedTuple):
    """The interfaces and addresses whose connections no rule can carry."""

    detours: tuple[Detour, ...] = ()
    lost_sources: tuple[LostSource, ...] = ()
    closed_bridges: tuple[str, ...] = ()  # bridges of gangway's that forward nothing, though the host forwards
    unwritable: tuple[str, ...] = ()  # why others of them cannot be made to


def read_routing(bridges: Collection[int], forwarding: Collection[int]) -> Routing:
    """Read it.  `bridges` are the numbers of gangway's own bridges, `forwarding` the families that are forwarded."""
    with attempting("list addresses and policy rules"):
        # Each container's veth has a link-local address.
        texts = (one for one in dump.interface_addresses() if not one[1].startswith("fe80:"))
        found = ((ifindex, ip_address(text)) for ifindex, text in texts)
        own = sorted((one for one in found if _is_routed(one[1])), key=str)
        off = dump.not_forwarding(socket.AF_INET) if 4 in forwarding else frozenset()
        detours = list(_unforwarding(own, off - {dump.LOOPBACK_IFINDEX, *bridges}))
        lost: list[LostSource] = []
        for family in FAMILIES:
            of_family = [one for one in own if one[1].version == family]
            routed = dict(_source_routed(family, of_family, bridges))
            detours += _ways_of(routed, of_family, bridges)
            gateways = [address for ifindex, address in of_family if ifindex in bridges]
            lost += _lost(routed, of_family, gateways)
        closed = [_name(ifindex) for ifindex in sorted(off & {*bridges})]
        why = {name: sysctl.unwritable(f"net/ipv4/conf/{name}/forwarding") for name in closed}
    unwritable = tuple(unwritable_switch(_setting_of(name), reason) for name, reason in why.items() if reason)
    writable = tuple(name for name, reason in why.items() if not reason)
    return Routing(tuple(one for one in detours if is_interface_name(one.interface)), tuple(lost), writable, unwritable)


def unwritable_switch(setting: str, reason: str) -> str:
    """Return the fact of a plan's reason: which switch is off, and why it cannot be turned on."""
    return f"{setting} is off and cannot be written ({reason})"


def host_addresses() -> list[tuple[str, Address]]:
    """Return the host's addresses, each with the name of its interface."""
    with attempting("list addresses"):
        return [(_name(ifindex), ip_address(text)) for ifindex, text in dump.interface_addresses()]


def _is_routed(address: Address) -> bool:
    return not (address.is_loopback or (address.version == 6 and address.is_link_local))


def _unforwarding(own: Collection[tuple[int, Address]], off: Collection[int]) -> Iterator[Detour]:
    """Yield the interfaces with an address whose switch is `off`."""
    for ifindex in dict.fromkeys(ifindex for ifindex, address in own if address.version == 4 and ifindex in off):
        name = _name(ifindex)
        addresses = frozenset(address for at, address in own if at == ifindex and address.version == 4)
        yield Detour(name, 4, addresses, Reason(Code.NOT_FORWARDED_FROM, _setting_of(name)))


def _setting_of(interface: str) -> str:
    """Return the name of an interface's switch, as sysctl(8) spells it."""
    return f"net/ipv4/conf/{interface}/forwarding" if "." in interface else f"net.ipv4.conf.{interface}.forwarding"


def _source_routed(
    family: int, own: Collection[tuple[int, Address]], bridges: Collection[int]
) -> Iterator[tuple[tuple[int, Address], Reason]]:
    """Yield the host's addresses that a policy rule routes, but not the containers' addresses as well."""
    gateways = [address for ifindex, address in own if ifindex in bridges]
    for rule in dump.source_rules(FAMILIES[family]):
        subnet = ip_network(rule.source)
        if rule.table not in _USUAL_TABLES and not any(gateway in subnet for gateway in gateways):
            reason = Reason(Code.SOURCE_ROUTED, f"from {subnet} lookup {rule.table}")
            yield from ((one, reason) for one in own if one[1] in subnet)


def _ways_of(
    routed: dict[tuple[int, Address], Reason], own: Collection[tuple[int, Address]], bridges: Collection[int]
) -> Iterator[Detour]:
    """Yield the interfaces that clients of these addresses come in by: the address's own, and that of its answers."""
    reached: dict[tuple[int, Reason], list[Address]] = {}
    for (ifindex, address), reason in routed.items():
        way = dump.way_to(_FAR[address.version], str(address))
        for at in {ifindex, way.ifindex if way else 0} - {0, dump.LOOPBACK_IFINDEX, *bridges}:
            reached.setdefault((at, reason), []).append(address)
    for (at, reason), addresses in reached.items():
        beside = [address for ifindex, address in own if ifindex == at]
        yield Detour(_name(at), addresses[0].version, frozenset((*addresses, *beside)), reason)


def _lost(
    routed: dict[tuple[int, Address], Reason], own: Collection[tuple[int, Address]], gateways: Collection[Address]
) -> Iterator[LostSource]:
    """Yield the addresses from which the host's packets would not get to the network of one of the gateways."""
    sources = {address: dump.way_to(str(address)) for _, address in own} if routed else {}
    for (_, address), reason in routed.items():
        if any(_way(gateway, address) != _way(gateway) for gateway in gateways):
            requested = (at for at, way in sources.items() if way is not None and way.source == str(address))
            yield LostSource(address, frozenset(requested), reason)


def _way(gateway: Address, source: Address | None = None) -> tuple[int, str] | None:
    """Return the interface and gateway of the host's packets to another address of this gateway's network."""
    number = int(gateway)
    # The last bits become 01 or 10: neither the network's own address nor a broadcast address.
    beside = type(gateway)(number ^ (3 if number & 3 in (1, 2) else 1))
    way = dump.way_to(str(beside), str(source or ""))
    return None if way is None else (way.ifindex, way.gateway)


def _name(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:  # it was removed meanwhile, and a notification comes
        return ""
