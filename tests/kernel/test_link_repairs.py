"""What other programs change of gangway's links is restored within two seconds, on the host and in containers."""

import json
import time
from collections.abc import Iterator
from functools import partial

import pytest

from gangway.reconcile.state import link_name
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, Street

pytestmark = pytest.mark.any_kernel
PATIENCE_S = 2.0
LOG_LIMIT_S = 1.0  # a line that is the same as one less than a second ago is only counted
PUBLISHED = "8080:80"

_SAID_S = dict[str, float]()
"""When each line was last seen in the log, in seconds of time.monotonic()."""


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street() as made, made.published(made.server, PUBLISHED):
        wait_until_reachable(made)
        yield made


def wait_until_reachable(street: Street) -> None:
    for client, address in ((street.host, "127.0.0.1"), (street.neighbour, HOST4), (street.neighbour, HOST6)):
        wait_until(partial(street.reaches, client, "tcp", address, 8080), f"an answer to {address}", PATIENCE_S)


def links(space: Namespace) -> set[str]:
    """Return a namespace's links, addresses and routes, as far as gangway configures them."""
    found = set()
    for link in json.loads(space.ip("-json", "-details", "address")):
        port = link.get("linkinfo", {}).get("info_slave_data", {})
        name = link["ifname"]
        found.add(f"{name} {'UP' in link['flags']} {link['mtu']} {link.get('master')} {port.get('hairpin')}")
        found |= {f"{name} {one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one["scope"] != "link"}
    for family in ("-4", "-6"):
        found |= {line.strip() for line in space.ip(family, "route").splitlines() if "fe80" not in line}
    return found


ON_THE_HOST = {
    "link set {veth} type bridge_slave hairpin off": "interface {veth} of container {box}: port of gw-web",
    "address flush dev gw-web": r"bridge gw-web: address 172.30.0.1/24, address fd30::1/64",
    "link set gw-web down": "bridge gw-web: up",
    "link set gw-web mtu 1400": "bridge gw-web: MTU 1500",
    "-4 route delete 172.30.0.0/24": "bridge gw-web: route 172.30.0.0/24",
    "-6 route delete fd30::/64 dev gw-web": "bridge gw-web: route fd30::/64",
    "link set {veth} down": "interface {veth} of container {box}: up",
    "link set {veth} nomaster": "interface {veth} of container {box}: port of gw-web",
    "link delete gw-web": "bridge gw-web missing: created again",
    "link delete {veth}": "interface of container {box} missing: created again",
}
INSIDE = {
    "address flush dev eth0": "address 172.30.0.2/24, address fd30::2/64",
    "link set eth0 down": "up",
    "link set lo down": "lo up",
    "link set eth0 mtu 1300": "MTU 1500",
    "-4 route delete 172.30.0.0/24": "route 172.30.0.0/24",
    "-4 route delete default": "default route of IPv4",
    "-6 route delete default": "default route of IPv6",
}


@pytest.mark.parametrize(("harm", "said"), ON_THE_HOST.items(), ids=ON_THE_HOST)
def test_change_on_the_host_is_repaired_and_logged(street: Street, harm: str, said: str) -> None:
    names = {"veth": link_name(street.server.name), "box": street.server.name}
    _check(street, street.host, harm.format(**names), said.format(**names))


@pytest.mark.parametrize(("harm", "said"), INSIDE.items(), ids=INSIDE)
def test_change_in_a_container_is_repaired_and_logged(street: Street, harm: str, said: str) -> None:
    place = f"interface {link_name(street.server.name)} of container {street.server.name}, in its namespace: "
    _check(street, street.server.space, harm, place + said)


def _check(street: Street, space: Namespace, harm: str, said: str) -> None:
    wait_until(lambda: time.monotonic() - _SAID_S.get(said, 0) > LOG_LIMIT_S, "the log to write the same line again")
    before, logged = links(space), len(street.gangway.log.read_text())
    space.ip(*harm.split())
    wait_until(lambda: links(space) == before, "the repair", PATIENCE_S)
    wait_until_reachable(street)
    new = wait_until(lambda: street.gangway.log.read_text()[logged:], "the log")
    _SAID_S[said] = time.monotonic()
    assert said in new
    assert len(new.splitlines()) == 1


def test_routes_and_addresses_of_others_are_left_alone(street: Street) -> None:
    """A container may have another default route, and a bridge another address."""
    street.host.ip("address", "add", "192.0.2.1/32", "dev", "gw-web")
    street.server.space.ip("-4", "route", "replace", "default", "via", "172.30.0.3")
    street.host.ip("link", "set", "gw-web", "down")
    wait_until(lambda: "UP" in street.host.ip("-br", "link", "show", "gw-web"), "the repair", PATIENCE_S)
    assert "192.0.2.1/32" in street.host.ip("address", "show", "gw-web")
    assert "via 172.30.0.3" in street.server.space.ip("-4", "route")
    street.host.ip("address", "delete", "192.0.2.1/32", "dev", "gw-web")
    street.server.space.ip("-4", "route", "delete", "default")
    wait_until(lambda: "default via 172.30.0.1" in street.server.space.ip("-4", "route"), "the repair", PATIENCE_S)


def test_what_changed_while_no_daemon_ran_is_repaired(street: Street) -> None:
    before = links(street.host), links(street.server.space)
    street.gangway.kill()
    street.host.ip("address", "flush", "dev", "gw-web")
    street.server.space.ip("link", "set", "eth0", "down")
    street.gangway.start()
    assert (links(street.host), links(street.server.space)) == before
    assert "bridge gw-web: address" in street.gangway.log.read_text()
