"""A port at every address leaves alone what another program translates, as a program that listens there does."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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
