"""`explain` says what the kernel does, for every kind of client, host address and mapping.

The host has a second uplink with source routing: a policy rule leads what it sends from that uplink's address to a
table of its own.  The client there has an address that the main table routes by the first uplink.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest

from gangway.cli.client import Refused, ask_running
from lab import echo_server
from lab.addresses import host_port
from lab.netns import Namespace
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street

pytestmark = pytest.mark.any_kernel

SECOND4, SECOND6 = "10.78.0.1", "fd78::1"
FAR4, FAR6 = "10.99.0.2", "fd99::2"
SECONDARY = "10.77.0.9"
STRANGE = "10.77.0.77"


class Uplinks(Street):
    """A street whose host has a secondary address, and a second uplink to the namespace `second`."""

    def arrange(self, stack: ExitStack) -> None:
        super().arrange(stack)
        host, second = self.host, stack.enter_context(Namespace("second"))
        self.second = second
        host.ip("link", "add", "up1", "type", "veth", "peer", "name", "eth0", "netns", second.name)
        host.ip("address", "add", f"{SECONDARY}/24", "dev", "eth0")
        for family, own, peer, far, size in (
            ("-4", SECOND4, "10.78.0.2", FAR4, 24),
            ("-6", SECOND6, "fd78::2", FAR6, 64),
        ):
            flags = ["nodad"] if family == "-6" else []
            host.ip("address", "add", f"{own}/{size}", "dev", "up1", *flags)
            second.ip("address", "add", f"{peer}/{size}", "dev", "eth0", *flags)
            second.ip("address", "add", far, "dev", "lo", *flags)
            host.ip("link", "set", "up1", "up")
            second.ip("link", "set", "eth0", "up")
            second.ip(family, "route", "add", own, "dev", "eth0", "src", far)
            host.ip(family, "route", "add", "default", "via", NEIGHBOUR6 if family == "-6" else NEIGHBOUR4)
            host.ip(family, "route", "add", "default", "via", peer, "table", "101")
            host.ip(family, "rule", "add", "from", own, "lookup", "101")


class Client(NamedTuple):
    """A client's namespace, its origin, the address that it connects to, and whether it is a neighbour."""

    space: Namespace
    origin: str
    address: str
    neighbour: bool = False


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def street(request: pytest.FixtureRequest) -> Iterator[Uplinks]:
    with Uplinks("--firewall", request.param) as street:
        yield street


def clients(street: Uplinks) -> Iterator[Client]:
    """Yield a client of each origin at each kind of address."""
    remotes: dict[str, Namespace] = dict.fromkeys((HOST4, HOST6, SECONDARY), street.neighbour)
    remotes |= dict.fromkeys((SECOND4, SECOND6), street.second)
    yield Client(street.neighbour, "remote", STRANGE)
    for address in ("127.0.0.1", "127.0.0.7", "::1", *remotes, "172.30.0.1", "fd30::1"):
        is_loopback = address.startswith("127.") or address == "::1"
        yield Client(street.host, "loopback" if is_loopback else "host", address)
        yield Client(remotes.get(address, street.neighbour), "remote", address)
        yield Client(street.far.space, "container", address)
        yield Client(street.near.space, "container", address, True)
    zone = f"{_link_local(street.host)}%eth0"
    yield Client(street.neighbour, "remote", zone)
    yield Client(street.host, "host", zone)


def _link_local(space: Namespace) -> str:
    links = json.loads(space.ip("-json", "-6", "address", "show", "dev", "eth0", "scope", "link"))
    return next(str(one["local"]) for link in links for one in link.get("addr_info", ()) if "local" in one)


def explained(street: Street, at: str, origin: str) -> list[dict[str, Any]]:
    """Return the routes that `explain` shows; none if it refuses, because the address or the port is not there."""
    try:
        answer = ask_running(str(street.gangway.socket), "GET", f"/explain?at={quote(at)}&from={origin}")
    except Refused as refused:
        if "is not an address of this host" in str(refused):
            return []
        raise
    return list(answer["mapping"]["routes"])


def is_right(street: Street, client: Client, protocol: str, port: int) -> bool:
    """True if `explain` names the road that the kernel's records show, or says that the client is not served."""
    at = f"{host_port(client.address, port)}/{protocol}"
    roads = [one["road"] for one in explained(street, at, client.origin) if one["neighbour"] == client.neighbour]
    if roads in ([], ["blocked"]):
        return not street.reaches(client.space, protocol, client.address, port)
    return roads == [street.road(client.space, protocol, client.address, port)[0]]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("host_ip", ["", "127.0.0.1", SECOND4])
def test_explain_names_the_road_at_every_address(street: Uplinks, protocol: str, host_ip: str) -> None:
    with street.published(street.server, f"{host_ip}:0:80/{protocol}" if host_ip else f"80/{protocol}") as port:
        assert [client for client in clients(street) if not is_right(street, client, protocol, port)] == []


@pytest.mark.parametrize("address", [SECOND4, SECOND6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_second_uplink_is_served(street: Uplinks, protocol: str, address: str) -> None:
    with street.published(street.server, f"80/{protocol}") as port:
        for space in (street.second, street.host):
            assert street.reaches(space, protocol, address, port), space.name


def test_explain_shows_the_port_that_a_moved_range_leads_to(street: Uplinks) -> None:
    with street.published(street.server, "9000-9009:76-85") as first:
        for origin, address in (("loopback", "127.0.0.1"), ("host", HOST4), ("remote", HOST6)):
            routes = explained(street, host_port(address, first + 4), origin)
            assert routes, "it is published"
            for route in routes:
                assert route["road"] == "relay" or " port 80" in route["fact"]
                shown = [rule for rule in route["rules"] if str(first + 4) in rule]
                assert all("80" in rule for rule in shown)
        assert street.reaches(street.host, "tcp", HOST4, first + 4)


@pytest.mark.parametrize(("source", "address"), [("127.0.0.1", HOST4), ("::1", HOST6), (SECOND4, HOST4)])
def test_host_reaches_its_own_address_from_any_other(street: Uplinks, source: str, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with street.published(street.server, "80/tcp") as port, street.host.entered(), socket.socket(family) as client:
        client.settimeout(5)
        client.bind((source, 0))
        client.connect((address, port))
        assert echo_server.request_over(client).text == "hello"
