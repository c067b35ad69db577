"""Links, addresses and routes, by rtnetlink: changed by pyroute2, listed by `dump`.

What this file knows: bridges, veth pairs, bridge ports.  What it must not know: networks, endpoints, why.

Facts that it leans on:

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
from typing import TYPE_CHECKING

from gangway.errors import HostRefused
from gangway.host import dump, netns, sysctl

if TYPE_CHECKING:
    from pyroute2.iproute.linux import IPRoute

Interface = IPv4Interface | IPv6Interface
"""An address with its subnet."""
Link = dump.Link

_NO_DUPLICATE_DETECTION = 0x02  # IFA_F_NODAD, include/uapi/linux/if_addr.h: usable at once
_MAIN_TABLE = 254
_RTPROT_RA = 9  # include/uapi/linux/rtnetlink.h: from a router advertisement
_LOOPBACK_IFINDEX = 1


class Links:
    """The links of the network namespace in which this object was made."""

    def __init__(self) -> None:
        with attempting("open a netlink socket"):
            self._dumps = dump.Dumps()

    @cached_property
    def _route(self) -> "IPRoute":
        return _open_iproute()

    def close(self) -> None:
        """Close the sockets."""
        if "_route" in self.__dict__:
            self._route.close()
        self._dumps.close()

    def all(self) -> dict[str, Link]:
        """Return all links, by name."""
        with attempting("list links"):
            return {link.name: link for link in self._dumps.links()}

    def bridges(self) -> list[Link]:
        """Return the bridges; with a thousand containers they are a thousandth of all links."""
        with attempting("list bridges"):
            return self._dumps.links("bridge")

    def create_bridge(self, name: str, alias: str, addresses: Iterable[Interface], mtu: int) -> None:
        """Create a bridge that is up and has these addresses; on failure there is no bridge."""
        with attempting(f"create the bridge {name}"):
            self._route.link("add", ifname=name, kind="bridge", address=_mac(name))
        try:
            with attempting(f"set up the bridge {name}"):
                index = self._index(name)
                self._route.link("set", index=index, mtu=mtu)
                for setting in ("accept_ra", "accept_dad"):
                    if sysctl.read(f"net/ipv6/conf/{name}/{setting}") is not None:
                        sysctl.write(f"net/ipv6/conf/{name}/{setting}", "0")
                self._add_addresses(self._route, index, addresses)
                self._route.link("set", index=index, state="up", ifalias=alias)
        except HostRefused:
            self.delete(name)
            raise

    def delete(self, name: str) -> None:
        """Delete a link, if it exists."""
        with attempting(f"delete the interface {name}"):
            for index in self._route.link_lookup(ifname=name):
                try:
                    self._route.link("del", index=index)
                except Exception as error:
                    if _netlink_code(error) != errno.ENODEV:  # its namespace has ended meanwhile
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
                master = self._index(bridge)
                self._route.link("add", ifname=name, kind="veth", master=master, mtu=mtu, peer=peer)
                index = self._index(name)
                self._route.brport("set", index=index, mode=1)
                self._set_up_inside(inner, device, addresses, gateways)
                self._route.link("set", index=index, state="up", ifalias=alias)
        except HostRefused:
            self.delete(name)
            raise
        finally:
            inner.close()

    def set_isolated(self, name: str, isolated: bool) -> None:
        """Set whether a bridge port reaches nothing but the bridge and its ports that are not isolated."""
        with attempting(f"set the isolation of the bridge port {name}"):
            self._route.brport("set", index=self._index(name), isolated=int(isolated))

    def routed_subnets(self) -> dict[IPv4Network | IPv6Network, str]:
        """Return the subnets of the main table that are routed by an interface, and its name; no default routes."""
        with attempting("list routes"):
            names = {link.ifindex: link.name for link in self._dumps.links()}
            routes = [route for family in dump.FAMILIES for route in self._dumps.routes(family)]
        return {
            ip_network(f"{route.destination}/{route.prefix_length}", strict=False): names.get(route.ifindex, "?")
            for route in routes
            if route.table == _MAIN_TABLE and route.destination and route.ifindex
        }

    def interfaces_with_advertised_routes(self) -> frozenset[str]:
        """Return the interfaces that have a route from a router advertisement."""
        with attempting("list routes"):
            indexes = {route.ifindex for route in self._dumps.routes(socket.AF_INET6) if route.protocol == _RTPROT_RA}
            return frozenset(link.name for link in self._dumps.links() if link.ifindex in indexes)

    def addresses(self) -> frozenset[str]:
        """Return all addresses of this namespace."""
        with attempting("list addresses"):
            return self._dumps.addresses()

    def _index(self, name: str) -> int:
        indexes = self._route.link_lookup(ifname=name)
        if not indexes:
            raise HostRefused(f"there is no interface {name}")
        return int(indexes[0])

    def _set_up_inside(
        self, inner: "IPRoute", device: str, addresses: Iterable[Interface], gateways: Iterable[str]
    ) -> None:
        index = inner.link_lookup(ifname=device)[0]
        inner.link("set", index=_LOOPBACK_IFINDEX, state="up")
        self._add_addresses(inner, index, addresses)
        inner.link("set", index=index, state="up")
        for gateway in gateways:
            family = socket.AF_INET6 if ":" in gateway else socket.AF_INET
            if not any(not message["dst_len"] for message in inner.get_routes(family=family, table=_MAIN_TABLE)):
                inner.route("add", dst="default", gateway=gateway, oif=index, family=family)

    def _add_addresses(self, route: "IPRoute", index: int, addresses: Iterable[Interface]) -> None:
        for interface in addresses:
            flags = {"flags": _NO_DUPLICATE_DETECTION} if interface.version == 6 else {}
            route.addr("add", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen, **flags)


@contextmanager
def attempting(what: str) -> Iterator[None]:
    """Turn the kernel's refusal in the block into HostRefused: "cannot `what`: …"."""
    try:
        yield
    except OSError as error:
        raise HostRefused(f"cannot {what}: {error.strerror or error}{_advice(error.errno or 0)}") from None
    except Exception as error:
        code = _netlink_code(error)
        if code is None:
            raise
        raise HostRefused(f"cannot {what}: {os.strerror(code)}{_advice(code)}") from None


def _open_iproute() -> "IPRoute":
    """Return pyroute2's interface; it is imported when it is first needed: a daemon with leases only saves 11 MB."""
    from pyroute2.iproute.linux import IPRoute

    return IPRoute()


def _netlink_code(error: Exception) -> int | None:
    """Return the error number that the kernel answered with; None if it is no answer of the kernel's."""
    from pyroute2.netlink.exceptions import NetlinkError

    return int(error.code) if isinstance(error, NetlinkError) else None


def _advice(code: int) -> str:
    return "; run as root" if code in (errno.EPERM, errno.EACCES) else ""


def _mac(*texts: str) -> str:
    """Return a locally administered MAC address (IEEE 802), always the same for the same texts."""
    digest = blake2s(" ".join(texts).encode(), digest_size=5).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest))
