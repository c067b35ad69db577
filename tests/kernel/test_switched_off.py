"""Forwarding that another program disables, or that gangway may not enable."""

from collections.abc import Iterator

import pytest

from lab.addresses import host_port
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street

pytestmark = pytest.mark.any_kernel

_SOON_S = 5
_SWITCHES = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}
_HARDENED = "net.ipv4.conf.all.accept_redirects", "net.ipv4.conf.default.accept_redirects"


@pytest.fixture(scope="module")
def careful(firewall: str) -> Iterator[Street]:
    """A daemon that may not enable forwarding, on a host that forwards."""
    prepare = "".join(f"sysctl -qw {name}=1\n" for name in _SWITCHES.values())
    with Street("--firewall", firewall, "--no-ip-forward", prepare=prepare) as made:
        yield made


def _road(street: Street, address: str, port: int) -> str:
    if not street.reaches(street.neighbour, "tcp", address, port):
        return "none"
    return street.road(street.neighbour, "tcp", address, port)[0]


@pytest.mark.parametrize("family", [4, 6])
def test_disabled_forwarding_is_enabled_again(street: Street, family: int) -> None:
    address, client = (HOST4, NEIGHBOUR4) if family == 4 else (HOST6, NEIGHBOUR6)
    with street.published(street.server, "8080:80") as port:
        street.host.sysctl(_SWITCHES[family], 0)
        wait_until(lambda: street.host.sysctl(_SWITCHES[family]) == "1", "forwarding", _SOON_S)
        assert street.road(street.neighbour, "tcp", address, port) == ("nat", client)
    said = f"{_SWITCHES[family]} was switched off by another program"
    wait_until(lambda: said in street.gangway.log.read_text(), "the line in the log", _SOON_S)


@pytest.mark.parametrize("family", [4, 6])
def test_without_permission_the_relay_serves_until_forwarding_is_enabled(careful: Street, family: int) -> None:
    address, other = (HOST4, HOST6) if family == 4 else (HOST6, HOST4)
    with careful.published(careful.server, "8080:80") as port:
        wait_until(lambda: _road(careful, address, port) == _road(careful, other, port) == "nat", "the nat", _SOON_S)
        careful.host.sysctl(_SWITCHES[family], 0)
        wait_until(lambda: _road(careful, address, port) == "relay", "the relay", _SOON_S)
        assert _road(careful, other, port) == "nat"
        assert careful.road(careful.host, "tcp", address, port) == ("nat", address)
        at = host_port(address, port)
        text = careful.gangway("explain", at, "--from", "remote")
        assert f"{_SWITCHES[family]} is off" in text
        assert "--no-ip-forward" in text
        said = f"{_SWITCHES[family]} was switched off"
        wait_until(lambda: said in careful.gangway.log.read_text(), "the line in the log", _SOON_S)
        assert careful.host.sysctl(_SWITCHES[family]) == "0"
        careful.host.sysctl(_SWITCHES[family], 1)
        wait_until(lambda: _road(careful, address, port) == "nat", "the nat", _SOON_S)


def test_without_forwarding_all_but_the_hosts_own_connections_are_relayed(firewall: str) -> None:
    with Street("--firewall", firewall, "--no-ip-forward") as street:
        with street.published(street.server, "8080:80/tcp", "8080:80/udp") as port:
            for protocol in ("tcp", "udp"):
                for space in (street.neighbour, street.far.space, street.near.space, street.server.space):
                    assert street.road(space, protocol, HOST4, port) == ("relay", "172.30.0.1"), space.name
                    assert street.road(space, protocol, HOST6, port) == ("relay", "fd30::1"), space.name
                assert street.road(street.host, protocol, HOST4, port) == ("nat", HOST4)
        assert [street.host.sysctl(name) for name in _SWITCHES.values()] == ["0", "0"]


def test_settings_that_the_kernel_changes_along_are_restored(firewall: str) -> None:
    """The kernel sets accept_redirects whenever ip_forward changes (net/ipv4/devinet.c, inet_forward_change)."""
    prepare = "".join(f"sysctl -qw {name}=0\n" for name in _HARDENED)
    with Street("--firewall", firewall, prepare=prepare) as street:
        assert street.host.sysctl("net.ipv4.ip_forward") == "1"
        street.leave()
        assert street.host.sysctl("net.ipv4.ip_forward") == "0"
        assert [street.host.sysctl(name) for name in _HARDENED] == ["0", "0"]
