"""Interfaces that do not forward, and containers whose answers would leave by another way, with each firewall."""

import socket

import pytest

from lab import echo_server
from lab.addresses import host_port
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, Street

FORWARDING = "net.ipv4.conf.eth0.forwarding"


def road_of(street: Street, at: str, origin: str = "remote") -> list[str]:
    (answer,) = street.gangway.json("explain", at, "--from", origin)
    return [route["road"] for route in answer["mapping"]["routes"]]


def test_clients_of_an_interface_that_does_not_forward_are_relayed(street: Street) -> None:
    with street.published(street.server, "80/tcp") as port:
        street.host.sysctl(FORWARDING, 0)
        try:
            wait_until(lambda: _road_taken(street, port) == ("relay", "172.30.0.1"), "the clients to be relayed")
            assert road_of(street, f"{HOST4}:{port}") == ["relay"]
            assert street.road(street.host, "tcp", HOST4, port) == ("nat", HOST4)
            assert road_of(street, f"[{HOST6}]:{port}") == ["nat"], "IPv6 has one switch for the whole host"
            checks = {one["check"]: one for one in street.gangway.json("doctor")}
            assert FORWARDING in checks["clients by eth0"]["note"]
            said = f"clients that come in by eth0 are relayed: {FORWARDING} is off"
            wait_until(lambda: said in street.gangway.log.read_text(), "the line in the log")
        finally:
            street.host.sysctl(FORWARDING, 1)
        wait_until(lambda: _road_taken(street, port) == ("nat", NEIGHBOUR4), "the clients to be translated again")
        assert road_of(street, f"{HOST4}:{port}") == ["nat"]


def test_udp_flow_from_before_is_relayed_too(street: Street) -> None:
    with street.neighbour.entered():
        client = socket.socket(type=socket.SOCK_DGRAM)
    with client, street.published(street.server, "80/udp") as port:
        client.settimeout(0.2)
        client.connect((HOST4, port))
        assert _peer_of(client) == NEIGHBOUR4
        street.host.sysctl(FORWARDING, 0)
        try:
            wait_until(lambda: _peer_of(client) == "172.30.0.1", "the flow to be relayed")
        finally:
            street.host.sysctl(FORWARDING, 1)


def test_own_bridge_that_does_not_forward_is_repaired(street: Street) -> None:
    setting = "net.ipv4.conf.gw-web.forwarding"
    street.host.sysctl(setting, 0)
    wait_until(lambda: street.host.sysctl(setting) == "1", "the bridge to forward")
    wait_until(
        lambda: "bridge gw-web forwarded no IPv4 packets" in street.gangway.log.read_text(),
        "the log to name the bridge",
    )


@pytest.mark.parametrize("protocol", ["tcp", pytest.param("udp", marks=pytest.mark.any_kernel)])
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_container_with_another_default_route_sees_the_gateway(street: Street, family: str, protocol: str) -> None:
    gateway, host, far = ("172.30.0.1", HOST4, "192.0.2.1") if family == "-4" else ("fd30::1", HOST6, "fd92::1")
    box = street.server.space
    with Namespace("vpn") as vpn:
        _cable(box, vpn)
        box.ip(family, "route", "replace", "default", "via", far)
        try:
            # A request looks into its container; otherwise a change is found within ten seconds.
            with street.published(street.server, f"80/{protocol}") as port:
                clients = ("host", street.host), ("remote", street.neighbour), ("container", street.far.space)
                for origin, space in clients:
                    assert street.road(space, protocol, host, port) == ("nat", gateway)
                    (answer,) = street.gangway.json("explain", f"{host_port(host, port)}/{protocol}", "--from", origin)
                    assert answer["mapping"]["routes"][0]["code"] == "answers_elsewhere"
                loopback = "::1" if family == "-6" else "127.0.0.1"
                assert street.reaches(street.host, protocol, loopback, port)
            assert [one["note"] for one in street.gangway.json("doctor") if one["check"].startswith("container")]
        finally:
            box.ip(family, "route", "replace", "default", "via", gateway)
    with street.published(street.server, f"80/{protocol}") as port:
        assert street.road(street.neighbour, protocol, host, port)[1] != gateway


@pytest.mark.any_kernel
def test_attach_says_that_the_default_route_leads_elsewhere(street: Street) -> None:
    with Namespace("own") as own, Namespace("vpn") as vpn:
        _cable(own, vpn)
        own.ip("route", "add", "default", "via", "192.0.2.1")
        done = street.gangway.run("attach", own.name, "--network", "web")
        assert "default route does not lead to the gateway" in done.stderr
        street.gangway("detach", own.name)


def _cable(box: Namespace, vpn: Namespace) -> None:
    box.ip("link", "add", "net0", "type", "veth", "peer", "name", "net0", "netns", vpn.name)
    for space, number in ((box, 2), (vpn, 1)):
        space.ip("address", "add", f"192.0.2.{number}/24", "dev", "net0")
        space.ip("address", "add", f"fd92::{number}/64", "dev", "net0", "nodad")
        space.ip("link", "set", "net0", "up")


def _road_taken(street: Street, port: int) -> tuple[str, str] | None:
    """Return the road of a client on another machine, and whom the container sees; None if nothing answers."""
    try:
        return street.road(street.neighbour, "tcp", HOST4, port)
    except echo_server.NoAnswer:
        return None


def _peer_of(client: socket.socket) -> str:
    """Return the address that the container sees; empty if it does not answer."""
    try:
        return echo_server.request_over(client).peer
    except TimeoutError:
        return ""
