"""The legacy variant of iptables: as the firewall, and with another program's rules that drop."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.gangwayd import CommandFailed
from lab.netns import Namespace
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, Street

_MULTI = Path("/usr/sbin/xtables-legacy-multi")
_NAMES = [f"{program}{what}" for program in ("iptables", "ip6tables") for what in ("", "-save", "-restore")]


def _usable() -> bool:
    """True if this machine has the program, and the kernel the tables."""
    if os.geteuid() or not _MULTI.exists():
        return False
    with Namespace("legacy") as space:
        return space.run(str(_MULTI), "iptables", "-t", "nat", "-S", check=False).returncode == 0


pytestmark = [
    pytest.mark.any_kernel,
    pytest.mark.skipif(not _usable(), reason="the kernel, or this machine, has no legacy iptables"),
]


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which iptables is the legacy variant, with a lock of its own (iptables(8))."""
    directory = tmp_path_factory.mktemp("legacy")
    for name in _NAMES:
        (directory / name).symlink_to(_MULTI)
    return {"PATH": f"{directory}:{os.environ['PATH']}", "XTABLES_LOCKFILE": str(directory / "lock")}


@pytest.fixture(scope="module")
def street(legacy: dict[str, str]) -> Iterator[Street]:
    with Street("--firewall", "iptables", environment=legacy) as made:
        yield made


def _rules(street: Street) -> str:
    """Return the legacy rules, without the names of tables: one that was listed once stays."""
    listed = (street.host.run(str(_MULTI), f"{program}-save").stdout for program in ("iptables", "ip6tables"))
    return "".join(line for text in listed for line in text.splitlines(keepends=True) if line[:2] in ("-A", ":G"))


@pytest.mark.parametrize("host_ip", ["", f"{HOST4}:"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_each_client_is_served_by_its_road(street: Street, host_ip: str, protocol: str) -> None:
    near, far, server = street.near.space, street.far.space, street.server.space
    with street.published(street.server, f"{host_ip}8080:80/{protocol}") as port:
        assert "--to-destination 172.30.0.2:80" in _rules(street)
        assert "gangway" not in street.host.run("nft", "list", "ruleset").stdout.lower()
        expected = [
            (street.host, HOST4, "nat", HOST4),
            (street.neighbour, HOST4, "nat", NEIGHBOUR4),
            (far, HOST4, "nat", street.far.address4),
            (near, HOST4, "nat", "172.30.0.1"),
            (server, HOST4, "nat", "172.30.0.1"),
        ]
        if not host_ip:
            expected += [
                (street.host, "127.0.0.1", "redirect", "172.30.0.1"),
                (street.host, "::1", "redirect", "fd30::1"),
                (street.neighbour, HOST6, "nat", NEIGHBOUR6),
                (near, HOST6, "nat", "fd30::1"),
            ]
        for space, address, road, source in expected:
            assert street.road(space, protocol, address, port) == (road, source), f"{space.name} to {address}"


def test_a_lock_that_another_program_keeps_is_named(street: Street, legacy: dict[str, str]) -> None:
    """Neither requests nor checks wait for ever, what is published is served, and nothing is left of what failed."""
    server, lock = street.server, Path(legacy["XTABLES_LOCKFILE"])
    with street.published(server, "8080:80") as port:
        before = _rules(street)
        with lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            holder = rf"{Path('/proc/self/comm').read_text().strip()} \(pid {os.getpid()}\) holds the lock {lock}"
            for request in (("publish", server.name, "-p", "8081:80"), ("unpublish", server.name)):
                with pytest.raises(CommandFailed, match=holder):
                    street.gangway(*request)
            assert len(street.gangway.json("ls")) == 2
            assert street.road(street.neighbour, "tcp", HOST4, port)[0] == "nat"
            assert _rules(street) == before
        street.gangway("publish", server.name, "-p", "8081:80")
        assert street.road(street.neighbour, "tcp", HOST4, 8081)[0] == "nat"


def test_all_rules_are_removed(street: Street) -> None:
    """This has to be the last test with this fixture."""
    assert "GANGWAY" in _rules(street)
    street.leave()
    assert _rules(street) == ""
    assert street.host.run(str(_MULTI), "iptables", "-S", "FORWARD").stdout == "-P FORWARD ACCEPT\n"


@pytest.mark.parametrize("flags", [(), ("--firewall", "nftables"), ("--firewall", "iptables")])
def test_clients_are_served_though_another_programs_legacy_policy_drops(flags: tuple[str, ...]) -> None:
    """gangway uses the other variant, which cannot add rules to the chain that drops."""
    with Street(*flags, prepare=f"{_MULTI} iptables -P FORWARD DROP") as street:
        with street.published(street.server, "8080:80") as port:
            answer = street.gangway.json("explain", f"{HOST4}:{port}", "--from", "remote")[0]
            road = answer["mapping"]["routes"][0]["road"]
            assert street.road(street.neighbour, "tcp", HOST4, port)[0] == road
            assert street.road(street.far.space, "tcp", HOST4, port)[0] == road
        street.leave()
        assert street.host.run(str(_MULTI), "iptables", "-S", "FORWARD").stdout == "-P FORWARD DROP\n"
