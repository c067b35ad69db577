"""A daemon that cannot write any sysctl: what is right stays, and what is not is a warning, and another road."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from lab import echo_server
from lab.addresses import host_port
from lab.gangwayd import Gangway
from lab.netns import Namespace, Neighbour
from lab.roads import observe_road
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel

_READ_ONLY = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys"
_WITHIN = "unshare", "--mount", "--propagation", "slave", "sh", "-ec", f'{_READ_ONLY}; exec "$0" "$@"'
_RIGHT = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.default.forwarding": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv4.tcp_tw_reuse": 1,
    "net.ipv6.conf.default.accept_ra": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv4.ip_local_reserved_ports": 40000,
}
_WRONG = {**dict.fromkeys(_RIGHT, 0), "net.ipv6.conf.default.accept_ra": 1, "net.ipv6.conf.default.accept_dad": 1}
_PORT = 40000  # the kernel could select it for a program
_HOSTS = Neighbour.host4, Neighbour.host6


class Scene:
    """A host, another machine, and a published container of a daemon that writes no sysctl."""

    def __init__(self, host: Namespace, neighbour: Namespace, gangway: Gangway) -> None:
        self.host, self.neighbour, self.gangway = host, neighbour, gangway

    def roads(self, origin: str, space: Namespace) -> list[str]:
        """Return the road of each family, after the kernel and `explain` were found to agree."""
        found = []
        for address in _HOSTS:
            (answer,) = self.gangway.json("explain", host_port(address, _PORT), "--from", origin)
            (road,) = {route["road"] for route in answer["mapping"]["routes"]}
            assert observe_road(self.host, space, "tcp", address, _PORT).road == road
            found.append(road)
        return found

    def lines(self, text: str) -> list[str]:
        return [line for line in self.gangway.log.read_text().splitlines() if text in line]

    def failed_checks(self) -> dict[str, str]:
        """Return the notes of what `doctor` says of settings and forwarding that are not as they should be."""
        kinds = ("setting: ", "forwarding: ")
        found = self.gangway.json("doctor")
        return {one["check"]: one["note"] for one in found if not one["holds"] and one["check"].startswith(kinds)}


@contextmanager
def scene_with(firewall: str, settings: dict[str, int]) -> Iterator[Scene]:
    with Namespace("host") as host, Neighbour(host) as neighbour, Namespace("box") as box:
        for name, value in settings.items():
            host.sysctl(name, value)
        with Gangway(host, "--firewall", firewall, "--log-level", "warning", within=_WITHIN) as gangway:
            gangway("network", "create", "web", "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64")
            gangway("attach", box.name, "--network", "web")
            echo_server.serve(box.popen, 80)
            gangway("publish", box.name, "-p", f"{_PORT}:80")
            yield Scene(host, neighbour, gangway)
        log = gangway.log.read_text() if gangway.log.exists() else ""
        assert "Traceback" not in log


def test_right_values_are_enough(firewall: str) -> None:
    with scene_with(firewall, _RIGHT) as scene:
        assert scene.roads("remote", scene.neighbour) == ["nat", "nat"]
        assert scene.roads("host", scene.host) == ["nat", "nat"]
        assert scene.failed_checks() == {}
        assert scene.gangway.log.read_text() == ""


def test_wrong_values_are_warnings_and_the_relay_serves(firewall: str) -> None:
    with scene_with(firewall, _WRONG) as scene:
        assert scene.roads("remote", scene.neighbour) == ["relay", "relay"]
        assert scene.roads("host", scene.host) == ["nat", "nat"]
        assert observe_road(scene.host, scene.host, "tcp", "127.0.0.1", _PORT).road == "redirect"
        bridge = "net/ipv6/conf/gw-web"
        consequences = {
            "net.ipv4.ip_forward": "clients elsewhere are relayed, and containers reach no other network (IPv4)",
            "net.ipv6.conf.all.forwarding": "and containers reach no other network (IPv6)",
            "net.ipv4.tcp_tw_reuse": "many short connections",
            "net.ipv4.ip_local_reserved_ports": "the kernel may select one for a program",
            f"{bridge}/accept_ra": "router advertisements",
            f"{bridge}/accept_dad": "link-local address",
        }
        notes = scene.failed_checks()
        for name, consequence in consequences.items():
            wait_until(lambda name=name: scene.lines(name), f"a warning about {name}")  # type: ignore[misc]
            (line,) = scene.lines(name)
            assert "Read-only file system" in line
            assert consequence in line
            kind = {"net.ipv4.ip_forward": "IPv4", "net.ipv6.conf.all.forwarding": "IPv6"}.get(name)
            note = notes[f"forwarding: {kind}" if kind else f"setting: {name.replace('/', '.')}"]
            assert "Read-only file system" in note
            assert consequence in note


def test_bridge_that_does_not_forward_is_relayed_to() -> None:
    """The host forwards, but a new interface does not; in the end the setting can be written."""
    with scene_with("nftables", {**_RIGHT, "net.ipv4.conf.default.forwarding": 0}) as scene:
        assert scene.roads("remote", scene.neighbour) == ["relay", "nat"]
        assert scene.lines("net.ipv4.conf.gw-web.forwarding is off and cannot be written (Read-only file system)")
        scene.host.sysctl("net.ipv4.conf.gw-web.forwarding", 1)

        def is_translated() -> bool:
            with suppress(AssertionError):  # `explain` may be a moment ahead of the rules
                return scene.roads("remote", scene.neighbour) == ["nat", "nat"]
            return False

        wait_until(is_translated, "nat", 12)
