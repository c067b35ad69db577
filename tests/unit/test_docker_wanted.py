"""What is adopted of what Docker's API says.

`golden/docker-20.10.json` is what dockerd 20.10.24 answered with `--iptables=false --ip6tables=false
--userland-proxy=false --bip=172.17.5.1/16 --ipv6 --fixed-cidr-v6=fd17::/64`, without the fields that nobody reads.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.docker.wanted import DockerContainer, DockerNetwork, View, merge_ports
from gangway.model import Network, PortRange, Protocol, Source
from gangway.state.adopted import Adopted, AdoptedContainer

ANSWERS: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "golden/docker-20.10.json").read_text()
)
NETWORK = {"Id": 64 * "a", "Name": "web", "Driver": "bridge", "IPAM": {"Config": [{"Subnet": "10.5.0.0/24"}]}}
BRIDGE = "com.docker.network.bridge"


def container(**changes: Any) -> dict[str, Any]:
    """Return what is said of a container of `NETWORK` that publishes 8000:80 without a host address."""
    attachment = {"NetworkID": NETWORK["Id"], "IPAddress": "10.5.0.2", "GlobalIPv6Address": ""}
    said = {
        "Id": "1",
        "Name": "/box",
        "State": {"Running": True, "Pid": 17},
        "Config": {"Labels": None},
        "HostConfig": {"PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "8000"}]}},
        "NetworkSettings": {
            "Ports": {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8000"}]},
            "Networks": {"web": attachment},
        },
    }
    return said | changes


def view(networks: Iterable[dict[str, Any]] = (NETWORK,), *containers: dict[str, Any]) -> View:
    made = View()
    made.use_networks(msgspec.convert(one, DockerNetwork) for one in networks)
    for one in containers:
        made.use_container(msgspec.convert(one, DockerContainer))
    return made


def network(**changes: Any) -> Network:
    (found,) = view([NETWORK | changes]).adopted.networks
    return found


def ports(found: View) -> list[str]:
    """Return the published ports of the only container; with a star those that dockerd holds."""
    (only,) = found.adopted.containers
    assert all(one.source is Source.DOCKER and one.container == "docker:box" for one in only.mappings)
    return [f"{one}{'*' * one.is_held}" for one in only.mappings]


@pytest.fixture(scope="module")
def real() -> dict[str, AdoptedContainer]:
    found = view(ANSWERS["networks"], *ANSWERS["containers"])
    assert found.problems == ()
    return {one.endpoint.container: one for one in found.adopted.containers}


REAL_NETWORKS = {
    "docker:bridge": ("docker0", "172.17.0.0/16 fd17::/64", "172.17.5.1 fd17::1", "masquerade icc 1500"),
    "docker:alpha": ("br-ID", "172.31.0.0/24", "172.31.0.1", "masquerade icc 1500"),
    "docker:aint": ("br-ID", "172.33.0.0/24", "172.33.0.1", "masquerade icc internal 1500"),
    "docker:v6off": ("br-ID", "172.34.0.0/24", "172.34.0.1", "masquerade icc 1500"),
    "docker:small": ("br-ID", "172.35.0.0/30", "172.35.0.2", "masquerade icc 1500"),
    "docker:ranged": ("br-ID", "172.30.0.0/16", "172.30.5.0", "1500"),
    "docker:dual": ("dual0", "172.32.0.0/24 fd31::/64", "172.32.0.1 fd31::1", "masquerade icc 1400"),
}
"""Bridge, subnets, gateways, what else is set; the bridges' addresses were those gateways."""


def test_bridge_networks_of_a_real_dockerd_are_adopted() -> None:
    ids = {f"docker:{one['Name']}": one["Id"][:12] for one in ANSWERS["networks"]}
    found = {}
    for one in view(ANSWERS["networks"]).adopted.networks:
        flags = [name for name in ("masquerade", "icc", "internal") if getattr(one, name)]
        subnets, gateways = (" ".join(map(str, some)) for some in (one.subnets, one.gateways))
        bridge = one.bridge.replace(ids[one.name], "ID")
        found[one.name] = (bridge, subnets, gateways, " ".join([*flags, str(one.mtu)]))
        assert one.is_adopted
        assert not one.routed
    assert found == REAL_NETWORKS


REAL_PORTS = {
    "docker:web": "docker:ranged 172.30.5.1 | 0.0.0.0:5000:53/udp* [::]:5000:53/udp 0.0.0.0:8000-8004:80-84/tcp* "
    "[::]:8000-8003:80-83/tcp 127.0.0.1:9000-9001:90-91/tcp*",
    "docker:default": "docker:bridge 172.17.0.1 fd17::242:ac11:1 | 0.0.0.0:8100:80/tcp* [::]:8100:80/tcp* "
    "[::1]:8101:81/tcp* 0.0.0.0:32768:82/tcp* [::]:32768:82/tcp*",
    "docker:two": "docker:dual 172.32.0.2 fd31::2 | 0.0.0.0:8200:80/tcp* [::]:8200:80/tcp*",
    "docker:local": "docker:alpha 172.31.0.3 | 172.17.5.1:8302:80/tcp* 127.0.0.1:8300:80/tcp* 127.0.0.1:8301:80/tcp*",
    "docker:open": "docker:alpha 172.31.0.4 | [::]:8400:80/tcp",
    "docker:inner": "docker:aint 172.33.0.2 | ",
    "docker:all": "docker:v6off 172.34.0.2 | 0.0.0.0:32771:80/tcp* [::]:32771:80/tcp 0.0.0.0:32770:81/tcp* "
    "[::]:32770:81/tcp 0.0.0.0:32769:82/tcp* [::]:32769:82/tcp",
}
"""Network, addresses, ports of each container, with a star those that dockerd holds.

Not here: containers without a network of their own (host, none, container:web), and one that waits to be restarted.
"""


@pytest.mark.parametrize("name", REAL_PORTS)
def test_ports_of_a_real_dockerd_are_adopted(real: dict[str, AdoptedContainer], name: str) -> None:
    assert real.keys() == REAL_PORTS.keys()
    _, endpoint, path, mappings = real[name]
    said = " ".join(f"{one}{'*' * one.is_held}" for one in mappings)
    assert f"{endpoint.network} {' '.join(map(str, endpoint.addresses))} | {said}" == REAL_PORTS[name]
    assert {one.container for one in mappings} <= {name}
    (pid,) = (one["State"]["Pid"] for one in ANSWERS["containers"] if f"docker:{one['Name'][1:]}" == name)
    assert path == f"/proc/{pid}/ns/net"


@pytest.mark.parametrize(
    ("pool", "gateway"),
    [
        ({"Subnet": "10.5.0.0/24", "Gateway": "10.5.0.9/24"}, "10.5.0.9"),
        ({"Subnet": "10.5.0.3/24"}, "10.5.0.1"),
        ({"Subnet": "10.5.0.0/24", "IPRange": "10.5.0.0/28"}, "10.5.0.1"),
        ({"Subnet": "10.5.0.0/24", "IPRange": "10.5.0.128/28", "Gateway": ""}, "10.5.0.128"),
    ],
)
def test_gateway_is_the_bridges_address(pool: dict[str, str], gateway: str) -> None:
    assert str(network(IPAM={"Config": [pool]}).gateways[0]) == gateway


def test_options_of_later_releases() -> None:
    subnets = {"Config": [{"Subnet": "10.5.0.0/24"}, {"Subnet": "fd05::/64", "Gateway": "fd05::1"}]}
    options = {f"{BRIDGE}.gateway_mode_ipv4": "nat-unprotected", f"{BRIDGE}.gateway_mode_ipv6": "routed"}
    found = network(IPAM=subnets, EnableIPv4=True, EnableIPv6=True, Options=options)
    assert (found.routed, [str(one) for one in found.subnets]) == (frozenset({6}), ["10.5.0.0/24", "fd05::/64"])
    isolated = network(Internal=True, Options={f"{BRIDGE}.gateway_mode_ipv4": "isolated"})
    assert (isolated.internal, str(isolated.gateways[0]), isolated.routed) == (True, "10.5.0.254", frozenset())
    assert [one.version for one in network(IPAM=subnets, EnableIPv4=False, EnableIPv6=True).subnets] == [6]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Name": "a b"}, "network a b of Docker's is not served: invalid network name"),
        ({"IPAM": {"Config": None}}, "network web of Docker's is not served: network docker:web needs one subnet"),
        ({"Options": {"com.docker.network.driver.mtu": "1k"}}, "invalid literal"),
        ({"IPAM": {"Config": [{"Subnet": "here"}]}}, "'here' does not appear to be an IPv4 or IPv6 network"),
    ],
)
def test_network_that_gangway_cannot_serve_is_left_out_with_its_containers(
    changes: dict[str, Any], reason: str
) -> None:
    found = view([NETWORK | changes, {"Id": "b", "Name": "swarm", "Driver": "overlay"}], container())
    assert found.adopted == Adopted(stopped={"1": "docker:box"})
    (problem,) = found.problems
    assert reason in problem


def test_gateway_network_is_the_one_that_dockerd_chooses() -> None:
    """As dockerd 28.5 does: not an internal one, then both IP versions, then the priority, then the name."""
    networks = [NETWORK | {"Id": name, "Name": name, "Internal": name == "a"} for name in "abcde"]
    attachments = {name: {"NetworkID": name, "IPAddress": f"10.5.0.{ord(name)}", "GwPriority": 0} for name in "abcde"}
    attachments["d"]["GwPriority"] = 5
    attachments["e"]["GlobalIPv6Address"] = attachments["a"]["GlobalIPv6Address"] = "fd05::3"
    box = container()
    chosen = []
    while attachments:
        box["NetworkSettings"]["Networks"] = attachments
        (found,) = view(networks, box).adopted.containers
        chosen.append(found.endpoint.network.removeprefix("docker:"))
        del attachments[chosen[-1]]
    assert chosen == ["e", "d", "b", "c", "a"]


@pytest.mark.parametrize(
    ("modes", "addresses", "expected"),
    [
        ("6", "10.5.0.2 fd05::2", "0.0.0.0:8000:80/tcp* [fd05::2]:80:80/tcp [fd05::2]:9000-9002:9000-9002/udp"),
        ("6", "10.5.0.2", "0.0.0.0:8000:80/tcp*"),
        ("4 6", "10.5.0.2 fd05::2", "[fd05::2]:80:80/tcp [fd05::2]:9000-9002:9000-9002/udp"),
    ],
)
def test_ports_of_routed_ip_version_are_opened_at_the_containers_address(
    modes: str, addresses: str, expected: str
) -> None:
    """As dockerd 28.5 answers: only IPv6 has no host port; 9001 is published twice; 99 is not published."""
    box, options = container(), {f"{BRIDGE}.gateway_mode_ipv{family}": "routed" for family in modes.split()}
    nothing = {"HostIp": "::", "HostPort": ""}
    found = box["NetworkSettings"]["Ports"] = {"80/tcp": [nothing], "99/tcp": None}
    if "4" not in modes:
        found["80/tcp"] = [{"HostIp": "0.0.0.0", "HostPort": "8000"}, nothing]
    found |= {f"{port}/udp": [nothing, nothing] for port in (9000, 9001, 9002)}
    attachment = box["NetworkSettings"]["Networks"]["web"]
    attachment["IPAddress"], _, attachment["GlobalIPv6Address"] = addresses.partition(" ")
    box["Config"]["Labels"] = {"gangway.from": "fd00::/8"}
    shown = view([NETWORK | {"EnableIPv6": True, "Options": options}], box)
    assert " ".join(ports(shown)) == expected
    (only,) = shown.adopted.containers
    assert all(one.is_routed is (one.host_address in only.endpoint.addresses) for one in only.mappings)
    assert all([*map(str, one.admitted)] == ["fd00::/8"] for one in only.mappings)


def test_ports_of_routed_ipv4_are_opened_whatever_host_address_was_requested() -> None:
    box = container(HostConfig={"PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}]}})
    for at in ({"HostIp": "0.0.0.0", "HostPort": ""}, {"HostIp": "0.0.0.0", "HostPort": "0"}, {}):
        box["NetworkSettings"]["Ports"] = {"80/tcp": [at]}
        assert ports(view([NETWORK | {"Options": {f"{BRIDGE}.gateway_mode_ipv4": "routed"}}], box)) == [
            "10.5.0.2:80:80/tcp"
        ]


@pytest.mark.parametrize(
    ("of_container", "of_network", "expected"),
    [
        ("", "127.0.0.1", ["0.0.0.0:8000:80/tcp*", "[::]:8000:80/tcp"]),
        ("::1", "127.0.0.1", ["[::1]:8000:80/tcp"]),
        (None, "10.1.2.3", ["10.1.2.3:8000:80/tcp*"]),
        ("10.1.2", None, []),
        ("::ffff:1.2.3.4", None, []),
    ],
)
def test_label_sets_default_host_address(of_container: str | None, of_network: str | None, expected: list[str]) -> None:
    """A label that cannot be obeyed publishes nothing: 0.0.0.0 would be more than was allowed."""
    labels = [{} if one is None else {"gangway.bind": one} for one in (of_container, of_network)]
    found = view([NETWORK | {"Labels": labels[1]}], container(Config={"Labels": labels[0]}))
    assert ports(found) == expected
    assert len(found.problems) == (not expected)
    assert all(problem.startswith("ports of container docker:box are not published: ") for problem in found.problems)


@pytest.mark.parametrize(
    ("of_container", "of_network", "expected"),
    [
        (None, None, ""),
        ("10.0.0.0/8, fd00::/8", None, "10.0.0.0/8 fd00::/8"),
        (None, "192.0.2.0/24", "192.0.2.0/24"),
        ("10.0.0.0/8", "192.0.2.0/24", "10.0.0.0/8"),
        ("10.0.0.0/8", "wrong", "10.0.0.0/8"),
        ("", "192.0.2.0/24", None),
        (None, "wrong", None),
        ("10.0.0.1/8", None, None),
    ],
)
def test_label_sets_admitted_clients(of_container: str | None, of_network: str | None, expected: str | None) -> None:
    """A label that cannot be obeyed publishes nothing."""
    labels = [{} if one is None else {"gangway.from": one} for one in (of_container, of_network)]
    found = view([NETWORK | {"Labels": labels[1]}], container(Config={"Labels": labels[0]}))
    (only,) = found.adopted.containers
    assert [" ".join(map(str, one.admitted)) for one in only.mappings] == ([] if expected is None else 2 * [expected])
    assert len(found.problems) == (expected is None)
    assert all("docker:box are not published: invalid subnet" in problem for problem in found.problems)


def test_host_port_chosen_from_a_range_was_requested_without_address() -> None:
    requested = {"80/tcp": [{"HostIp": "", "HostPort": "8000-8009"}, {"HostIp": "0.0.0.0", "HostPort": "7000"}]}
    published = {"80/tcp": [{"HostIp": "0.0.0.0", "HostPort": port} for port in ("8004", "7000")], "90/tcp": None}
    box = container(HostConfig={"PortBindings": requested})
    box["NetworkSettings"]["Ports"] = published
    assert ports(view([NETWORK], box)) == ["0.0.0.0:7000:80/tcp*", "0.0.0.0:8004:80/tcp*", "[::]:8004:80/tcp"]


def test_container_is_removed_when_it_stops_or_leaves_its_bridge() -> None:
    found = view([NETWORK], container())
    moved = container()
    del moved["NetworkSettings"]["Networks"]["web"]
    for changed in (container(State={"Running": True, "Pid": 0}), container(State={"Running": False, "Pid": 0}), moved):
        assert len(found.adopted.containers) == 1
        found.use_container(msgspec.convert(changed, DockerContainer))
        assert not found.adopted.containers
        assert found.adopted.stopped == {"1": "docker:box"}
        found.use_container(msgspec.convert(container(), DockerContainer))
    found.remove_container("1")
    found.remove_container("1")
    assert not found.adopted.containers
    found.use_container(msgspec.convert(container(), DockerContainer))
    assert not found.adopted.stopped
    found.use_networks([])
    assert found.adopted == Adopted(stopped={"1": "docker:box"})
    found.remove_container("1")
    assert found.adopted == Adopted()


def test_two_thousand_ports_are_one_mapping_for_each_protocol_and_address() -> None:
    box = deepcopy(container())
    numbers = [(port, protocol) for port in range(20000, 22000) for protocol in ("tcp", "sctp")]
    requested = {f"{port}/{protocol}": [{"HostIp": "", "HostPort": str(port + 7)}] for port, protocol in numbers}
    box["HostConfig"]["PortBindings"] = requested
    box["NetworkSettings"]["Ports"] = {
        key: [{"HostIp": address, "HostPort": one[0]["HostPort"]} for address in ("0.0.0.0", "::")]
        for key, one in sorted(requested.items())
    }
    assert sorted(ports(view([NETWORK], box))) == sorted(
        f"{address}:20007-22006:20000-21999/{protocol}*" for address in ("0.0.0.0", "[::]") for protocol in Protocol
        if protocol is not Protocol.UDP
    )  # fmt: skip


@given(st.sets(st.integers(1, 65535) | st.integers(1, 40) | st.integers(65500, 65535)))
def test_merged_ranges_have_the_same_ports_and_cannot_be_merged_further(ports: set[int]) -> None:
    merged: list[PortRange] = list(merge_ports(ports))
    assert [port for one in merged for port in range(one.first, one.last + 1)] == sorted(ports)
    assert all(one.last + 1 < following.first for one, following in pairwise(merged))


@given(st.dictionaries(st.integers(1, 30), st.lists(st.integers(101, 130), max_size=3), max_size=30))
def test_each_binding_is_in_one_mapping(published: dict[int, list[int]]) -> None:
    """However container ports and host ports lie, mappings lead each host port to the container ports it was given."""
    box = container(HostConfig={"PortBindings": None})
    box["NetworkSettings"]["Ports"] = {
        f"{number}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)} for port in host_ports]
        for number, host_ports in published.items()
    }
    (only,) = view([NETWORK], box).adopted.containers
    pairs = [pair for mapping in only.mappings for pair in mapping.pairs()]
    assert sorted(pairs) == sorted({(port, number) for number, some in published.items() for port in some})
