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
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import blake2s
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_network
from itertools import count
from socket import if_nametoindex
from typing import Any

from gangway.errors import HostRefused
from gangway.host import dump, netns, sysctl

Interface = IPv4Interface | IPv6Interface
"""An address with its subnet."""
Link = dump.Link

_NO_DUPLICATE_DETECTION = 0x02  # IFA_F_NODAD, include/uapi/linux/if_addr.h: usable at once
_MAIN_TABLE, _LOOPBACK_IFINDEX = 254, 1
_RTPROT_RA = 9  # include/uapi/linux/rtnetlink.h: from a router advertisement


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

    def exists(self, name: str) -> bool:
        """True if there is a link of that name; this costs one system call, however many links there are."""
        try:
            return if_nametoindex(name) > 0
        except OSError:
            return False

    def bridges(self) -> list[Link]:
        """Return the bridges: of a thousand containers' links only the few that are needed."""
        with attempting("list bridges"):
            return dump.links("bridge")

    def create_bridge(self, name: str, alias: str, addresses: Iterable[Interface], mtu: int) -> None:
        """Create a bridge that is up and has these addresses; on failure there is no bridge."""
        with attempting(f"create the bridge {name}"):
            self._route.link("add", ifname=name, kind="bridge", address=_mac(name))
        try:
            with attempting(f"set up the bridge {name}"):
                index = if_nametoindex(name)
                self._route.link("set", index=index, mtu=mtu)
                for setting in ("accept_ra", "accept_dad"):
                    if sysctl.read(f"net/ipv6/conf/{name}/{setting}") is not None:
                        sysctl.write(f"net/ipv6/conf/{name}/{setting}", "0")
                _add_addresses(self._route, index, addresses)
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

    def delete_unfinished(self) -> None:
        """Delete the bridges that a daemon that was killed did not finish."""
        for link in self.bridges():
            if link.mac == _mac(link.name) and not link.alias:
                self.delete(link.name)

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
            inner = _open_iproute()
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
                _set_up_inside(inner, device, addresses, gateways)
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

    def routed_subnets(self) -> dict[IPv4Network | IPv6Network, str]:
        """Return the subnets of the main table that are routed by an interface, and its name; no default routes."""
        with attempting("list routes"):
            names = {link.ifindex: link.name for link in dump.links()}
            return {
                ip_network(f"{route.destination}/{route.prefix_length}", strict=False): names.get(route.ifindex, "?")
                for family in dump.FAMILIES
                for route in dump.routes(family)
                if route.table == _MAIN_TABLE and route.destination and route.ifindex
            }

    def uplink_mtu(self) -> int | None:
        """Return the smallest MTU of the interfaces that have a default route; None if no interface has one."""
        with attempting("list routes"):
            default = {
                route.ifindex
                for family in dump.FAMILIES
                for route in dump.routes(family)
                if route.table == _MAIN_TABLE and not route.destination
            }
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
    inner.link("set", index=_LOOPBACK_IFINDEX, state="up")
    _add_addresses(inner, index, addresses)
    inner.link("set", index=index, state="up")
    for gateway in gateways:
        family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
        if all(message["dst_len"] for message in inner.get_routes(family=family, table=_MAIN_TABLE)):
            inner.route("add", dst="default", gateway=gateway, oif=index, family=family)


def _add_addresses(route: Any, index: int, addresses: Iterable[Interface]) -> None:
    for interface in addresses:
        flags = {"flags": _NO_DUPLICATE_DETECTION} if interface.version == 6 else {}
        route.addr("add", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen, **flags)


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
