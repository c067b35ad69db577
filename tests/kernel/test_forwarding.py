"""Forwarding is enabled when it is needed, and then forwards only what gangway allows."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import echo_server
from lab.gangwayd import Gangway
from lab.netns import Namespace, ip
from lab.waiting import wait_until
from tests.kernel.street import HOST4, Street

SWITCHES = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.default.forwarding")
PORT = 80

pytestmark = pytest.mark.any_kernel


class Crossroads:
    """A host between two others, `left` and `right`, which have no other route to each other."""

    def __init__(self, stack: ExitStack) -> None:
        self.host, self.left, self.right = (stack.enter_context(Namespace(role)) for role in ("host", "left", "right"))
        for number, space in ((1, self.left), (2, self.right)):
            device = f"eth{number}"
            ip(
                "link",
                "add",
                device,
                "netns",
                self.host.name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space.name,
            )
            self.host.ip("address", "add", f"10.7{number}.0.1/24", "dev", device)
            self.host.ip("link", "set", device, "up")
            space.ip("address", "add", f"10.7{number}.0.2/24", "dev", "eth0")
            space.ip("link", "set", "eth0", "up")
            space.ip("route", "add", "default", "via", f"10.7{number}.0.1")
        echo_server.serve(self.right.popen, PORT)

    def is_open(self) -> bool:
        """True if the left reaches the right."""
        with self.left.entered():
            return echo_server.is_answered("tcp", "10.72.0.2", PORT)

    def switches(self) -> list[str]:
        """Return the values of the kernel's switches."""
        return [self.host.sysctl(name) for name in SWITCHES]


@pytest.fixture
def crossroads() -> Iterator[Crossroads]:
    with ExitStack() as stack:
        yield Crossroads(stack)


@pytest.fixture(params=["nftables", "iptables"])
def firewall(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_forwarding_is_enabled_and_restored_without_forwarding_for_others(
    crossroads: Crossroads, firewall: str
) -> None:
    with Gangway(crossroads.host, "--firewall", firewall) as gangway:
        assert not crossroads.is_open()
        before = crossroads.host.run("iptables-save").stdout if firewall == "iptables" else ""
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
        assert crossroads.switches() == ["1", "1", "1"]
        assert not crossroads.is_open()
        gangway("network", "rm", "web")
        assert crossroads.switches() == ["0", "0", "0"]
        if before:
            assert ":FORWARD ACCEPT" in crossroads.host.run("iptables-save").stdout


def test_a_network_of_one_family_enables_only_that(crossroads: Crossroads, firewall: str) -> None:
    with Gangway(crossroads.host, "--firewall", firewall) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        assert crossroads.switches() == ["1", "0", "0"]


def test_a_host_that_forwarded_before_still_does(crossroads: Crossroads, firewall: str) -> None:
    crossroads.host.sysctl("net.ipv4.ip_forward", 1)
    with Gangway(crossroads.host, "--firewall", firewall) as gangway:
        assert crossroads.is_open()
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        assert crossroads.is_open()
        gangway("network", "rm", "web")
        assert crossroads.is_open()
        assert crossroads.switches() == ["1", "0", "0"]


@pytest.mark.parametrize("flags", [("--no-ip-forward",), ("--firewall", "none")])
def test_forwarding_is_not_changed(crossroads: Crossroads, flags: tuple[str, ...]) -> None:
    with Gangway(crossroads.host, *flags) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
        assert crossroads.switches() == ["0", "0", "0"]


def test_a_daemon_that_may_not_forward_any_more_relays(firewall: str) -> None:
    """It switches off what the one before has switched on, and writes the rules for that."""
    with Street("--firewall", firewall) as street, street.published(street.server, "8080:80"):
        street.gangway.kill()
        street.gangway.start("--firewall", firewall, "--no-ip-forward")
        assert street.host.sysctl(SWITCHES[0]) == "0"
        wait_until(lambda: street.reaches(street.neighbour, "tcp", HOST4, 8080), "an answer", 5)
        assert street.road(street.neighbour, "tcp", HOST4, 8080) == ("relay", "172.30.0.1")


def test_frames_within_another_programs_bridge_pass(firewall: str) -> None:
    """br_netfilter passes the frames within a bridge to the firewall as if they were forwarded."""
    with ExitStack() as stack:
        host, one, other = (stack.enter_context(Namespace(role)) for role in ("host", "one", "other"))
        host.ip("link", "add", "lan0", "type", "bridge")
        host.ip("link", "set", "lan0", "up")
        for number, space in ((1, one), (2, other)):
            ip(
                "link",
                "add",
                f"p{number}",
                "netns",
                host.name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space.name,
            )
            host.ip("link", "set", f"p{number}", "master", "lan0", "up")
            space.ip("address", "add", f"10.70.0.{number}/24", "dev", "eth0")
            space.ip("link", "set", "eth0", "up")
        echo_server.serve(other.popen, PORT)
        if host.run("sysctl", "-w", "net.bridge.bridge-nf-call-iptables=1", check=False).returncode:
            pytest.skip("this kernel has no br_netfilter")
        gangway = stack.enter_context(Gangway(host, "--firewall", firewall))
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        with one.entered():
            assert echo_server.request_here("tcp", "10.70.0.2", PORT).text == "hello"
