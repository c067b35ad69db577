"""Links, addresses and routes, by rtnetlink: changed by pyroute2, listed by `dump`.

What this file knows: bridges, veth pairs, bridge ports.  What it must not know: networks, endpoints, why.

Facts that it leans on:

* A bridge takes the lowest MAC address of its ports unless it was given one (net/bridge/br_stp_if.c,
  br_stp_recalculate_bridge_id): with ports that come and go, containers would remember a wrong one.  What has had an IP
  address before, and was made anew, has the MAC address that it had: others remember that for half a minute (arp(7)).
* A bridge would heed router advertisements (its containers'), and look for duplicates of its own link-local address for
  two seconds, in which it forwards no IPv6 (ip-sysctl.rst: accept_ra, accept_dad).
* `hairpin` lets a frame leave by the port that it came by: a container that reaches itself by a published port needs
  it where br_netfilter translates within the bridge.  `isolated` ports reach the bridge itself, and no other isolated
  port (bridge(8)).
* A deleted bridge frees its ports; a deleted end of a veth pair takes the other along, and so does the end of the
  namespace that one is in (veth(4)).
* An alias (ip-link(8)) is how links of ours are known again; nobody else's is touched.
"""

import errno
import os
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2s
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_network

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from gangway.errors import HostRefused
from gangway.host import dump, netns, sysctl

Interface = IPv4Interface | IPv6Interface
"""An address with its subnet."""
Link = dump.Link
"""What there is of an interface."""

_NO_DUPLICATE_DETECTION = 0x02  # IFA_F_NODAD, include/uapi/linux/if_addr.h: an address that is usable at once
_MAIN_TABLE = 254
_RTPROT_RA = 9  # include/uapi/linux/rtnetlink.h: from a router's advertisement
_LOOPBACK = 1


class Links:
    """The links of the namespace in which this object was made."""

    def __init__(self) -> None:
        with doing("talk to the kernel by netlink"):
            self._route = IPRoute()
            self._dumps = dump.Dumps()

    def close(self) -> None:
        """Closes the sockets."""
        self._route.close()
        self._dumps.close()

    def all(self) -> dict[str, Link]:
        """Every link, by name."""
        with doing("list links"):
            return {link.name: link for link in self._dumps.links()}

    def bridges(self) -> list[Link]:
        """The bridges: where there are a thousand containers, a thousandth of all links."""
        with doing("list bridges"):
            return self._dumps.links("bridge")

    def make_bridge(self, name: str, alias: str, addresses: Iterable[Interface], mtu: int) -> None:
        """A bridge that is up and has these addresses; all of it or nothing."""
        with doing(f"make the bridge {name}"):
            self._route.link("add", ifname=name, kind="bridge", address=_mac(name))
        try:
            with doing(f"set up the bridge {name}"):
                index = self._index(name)
                self._route.link("set", index=index, ifalias=alias, mtu=mtu)
                for setting in ("accept_ra", "accept_dad"):
                    if sysctl.read(f"net/ipv6/conf/{name}/{setting}") is not None:
                        sysctl.write(f"net/ipv6/conf/{name}/{setting}", "0")
                self._give_addresses(self._route, index, addresses)
                self._route.link("set", index=index, state="up")
        except HostRefused:
            self.delete(name)
            raise

    def delete(self, name: str) -> None:
        """Deletes a link, if it is there."""
        with doing(f"delete {name}"):
            for index in self._route.link_lookup(ifname=name):
                try:
                    self._route.link("del", index=index)
                except NetlinkError as error:
                    if error.code != errno.ENODEV:  # it went with its namespace meanwhile
                        raise

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
        """Joins a namespace (its path) to a bridge by a veth pair, of which `name` is the host's end; all of it or
        nothing."""
        with netns.entered(namespace), doing(f"talk to the kernel in {namespace}"):
            inner = IPRoute()
        try:
            with doing(f"attach {namespace} to {bridge}"), open(namespace) as there:
                taken = {message.get_attr("IFLA_IFNAME") for message in inner.get_links()}
                device = next(name for name in _ethernet_names() if name not in taken)
                address = _mac(*map(str, addresses))
                peer = {"ifname": device, "net_ns_fd": there.fileno(), "mtu": mtu, "address": address}
                master = self._index(bridge)
                self._route.link("add", ifname=name, kind="veth", master=master, mtu=mtu, peer=peer)
                index = self._index(name)
                self._route.link("set", index=index, ifalias=alias)
                self._route.brport("set", index=index, mode=1)
                self._set_up_inside(inner, device, addresses, gateways)
                self._route.link("set", index=index, state="up")
        except HostRefused:
            self.delete(name)
            raise
        finally:
            inner.close()

    def set_isolated(self, name: str, isolated: bool) -> None:
        """Whether a bridge's port reaches the bridge only."""
        with doing(f"isolate {name}"):
            self._route.brport("set", index=self._index(name), isolated=int(isolated))

    def subnets(self) -> dict[IPv4Network | IPv6Network, str]:
        """What is routed by an interface, and which; without default routes."""
        with doing("list routes"):
            names = {link.number: link.name for link in self._dumps.links()}
            routes = [route for family in dump.FAMILIES for route in self._dumps.routes(family)]
        return {
            ip_network(f"{route.to}/{route.bits}", strict=False): names.get(route.out, "?")
            for route in routes
            if route.table == _MAIN_TABLE and route.to and route.out
        }

    def advertised(self) -> frozenset[str]:
        """The interfaces by which a router has advertised itself: those of routes that came so."""
        with doing("list routes"):
            numbers = {route.out for route in self._dumps.routes(socket.AF_INET6) if route.protocol == _RTPROT_RA}
            return frozenset(link.name for link in self._dumps.links() if link.number in numbers)

    def addresses(self) -> frozenset[str]:
        """All addresses of this namespace."""
        with doing("list addresses"):
            return self._dumps.addresses()

    def _index(self, name: str) -> int:
        found = self._route.link_lookup(ifname=name)
        if not found:
            raise HostRefused(f"there is no interface {name}")
        return int(found[0])

    def _set_up_inside(
        self, inner: IPRoute, device: str, addresses: Iterable[Interface], gateways: Iterable[str]
    ) -> None:
        index = inner.link_lookup(ifname=device)[0]
        inner.link("set", index=_LOOPBACK, state="up")
        self._give_addresses(inner, index, addresses)
        inner.link("set", index=index, state="up")
        for gateway in gateways:
            family = 10 if ":" in gateway else 2
            if not any(not message["dst_len"] for message in inner.get_routes(family=family, table=_MAIN_TABLE)):
                inner.route("add", dst="default", gateway=gateway, oif=index, family=family)

    def _give_addresses(self, route: IPRoute, index: int, addresses: Iterable[Interface]) -> None:
        for interface in addresses:
            flags = {"flags": _NO_DUPLICATE_DETECTION} if interface.version == 6 else {}
            route.addr("add", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen, **flags)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says what failed, when the kernel refuses."""
    try:
        yield
    except NetlinkError as error:
        raise HostRefused(f"cannot {what}: {os.strerror(error.code)}{_advice(error.code)}") from None
    except OSError as error:
        raise HostRefused(f"cannot {what}: {error.strerror or error}{_advice(error.errno or 0)}") from None


def _advice(code: int) -> str:
    return "; run as root" if code in (1, 13) else ""  # EPERM, EACCES


def _ethernet_names() -> Iterator[str]:
    return (f"eth{number}" for number in range(1000))


def _mac(*of: str) -> str:
    """An address of a station, locally administered (IEEE 802), that is always the same for the same texts."""
    digest = blake2s(" ".join(of).encode(), digest_size=5).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest))
