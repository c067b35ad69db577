"""A network's MTU is that of the host's uplink, unless one is given."""

from collections.abc import Iterator

import pytest

from lab.gangwayd import Gangway
from lab.netns import Namespace, Neighbour

pytestmark = pytest.mark.any_kernel


@pytest.fixture(scope="module")
def gangway() -> Iterator[Gangway]:
    with Namespace("host") as host, Neighbour(host), Gangway(host) as made:
        yield made


def _mtu(gangway: Gangway, *words: str) -> int:
    gangway("network", "create", "web", "--subnet", "172.30.0.0/24", *words)
    try:
        return int(gangway.json("network", "ls")[0]["mtu"])
    finally:
        gangway("network", "rm", "web")


def test_mtu_without_a_default_route(gangway: Gangway) -> None:
    gangway.host.ip("link", "set", "eth0", "mtu", "1400")
    assert _mtu(gangway) == 1500


def test_mtu_follows_the_default_route(gangway: Gangway) -> None:
    gangway.host.ip("link", "set", "eth0", "mtu", "1400")
    gangway.host.ip("route", "add", "default", "via", Neighbour.address4)
    try:
        assert _mtu(gangway) == 1400
        assert _mtu(gangway, "--mtu", "9000") == 9000
        gangway.host.ip("link", "set", "eth0", "mtu", "1000")
        assert _mtu(gangway) == 1000
        assert _mtu(gangway, "--subnet", "fd30::/64") == 1280
        with Namespace("box") as box:
            gangway.host.ip("link", "set", "eth0", "mtu", "1300")
            gangway("attach", box.name)  # to a network that is created on demand
            assert " mtu 1300 " in box.ip("link", "show", "eth0")
            gangway("detach", box.name)
    finally:
        gangway.host.ip("route", "del", "default")
