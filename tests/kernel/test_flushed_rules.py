"""Another program deletes or changes rules: connections go on, and the rules are repaired."""

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gangway.firewall.nat_guard import TABLE
from lab import echo_server
from lab.netns import Namespace
from lab.processes import suspend
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, Street

LISTINGS = {"nftables": "nft list table inet gangway", "iptables": "iptables -t nat -S GANGWAY"}


class Avenue(Street):
    """The street with one of the firewalls."""

    firewall = "nftables"

    def rules(self) -> str:
        """Return the rules that lead to containers, as the kernel has them."""
        return self.host.run(*LISTINGS[self.firewall].split(), check=False).stdout


@pytest.fixture(scope="module")
def street(firewall: str) -> Iterator[Avenue]:
    with Avenue("--firewall", firewall) as made:
        made.firewall = firewall
        yield made


def connect(space: Namespace, address: str, port: int) -> socket.socket:
    with space.entered():
        return socket.create_connection((address, port), 5)


def test_connections_outlive_a_flush(street: Avenue) -> None:
    """The daemon is stopped, so nothing repairs the rules while the connections are used."""
    daemon = street.gangway.daemon
    assert daemon is not None
    with street.published(street.server, "8080:80") as port, ExitStack() as opened:
        clients = [
            (street.neighbour, HOST4),
            (street.neighbour, HOST6),
            (street.far.space, HOST4),
            (street.host, HOST4),
        ]
        connections = [opened.enter_context(connect(*client, port)) for client in clients]
        before = street.rules()
        suspend(daemon.pid)
        try:
            street.host.run("nft", "flush", "ruleset")
            assert not street.rules()
            for connection in connections:
                assert echo_server.request_over(connection)
        finally:
            daemon.send_signal(signal.SIGCONT)
        wait_until(lambda: street.rules() == before, "the rules", 5)
        assert street.road(street.neighbour, "tcp", HOST4, port)[0] == "nat"


@pytest.mark.any_kernel
def test_a_port_that_another_program_leads_elsewhere_is_repaired(street: Avenue) -> None:
    with street.published(street.server, "8080:80", "9000-9010:9000-9010") as port:
        before = street.rules()
        if street.firewall == "nftables":
            street.host.run("nft", f"delete element inet gangway ports4 {{ tcp . {port} }}")
            stranger = f"add element inet gangway ports4 {{ tcp . {port} : 172.30.0.99 . 80 }}"
            street.host.run("nft", stranger, check=False)  # the port may be repaired already
            street.host.run("nft", "delete element inet gangway ranges4 { tcp . 0.0.0.0/0 . 9000-9010 }")
        else:
            rule = f"-p tcp --dport {port} -j DNAT --to-destination 172.30.0.99:80"
            street.host.run("iptables", "-t", "nat", "-I", "GANGWAY", *rule.split())
        wait_until(lambda: street.rules() == before, "the rules", 5)
        assert street.road(street.neighbour, "tcp", HOST4, port)[0] == "nat"
        (explained,) = street.gangway.json("explain", f"{HOST4}:{port}", "--from", "remote")
        assert "172.30.0.2" in str(explained)


def test_the_guard_is_removed_with_the_rules(street: Avenue) -> None:
    """This has to be the last test with this fixture."""
    assert TABLE in street.host.run("nft", "list", "tables").stdout
    street.leave()
    assert TABLE not in street.host.run("nft", "list", "tables").stdout
