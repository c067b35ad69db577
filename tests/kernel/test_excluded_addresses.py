"""At addresses that the setting `exclude` names nothing is published; other programs serve the ports there."""

import socket
from collections.abc import Iterator
from itertools import product

import pytest

from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.crossings import arrives, client_of, everywhere, listening, reached
from tests.kernel.host_ports import PROTOCOLS, WITHOUT_STEERING, bound, is_refused
from tests.kernel.street import HOST4, HOST6, Street

pytestmark = pytest.mark.any_kernel

VIP4, VIP6, LOOPBACK, LATER = "198.51.100.7", "fd98::7", "127.0.0.53", "198.51.100.8"
EXCLUDED = VIP4, VIP6, LOOPBACK
FLAGS = "--exclude", VIP4, "--exclude", LOOPBACK, "--exclude", "vips"
_PREPARE = f"""
ip link add vips type veth peer name other
ip link set vips up
ip link set other up
ip address add {VIP4}/32 dev lo
ip address add {VIP6}/128 dev vips nodad
"""


class Excluding(Street):
    """A street whose daemon excludes addresses; `unsteered`, it has neither rules nor steering."""

    def __init__(self, firewall: str) -> None:
        is_unsteered = firewall == "unsteered"
        self.firewall = "none" if is_unsteered else firewall
        flags, within = ("--firewall", self.firewall, *FLAGS), WITHOUT_STEERING if is_unsteered else ()
        super().__init__(*flags, prepare=_PREPARE, within=within)
        # Without steering the relay's sockets have the port at all addresses.
        self.shared_protocols = () if is_unsteered else PROTOCOLS


@pytest.fixture(scope="module", params=["nftables", "iptables", "unsteered"])
def street(request: pytest.FixtureRequest) -> Iterator[Excluding]:
    """A street whose daemon excludes some addresses."""
    with Excluding(request.param) as made:
        yield made


@pytest.fixture(scope="module")
def port(street: Excluding) -> Iterator[int]:
    """A port of each protocol that is published at all addresses."""
    with street.host.entered(), socket.socket() as sock:
        sock.bind(("", 0))
        free = sock.getsockname()[1]
    with street.published(street.server, f"{free}:80", f"{free}:80/udp") as found:
        yield found


def served(street: Excluding, addresses: tuple[str, ...], port: int) -> list[str]:
    """Return the clients that are answered: of the host, a neighbour, and containers."""
    asked = everywhere([street.host], addresses, port)
    beyond = [one for one in addresses if not one.startswith("127.") and one != "::1"]
    asked += everywhere([street.neighbour, street.near.space, street.far.space], beyond, port)
    return reached(street, asked)


def test_no_road_leads_from_an_excluded_address(street: Excluding, port: int) -> None:
    assert served(street, EXCLUDED, port) == []
    others = HOST4, HOST6, "127.0.0.1", "::1"
    assert len(served(street, others, port)) == 2 * (4 + 4 + 1 + 1)


def test_connection_to_an_excluded_address_ends_at_once(street: Excluding, port: int) -> None:
    """Where the relay's socket is at all addresses, it accepts and resets."""
    for client in (street.host, street.neighbour):
        with pytest.raises(ConnectionError), client_of(client, "tcp", VIP4, port) as sock:
            assert sock.recv(1), "an orderly end"


def test_another_program_serves_the_port(street: Excluding, port: int) -> None:
    for address, protocol in product(EXCLUDED, street.shared_protocols):
        with bound(street.host, protocol, address, port) as sock:
            sock.settimeout(3)
            if protocol == "tcp":
                sock.listen()
            for client in [street.host] if address == LOOPBACK else [street.host, street.neighbour]:
                with (
                    client_of(client, protocol, address, port),
                    sock.accept()[0] if protocol == "tcp" else sock.dup() as at,
                ):
                    assert at.recv(100) == f"{address} {port}".encode()
    assert is_refused(street.host, "tcp", HOST4, port)


def test_translation_that_comes_after_ours_is_left_alone(street: Excluding, port: int) -> None:
    if street.firewall == "none":
        pytest.skip("no rules")
    to = f"ip daddr {VIP4} tcp dport {port} dnat to {street.far.address4}:81"
    hooks = "".join(
        f"chain {name} {{ type nat hook {name} priority -40; {to}; }}\n" for name in ("prerouting", "output")
    )
    with street.published(street.far, "81"), listening(street.far, "tcp", [81]) as found:
        street.host.run("nft", f"table ip later {{ {hooks} }}")
        for client in (street.neighbour, street.host):
            assert arrives(client, "tcp", VIP4, port, found[81])
        street.host.run("nft", "delete table ip later")


def test_port_that_another_program_serves_there_is_published(street: Excluding) -> None:
    for protocol in street.shared_protocols:
        with bound(street.host, protocol, VIP4, 0) as sock:
            if protocol == "tcp":
                sock.listen()
            port = sock.getsockname()[1]
            with street.published(street.far, f"{port}:80/{protocol}"):
                assert street.reaches(street.neighbour, protocol, HOST4, port)


def test_address_of_an_excluded_interface_is_followed(street: Excluding, port: int) -> None:
    def is_served() -> bool:
        return street.reaches(street.neighbour, "tcp", LATER, port)

    street.host.ip("address", "add", f"{LATER}/32", "dev", "lo")
    assert is_served()
    street.host.ip("address", "del", f"{LATER}/32", "dev", "lo")
    street.host.ip("address", "add", f"{LATER}/32", "dev", "vips")
    wait_until(lambda: not is_served(), "the address to be excluded")
    street.host.ip("address", "del", f"{LATER}/32", "dev", "vips")
    street.host.ip("address", "add", f"{LATER}/32", "dev", "lo")
    wait_until(is_served, "the address to be served again")
    street.host.ip("address", "del", f"{LATER}/32", "dev", "lo")


def test_excluded_address_cannot_be_published_by_name(street: Excluding) -> None:
    for address in (VIP4, f"[{VIP6}]", LOOPBACK):
        with pytest.raises(CommandFailed, match=r"setting exclude \(198.51.100.7, 127.0.0.53, vips\)"):
            street.publish(street.server, f"{address}:8000:80")


def test_explain_names_the_setting(street: Excluding, port: int) -> None:
    text = street.gangway("explain", f"{VIP4}:{port}", "--from", "remote")
    assert "remote: blocked" in text
    assert "`exclude`" in text


def test_relay_that_was_restarted_and_a_later_daemon_exclude_as_before(street: Excluding, port: int) -> None:
    for pid in street.gangway.relays():
        street.host.run("kill", "-9", str(pid))
    wait_until(lambda: street.reaches(street.host, "udp", HOST4, port), "the relay to serve again")
    assert served(street, EXCLUDED, port) == []
    street.gangway.stop()
    street.gangway.start()
    assert served(street, EXCLUDED, port) == []


def test_daemon_without_the_setting_serves_all_addresses(street: Excluding, port: int) -> None:
    street.gangway.stop()
    street.gangway.start("--firewall", street.firewall)
    wait_until(lambda: street.reaches(street.neighbour, "tcp", VIP4, port), "nothing to be excluded any more")


def test_wrong_value_is_refused_at_the_start(street: Excluding) -> None:
    with Namespace("host") as host, pytest.raises(CommandFailed) as refused, Gangway(host, "--exclude", "10.0.0.5/24"):
        pass
    assert str(refused.value).count("\n") == 0
    assert "invalid exclude '10.0.0.5/24'" in str(refused.value)
