"""A container on two networks: its neighbours on both reach it; its ports and its default route are on the first."""

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from gangway.reconcile.state import link_name
from lab import echo_server
from lab.gangwayd import CommandFailed
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.crossings import client_of, everywhere, listening, reached
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, PORT, Box, Street
from tests.kernel.test_link_repairs import links

pytestmark = pytest.mark.any_kernel

GATEWAYS = {"web": ("172.30.0.1", "fd30::1"), "other": ("172.31.0.1", "fd31::1")}


@pytest.fixture(scope="module")
def joined(street: Street) -> Iterator[Box]:
    """The server, which is on the network `other`, too, with these addresses there."""
    addresses = street.gangway("attach", street.server.name, "--network", "other").split()
    yield Box(street.server.space, *addresses)
    street.gangway("detach", street.server.name, "--network", "other", "--if-exists")


def networks_of(street: Street, name: str) -> dict[str, bool]:
    """Return a container's networks, and whether each is the first one."""
    endpoints = (one for network in street.gangway.json("network", "ls") for one in network["endpoints"])
    return {one["network"]: one["is_first"] for one in endpoints if one["container"] == name}


def own_links(street: Street) -> set[str]:
    """Return the names of the host's links, which `ip` prints with their peer's number."""
    return {line.split()[0].partition("@")[0] for line in street.host.ip("-br", "link").splitlines()}


def rules(street: Street) -> str:
    saved = ("nft list ruleset", "iptables-save", "ip6tables-save")
    return "".join(street.host.run(*words.split()).stdout for words in saved)


def handles(street: Street) -> set[str]:
    """Return the handles of the rules in all tables of nftables: a rule that is written again has another one."""
    found, table = set(), ""
    for line in street.host.run("nft", "-a", "-t", "list", "ruleset").stdout.splitlines():
        table = line if line.startswith("table ") else table
        if " # handle " in line:
            found.add(f"{table}: {line.rpartition(' ')[2]}")
    return found


def test_neighbours_on_both_networks_reach_it(street: Street, joined: Box) -> None:
    server = street.server
    allowed = [
        *everywhere([street.near.space, street.host], [server.address4, server.address6], PORT),
        *everywhere([street.far.space, street.host], [joined.address4, joined.address6], PORT),
        *everywhere([server.space], [street.near.address4, street.far.address4, street.far.address6], PORT),
    ]
    assert reached(street, allowed) == list(map(str, allowed))
    across = [
        *everywhere([street.near.space], [joined.address4, joined.address6], PORT),
        *everywhere([street.far.space], [server.address4, server.address6], PORT),
    ]
    assert reached(street, across) == []


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_ports_lead_to_the_first_network(street: Street, joined: Box, protocol: str) -> None:
    (gateway4, gateway6), (further4, further6) = GATEWAYS.values()
    with street.published(street.server, f"8080:80/{protocol}") as port:
        for space, address, seen in (
            (street.neighbour, HOST4, NEIGHBOUR4),
            (street.neighbour, HOST6, NEIGHBOUR6),
            (street.near.space, HOST4, gateway4),
            (street.far.space, HOST4, gateway4),  # it would be answered directly, by eth1
            (street.far.space, HOST6, gateway6),
            (street.far.space, further4, gateway4),
            (street.four.space, HOST4, street.four.address4),
            (joined.space, HOST4, gateway4),
            (joined.space, further6, gateway6),
        ):
            assert street.road(space, protocol, address, port) == ("nat", seen), f"{space.name} at {address}"
        assert street.road(street.host, protocol, "127.0.0.1", port) == ("redirect", gateway4)
        assert street.reaches(street.host, protocol, further4, port)
        assert street.reaches(street.host, protocol, further6, port)


def test_explain_names_the_rule_for_further_neighbours(street: Street, joined: Box) -> None:
    with street.published(street.server, "8080:80"):
        (answer,) = street.gangway.json("explain", f"{HOST4}:8080", "--from", "container")
    found = {route["neighbour"]: "\n".join(route["rules"]) for route in answer["mapping"]["routes"]}
    assert "172.31.0.0/24" in found[False]
    assert "172.31.0.0/24" not in found[True]
    assert answer["further_networks"] == ["other"]


def test_udp_client_of_before_is_answered_after_the_container_has_joined(street: Street) -> None:
    late = street.container("late", "web")
    with (
        listening(late, "udp", [81]) as at,
        street.published(late, "8081:81/udp"),
        closing(client_of(street.far.space, "udp", HOST4, 8081)) as client,
    ):
        for is_joined in (False, True):
            if is_joined:
                street.gangway("attach", late.name, "--network", "other")
                client.send(b"again")
            data, peer = at[81].recvfrom(100)
            at[81].sendto(data, peer)
            assert client.recv(100) == data
    street.gangway("detach", late.name)
    assert networks_of(street, late.name) == {}


def test_only_the_first_network_has_a_default_route(joined: Box) -> None:
    for family, gateway in zip(("-4", "-6"), GATEWAYS["web"], strict=True):
        routes = joined.space.ip(family, "route", "show", "default").splitlines()
        assert [line.split()[:5] for line in routes] == [["default", "via", gateway, "dev", "eth0"]]
    assert joined.address4 in joined.space.ip("address", "show", "dev", "eth1")


@pytest.mark.parametrize("network", ["web", "other"])
def test_deleted_link_comes_back(street: Street, joined: Box, network: str) -> None:
    before, name = links(joined.space), street.server.name
    street.host.ip("link", "delete", link_name(name, "" if network == "web" else network))
    wait_until(lambda: links(joined.space) == before, "the repair", 5)
    assert f"interface of container {name} missing: created again" in street.gangway.log.read_text()
    assert street.reaches(street.far.space, "tcp", joined.address4, PORT)
    assert street.reaches(street.near.space, "tcp", street.server.address4, PORT)


@pytest.mark.parametrize("is_killed", [False, True])
def test_next_daemon_keeps_both(street: Street, joined: Box, is_killed: bool) -> None:
    with street.published(street.server, "8080:80/tcp"):
        before, written = links(joined.space), rules(street)
        if is_killed:
            street.gangway.kill()
            for further in ("", "other"):
                street.host.ip("link", "delete", link_name(street.server.name, further))
        else:
            street.gangway.stop()
        street.gangway.start()
        assert links(joined.space) == before
        assert rules(street).count("172.31.0.0/24") == written.count("172.31.0.0/24")
        assert networks_of(street, street.server.name) == {"web": True, "other": False}
        for space in (street.neighbour, street.far.space):
            assert street.reaches(space, "tcp", HOST4, 8080)


def test_what_is_refused(street: Street, joined: Box) -> None:
    name = street.server.name
    for words, text in (
        (("network", "rm", "other"), rf"network other has containers \(.*{name}.*\): detach them first"),
        (("attach", name, "--network", "other"), f"container {name} is attached to network other already"),
        (("attach", name), f"container {name} is attached to network web, other already"),
        (("detach", name, "--network", "web"), f"and its ports on network web: detach it from other first.*{name}"),
        (("detach", name, "--network", "old"), "is not attached to network old; it is on web, other"),
    ):
        with pytest.raises(CommandFailed, match=text):
            street.gangway(*words)
    assert street.gangway("detach", name, "--network", "old", "--if-exists") == ""
    again = street.gangway("attach", name, "--network", "other", "--if-not-exists").split()
    assert again == [joined.address4, joined.address6]


def test_leaving_a_network_leaves_the_other_ones_connections_alone(street: Street, joined: Box, firewall: str) -> None:
    """So it does all rules but its own, of which nftables has none: they are elements of sets."""
    own = 0 if firewall == "nftables" else 2
    with_further = rules(street).count("172.31.0.0/24")
    with ExitStack() as stack:
        at = stack.enter_context(listening(street.server, "tcp", [81]))[81]
        stack.enter_context(street.published(street.server, "8081:81"))
        client = stack.enter_context(closing(client_of(street.neighbour, "tcp", HOST4, 8081)))
        served = stack.enter_context(closing(at.accept()[0]))
        assert served.recv(100)
        written = handles(street)
        street.gangway("detach", street.server.name, "--network", "other")
        assert handles(street) <= written
        assert len(handles(street)) == len(written) - own
        served.sendall(b"still here")
        assert client.recv(100) == b"still here"
        assert not street.reaches(street.far.space, "tcp", joined.address4, PORT)
    assert networks_of(street, street.server.name) == {"web": True}
    assert rules(street).count("172.31.0.0/24") < with_further
    written = handles(street)
    street.gangway("attach", street.server.name, "--network", "other", "--ip", joined.address4)
    assert handles(street) >= written
    assert len(handles(street)) == len(written) + own


@pytest.mark.parametrize("at", [HOST4, HOST6])
def test_a_join_keeps_the_flows_of_clients_elsewhere(street: Street, at: str) -> None:
    """The server speaks first, as a stream does: without the client's flow nothing would lead back to it."""
    with listening(street.near, "udp", [81]) as opened, street.published(street.near, "8081:81/udp"):
        server = opened[81]
        with closing(client_of(street.neighbour, "udp", at, 8081)) as client:
            _, peer = server.recvfrom(100)
            street.gangway("attach", street.near.name, "--network", "other")
            server.sendto(b"next", peer)
            assert client.recv(100) == b"next"
    street.gangway("detach", street.near.name, "--network", "other")


def test_the_end_of_a_container_is_its_end_on_all_networks(street: Street) -> None:
    before, written = rules(street), handles(street)
    with Namespace("brief") as brief:
        addresses = street.gangway("attach", brief.name, "--network", "web", "--ip", "172.30.0.77").split()
        street.gangway("attach", brief.name, "--network", "other")
        of_brief = {link_name(brief.name), link_name(brief.name, "other")}
        assert of_brief <= own_links(street)
        echo_server.serve(brief.popen, PORT)
        street.publish(Box(brief, *addresses), "8082:80")
        assert street.reaches(street.far.space, "tcp", HOST4, 8082)
    wait_until(lambda: networks_of(street, brief.name) == {}, "the end of its endpoints")
    wait_until(lambda: rules(street).count("172.31.0.0/24") == before.count("172.31.0.0/24"), "the end of its rules")
    assert not of_brief & own_links(street)
    street.gangway("doctor")
    assert handles(street) == written
    assert "rules were changed" not in street.gangway.log.read_text()


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_rules_that_another_program_deletes_come_back(
    street: Street, joined: Box, firewall: str, protocol: str
) -> None:
    before = rules(street).count(subnet := "172.31.0.0/24")
    if firewall == "nftables":
        street.host.run("nft", "flush set inet gangway further4")
    else:
        listed = street.host.run("iptables", "-t", "nat", "-S", "POSTROUTING").stdout.splitlines()
        (rule,) = (line.split() for line in listed if f"-s {subnet} -d " in line)
        street.host.run("iptables", "-t", "nat", "-D", *rule[1:])
    wait_until(lambda: rules(street).count(subnet) == before, "the rule", 5)
    with street.published(street.server, f"8080:80/{protocol}") as port:
        assert street.road(street.far.space, protocol, HOST4, port) == ("nat", GATEWAYS["web"][0])
