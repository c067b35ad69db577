"""A port at every address leaves alone what another program translates, as a program that listens there does."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gangway.errors import HostRefused
from gangway.firewall.nft import kernel
from gangway.firewall.nft.translations import foreign_translations
from lab.ipset import create_set, destroy_sets, entry
from tests.kernel.crossings import arrives, listening
from tests.kernel.street import Street

pytestmark = pytest.mark.any_kernel

_VIP = "198.51.100.7"
_PORT = 81
_NFT = """nft -f - <<'END'
table ip foreign {{
    chain pre {{ type nat hook prerouting priority {priority}; ip daddr {vip} tcp dport {port} dnat to {target}; }}
    chain out {{ type nat hook output priority {priority}; ip daddr {vip} tcp dport {port} dnat to {target}; }}
}}
END
"""
_IPTABLES = "iptables -t nat -I {chain} -d {vip} -p tcp --dport {port} -j DNAT --to-destination {target}"


@pytest.fixture(scope="module")
def street(street: Street) -> Street:
    street.host.ip("address", "add", f"{_VIP}/32", "dev", "lo")
    return street


@contextmanager
def translated(street: Street, firewall: str, port: int, priority: int) -> Iterator[None]:
    """Have another program translate a port of the VIP to the container `far`."""
    words = {"vip": _VIP, "port": port, "target": f"{street.far.address4}:{_PORT}", "priority": priority}
    if firewall == "nftables":
        street.host.run("sh", "-ec", _NFT.format(**words))
        yield
        street.host.run("nft", "delete", "table", "ip", "foreign")
    else:
        rules = [_IPTABLES.format(chain=chain, **words) for chain in ("PREROUTING", "OUTPUT")]
        street.host.run("sh", "-ec", "\n".join(rules))
        yield
        street.host.run("sh", "-ec", "\n".join(rules).replace(" -I ", " -D "))


def is_left_alone(street: Street, port: int, listener: socket.socket) -> bool:
    clients = street.neighbour, street.host
    return all(arrives(client, "tcp", _VIP, port, listener) for client in clients)


def test_another_programs_translation_goes_first(street: Street, firewall: str) -> None:
    priorities = (-100, -99) if firewall == "nftables" else (-100,)  # iptables' table has one priority
    with (
        street.published(street.server, str(_PORT)) as port,
        street.published(street.far, str(_PORT)),  # iptables' rules forward nothing to other ports
        listening(street.far, "tcp", [_PORT]) as found,
    ):
        for priority in priorities:
            with translated(street, firewall, port, priority):
                assert is_left_alone(street, port, found[_PORT])
                street.gangway("network", "create", "more", "--subnet", "172.28.0.0/24")  # writes all rules anew
                try:
                    assert is_left_alone(street, port, found[_PORT])
                finally:
                    street.gangway("network", "rm", "more")


def overlaps(street: Street) -> str:
    """Return what doctor says of other programs' translations; empty if there are none of published ports."""
    name = "no other program translates published ports"
    (check,) = (one for one in street.gangway.json("doctor") if one["check"] == name)
    assert check["holds"] is (check["note"] == "")
    return str(check["note"])


@pytest.mark.parametrize("of", ["nftables", "iptables"])
def test_doctor_names_the_translation(street: Street, firewall: str, of: str) -> None:
    place = {"nftables": "nftables ip foreign pre", "iptables": "iptables nat PREROUTING"}[of]
    with street.published(street.server, str(_PORT), f"{_PORT}/udp") as port:
        assert overlaps(street) == ""
        with translated(street, of, port, -99):
            order = {
                ("nftables", "nftables"): "it comes first",
                ("nftables", "iptables"): "it comes first",
                ("iptables", "nftables"): "gangway's rule comes first",
                ("iptables", "iptables"): "it comes first",
            }[firewall, of]
            notes = overlaps(street).split("; ")
            assert notes[0] == (
                f"{place} translates tcp port {port} at {_VIP}, published as 0.0.0.0:{port}:{_PORT}/tcp: {order}"
            )
            assert notes[1] == f"gangway daemon --exclude {_VIP} leaves the address to the other program"
            assert len(notes) == 4  # the chain for the host's own packets has the rule, too
        assert overlaps(street) == ""
    assert overlaps(street) == ""


# Rules that match the VIP and the port by sets, as kube-proxy, keepalived and people write them.
_SETS = [
    ("nft", "ip daddr {vip} tcp dport {{ 7000, {port} }} dnat ip to {target}", "pre"),
    ("nft", "ip daddr @vips tcp dport {before}-{port} dnat ip to {target}", "pre"),
    ("nft", "ip daddr . meta l4proto . th dport vmap @services", "service"),
    ("nft", "ip daddr @vips meta l4proto {{ tcp, udp }} dnat ip to th dport map @targets", "pre"),
    ("nft", "ip daddr . th dport @spans meta l4proto tcp dnat ip to {target}", "pre"),
    ("iptables", "-d {vip} -p tcp -m multiport --dports 7000,{before}:{port}", ""),
    ("iptables", "-p tcp -m iprange --dst-range {vip}-198.51.100.8 --dport {port}", ""),
    ("iptables", "-m set --match-set services dst,dst", ""),
    ("iptables", "-p tcp -m set --match-set vips dst --dport {port}", ""),
    ("iptables-legacy", "-d {vip} -p tcp --dport {port}", ""),
]
_SETS_NFT = """nft -f - <<'END'
table inet sets {{
    set vips {{ type ipv4_addr; flags interval; elements = {{ 198.51.100.0-198.51.100.9, 203.0.113.1 }}; }}
    set spans {{ type ipv4_addr . inet_service; flags interval; elements = {{ 198.51.100.0/24 . {before}-{port} }}; }}
    map targets {{ type inet_service : ipv4_addr; flags interval; elements = {{ 7 : {to}, {before}-{port} : {to} }}; }}
    map services {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
    chain service {{ dnat ip to numgen inc mod 2 map {{ 0 : {to}, 1 : {to} }}; }}
    chain pre {{ type nat hook prerouting priority -99; {rule}; }}
}}
add element inet sets services {{ {vip} . tcp . {port} : jump service }}
END
"""


@contextmanager
def translated_by_sets(street: Street, tool: str, rule: str, port: int) -> Iterator[None]:
    to = street.far.address4
    words = {"vip": _VIP, "port": port, "before": port - 1, "to": to, "target": f"{to}:{_PORT}"}
    rule = rule.format(**words)
    if tool == "nft":
        street.host.run("sh", "-ec", _SETS_NFT.format(**words, rule=rule))
        yield
        street.host.run("nft", "delete", "table", "inet", "sets")
    else:
        with street.host.entered():
            create_set("vips", "hash:net", [entry(_VIP)])
            create_set("services", "hash:ip,port", [entry("203.0.113.1", "udp", port), entry(_VIP, "tcp", port)])
        line = f"{tool} -t nat {{}} PREROUTING {rule} -j DNAT --to-destination {to}"
        street.host.run("sh", "-ec", line.format("-I"))
        yield
        street.host.run("sh", "-ec", line.format("-D"))
        with street.host.entered():
            destroy_sets()


@pytest.mark.parametrize(("tool", "rule", "chain"), _SETS)
def test_doctor_reads_sets_maps_and_the_other_variant(street: Street, tool: str, rule: str, chain: str) -> None:
    place = f"nftables inet sets {chain}" if tool == "nft" else f"{tool} nat PREROUTING"
    with street.published(street.server, str(_PORT)) as port, translated_by_sets(street, tool, rule, port):
        found = overlaps(street)
        expected = f"{place} translates tcp port {port} at {_VIP}, published as 0.0.0.0:{port}:{_PORT}/tcp: "
        assert found.startswith(expected)
        assert found.endswith(f"gangway daemon --exclude {_VIP} leaves the address to the other program")


def test_doctor_says_which_set_is_too_large(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_MOST_BYTES", 100)
    with (
        translated_by_sets(street, "nft", "ip daddr @vips tcp dport 80 dnat ip to {target}", 80),
        street.host.entered(),
        pytest.raises(HostRefused, match="nftables: inet sets has a set vips that is too large to be read"),
    ):
        list(foreign_translations(lambda _: True))


def test_base_chains_stay_when_rules_are_written(street: Street, firewall: str) -> None:
    if firewall != "nftables":
        pytest.skip("iptables' base chains are the system's")

    def handles() -> list[str]:
        listed = street.host.run("nft", "--handle", "--terse", "list", "table", "inet", "gangway").stdout
        return [line for line in listed.splitlines() if line.startswith("\tchain ")]

    before = handles()
    street.gangway("network", "create", "more", "--subnet", "172.28.0.0/24")
    street.gangway("network", "rm", "more")
    assert handles() == before
