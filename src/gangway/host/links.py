"""Links, addresses and routes, by rtnetlink: changed by pyroute2, listed by `dump`.  Facts that it leans on:

* A bridge takes the lowest MAC address of its ports unless it was given one (net/bridge/br_stp_if.c,
  br_stp_recalculate_bridge_id): as ports come and go, containers would remember a wrong one.  An interface that is
  created again with the same IP addresses gets the same MAC address: others remember it for half a minute (arp(7)).
* A bridge would accept its containers' router advertisements, and spend two seconds on duplicate address detection for
  its own link-local address, in which it forwards no IPv6 (ip-sysctl.rst: accept_ra, accept_dad).
* `hairpin` lets a frame leave by the port that it came in by: a container that connects to itself by a published port
  needs it where br_netfilter translates within the bridge.  `isolated` ports reach the bridge itself, and no other
  isolated port (bridge(8)).
* Deleting a bridge frees its ports; deleting one end of a veth pair deletes the other, and so does the end of the
  namespace that it is in (veth(4)).
* An alias (ip-link(8)) marks the links that gangway created; it changes no others.  It is set last, so a link without
  one was not finished by a daemon that was killed.
"""

import errno
import os
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import blake2s
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_network
from itertools import count
from socket import if_indextoname, if_nametoindex
from typing import Any

from gangway.errors import HostRefused
from gangway.host import dump, netns, probe, sysctl
from gangway.inet import FAMILIES

Interface = IPv4Interface | IPv6Interface
"""An address with its subnet."""
Link = dump.Link

_NO_DUPLICATE_DETECTION = 0x02  # IFA_F_NODAD, include/uapi/linux/if_addr.h: usable at once
_MAIN_TABLE = 254
_RTPROT_KERNEL, _RTPROT_RA = 2, 9  # include/uapi/linux/rtnetlink.h: RA: from a router advertisement
_SCOPE_LINK = 253  # RT_SCOPE_LINK
_PREFIX_METRIC = 256  # include/net/ip6_route.h, IP6_RT_PRIO_ADDRCONF: of the route that comes with an IPv6 address


class Links:
    """The links of the calling thread's network namespace."""

    @cached_property
    def _route(self) -> Any:
        return _open_iproute()

    def close(self) -> None:
        if "_route" in self.__dict__:
            self._route.close()

    def all(self) -> dict[str, Link]:
        """Return all links, by name."""
        with attempting("list links"):
            return {link.name: link for link in dump.links()}

    def exists(self, *names: str) -> bool:
        """True if there is a link of one of these names; each costs one system call, however many links there are."""
        return any(map(_index, names))

    def bridges(self) -> list[Link]:
        """Return the bridges: of a thousand containers' links only the few that are needed."""
        with attempting("list bridges"):
            return dump.links("bridge")

    @contextmanager
    def inside(self, name: str, namespace: str) -> Iterator[tuple["Links", str]]:
        """Yield the links of a namespace, and the name there of the other end of the veth `name`; for a `with` block.

        The calling thread is in the namespace meanwhile.  HostRefused: the other end is not there.
        """
        peer = self.all()[name].peer
        with netns.entered(namespace):
            there = Links()
            try:
                with attempting(f"find the other end of {name} in {namespace}"):
                    found = if_indextoname(peer)
                yield there, found
            finally:
                there.close()

    def interface_addresses(self) -> list[dump.InterfaceAddress]:
        with attempting("list addresses"):
            return dump.prefixed_addresses()

    def routes(self, family: int, ifindex: int = 0) -> list[dump.Route]:
        """Return the routes of a family (4 or 6) in the main table, or those of them by one interface."""
        with attempting("list routes"):
            return main_routes(dump.routes(FAMILIES[family], ifindex))

    def create_bridge(
        self, name: str, alias: str, addresses: Iterable[Interface], mtu: int, settings: Mapping[str, str]
    ) -> None:
        """Create a bridge that is up and has these addresses; on failure there is no bridge.

        `settings` are IPv6's of the interface.  While IPv6 is switched off the bridge has no IPv6 addresses.
        """
        with attempting(f"create the bridge {name}"):
            self._route.link("add", ifname=name, kind="bridge", address=_mac(name))
        try:
            with attempting(f"set up the bridge {name}"):
                index = if_nametoindex(name)
                self._route.link("set", index=index, mtu=mtu)
                for setting, value in settings.items():
                    with suppress(sysctl.ReadOnly):  # it is tried again, and logged, when the host is checked
                        self.set_ipv6_setting(name, setting, value)
                ipv6_off = probe.ipv6_off(name)
                _add_addresses(self._route, index, [one for one in addresses if one.version == 4 or not ipv6_off])
                self._route.link("set", index=index, state="up", ifalias=alias)
        except HostRefused:
            self.delete(name)
            raise

    def delete(self, name: str) -> None:
        """Delete a link, if it exists."""
        with attempting(f"delete the interface {name}"):
            try:
                self._route.link("del", ifname=name)
            except Exception as error:
                if _error_number(error) != errno.ENODEV:
                    raise

    def unfinished(self) -> list[str]:
        """Return the bridges that a daemon that was killed did not finish."""
        return [link.name for link in self.bridges() if link.mac == _mac(link.name) and not link.alias]

    def delete_unfinished(self) -> None:
        """Delete these bridges."""
        for name in self.unfinished():
            self.delete(name)

    def attach(
        self,
        name: str,
        alias: str,
        bridge: str,
        namespace: str,
        addresses: Collection[Interface],
        gateways: Iterable[str],
        mtu: int,
    ) -> None:
        """Connect the namespace at a path to a bridge by a veth pair, whose end on the host is `name`.

        On failure there is no pair.  `gateways` become default routes in families that have none.
        """
        with netns.entered(namespace), attempting(f"open a netlink socket in {namespace}"):
            inner, ipv6_off = _open_iproute(), probe.ipv6_off()
        try:
            with attempting(f"attach {namespace} to {bridge}"), open(namespace) as target:
                used = {message.get_attr("IFLA_IFNAME") for message in inner.get_links()}
                device = next(name for name in map("eth{}".format, count()) if name not in used)
                address = _mac(*map(str, addresses))
                peer = {"ifname": device, "net_ns_fd": target.fileno(), "mtu": mtu, "address": address}
                master = if_nametoindex(bridge)
                self._route.link("add", ifname=name, kind="veth", master=master, mtu=mtu, peer=peer)
                index = if_nametoindex(name)
                self._route.brport("set", index=index, mode=1)
                usable = [one for one in addresses if one.version == 4 or not ipv6_off]
                _set_up_inside(inner, device, usable, [one for one in gateways if ":" not in one or not ipv6_off])
                self._route.link("set", index=index, state="up", ifalias=alias)
        except HostRefused:
            self.delete(name)
            raise
        finally:
            inner.close()

    def set_isolated(self, name: str, isolated: bool) -> None:
        """Set whether a bridge port reaches nothing but the bridge and its ports that are not isolated."""
        with attempting(f"set the isolation of the bridge port {name}"):
            self._route.brport("set", index=if_nametoindex(name), isolated=int(isolated))

    def set_up(self, name: str) -> None:
        with attempting(f"set {name} up"):
            self._route.link("set", index=if_nametoindex(name), state="up")

    def set_mtu(self, name: str, mtu: int) -> None:
        with attempting(f"set the MTU of {name}"):
            self._route.link("set", index=if_nametoindex(name), mtu=mtu)

    def join(self, name: str, bridge: str) -> None:
        """Make a link a port of a bridge, in hairpin mode."""
        with attempting(f"connect {name} to the bridge {bridge}"):
            index = if_nametoindex(name)
            self._route.link("set", index=index, master=if_nametoindex(bridge))
            self._route.brport("set", index=index, mode=1)

    def add_address(self, name: str, interface: Interface) -> None:
        """Add an address.  HostRefused says whether IPv6 is switched off."""
        if interface.version == 6 and (reason := probe.ipv6_off(name)):
            raise HostRefused(f"cannot add {interface} to {name}: {reason}")
        with attempting(f"add {interface} to {name}"):
            _add_addresses(self._route, if_nametoindex(name), [interface])

    def set_ipv6_setting(self, name: str, setting: str, value: str) -> None:
        """Set an interface's sysctl, if the kernel has it and it has another value."""
        path = f"net/ipv6/conf/{name}/{setting}"
        if sysctl.read(path) not in (None, value):
            sysctl.write(path, value)

    def add_route(self, name: str, subnet: IPv4Network | IPv6Network, source: str = "") -> None:
        """Add the route that the kernel adds with an address; one that another program has put in its place goes."""
        more = {"prefsrc": source, "scope": _SCOPE_LINK} if subnet.version == 4 else {"priority": _PREFIX_METRIC}
        if subnet.version == 6 and (reason := probe.ipv6_off(name)):
            raise HostRefused(f"cannot add the route {subnet} by {name}: {reason}")
        with attempting(f"add the route {subnet} by {name}"):
            index = if_nametoindex(name)
            self._route.route(
                "replace", dst=str(subnet), oif=index, proto=_RTPROT_KERNEL, family=FAMILIES[subnet.version], **more
            )

    def add_default_route(self, name: str, gateway: str) -> None:
        with attempting(f"add the default route via {gateway}"):
            _add_default_route(self._route, if_nametoindex(name), gateway)

    def routed_subnets(self) -> dict[IPv4Network | IPv6Network, str]:
        """Return the subnets of the main table that are routed by an interface, and its name; no default routes."""
        with attempting("list routes"):
            names = {link.ifindex: link.name for link in dump.links()}
            return {
                ip_network(f"{route.destination}/{route.prefix_length}", strict=False): names.get(route.ifindex, "?")
                for family in (4, 6)
                for route in self.routes(family)
                if route.destination and route.ifindex
            }

    def uplink_mtu(self) -> int | None:
        """Return the smallest MTU of the interfaces that have a default route; None if no interface has one."""
        with attempting("list routes"):
            routes = (route for family in FAMILIES for route in self.routes(family))
            default = {route.ifindex for route in routes if not route.destination}
            return min((link.mtu for link in dump.links() if link.ifindex in default), default=None)

    def interfaces_with_advertised_routes(self) -> frozenset[str]:
        """Return the interfaces that have a route from a router advertisement."""
        with attempting("list routes"):
            indexes = {route.ifindex for route in dump.routes(socket.AF_INET6) if route.protocol == _RTPROT_RA}
            return frozenset(link.name for link in dump.links() if link.ifindex in indexes)

    def addresses(self) -> frozenset[str]:
        with attempting("list addresses"):
            return dump.addresses()

    def has_address(self, address: str) -> bool:
        """True if packets to an address are for this host; a link-local one has its interface after a `%`."""
        bare, _, interface = address.partition("%")
        with attempting("look up an address"):
            if bare.startswith("fe80:"):
                owners = [index for index, one in dump.interface_addresses() if one == bare]
                return bool(owners) and (not interface or _index(interface) in owners)
            way = dump.way_to(bare)
            return way is not None and way.is_local


def main_routes(routes: Iterable[dump.Route]) -> list[dump.Route]:
    """Return the routes of the main table."""
    return [route for route in routes if route.table == _MAIN_TABLE]


def visit(namespace: str, ifindex: int, questions: Sequence[dump.Question]) -> dump.Inside:
    """Return what the namespace at a path has (`dump.inside`).  Conflict: there is none.  HostRefused: it refuses."""
    with netns.entered(namespace), attempting(f"look into {namespace}"):
        return dump.inside(ifindex, questions)


@contextmanager
def attempting(what: str) -> Iterator[None]:
    """Turn the kernel's refusal in the block into HostRefused: "cannot `what`: …"."""
    try:
        yield
    except Exception as error:
        code = _error_number(error)
        if code is None and not isinstance(error, OSError):
            raise
        advice = "; run as root" if code in (errno.EPERM, errno.EACCES) else ""
        raise HostRefused(f"cannot {what}: {os.strerror(code) if code else error}{advice}") from None


def _set_up_inside(inner: Any, device: str, addresses: Iterable[Interface], gateways: Iterable[str]) -> None:
    index = inner.link_lookup(ifname=device)[0]
    inner.link("set", index=dump.LOOPBACK_IFINDEX, state="up")
    _add_addresses(inner, index, addresses)
    inner.link("set", index=index, state="up")
    for gateway in gateways:
        family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
        if all(message["dst_len"] for message in inner.get_routes(family=family, table=_MAIN_TABLE)):
            _add_default_route(inner, index, gateway)


def _add_default_route(route: Any, index: int, gateway: str) -> None:
    family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
    route.route("add", dst="default", gateway=gateway, oif=index, family=family)


def _add_addresses(route: Any, index: int, addresses: Iterable[Interface]) -> None:
    for interface in addresses:
        flags = {"flags": _NO_DUPLICATE_DETECTION} if interface.version == 6 else {}
        route.addr("replace", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen, **flags)


def _open_iproute() -> Any:
    from pyroute2.iproute.linux import IPRoute  # a daemon that has only leases saves 11 MB

    return IPRoute()


def _error_number(error: Exception) -> int | None:
    """Return the error number that the kernel answered with; None if it is no answer of the kernel's."""
    if isinstance(error, OSError):
        return error.errno
    from pyroute2.netlink.exceptions import NetlinkError

    return int(error.code) if isinstance(error, NetlinkError) else None


def _index(name: str) -> int:
    try:
        return if_nametoindex(name)
    except OSError:
        return 0


def _mac(*texts: str) -> str:
    """Return a locally administered MAC address (IEEE 802), always the same for the same texts."""
    digest = blake2s(" ".join(texts).encode(), digest_size=5).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest))
