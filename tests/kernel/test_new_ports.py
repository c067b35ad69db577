"""By nat: a UDP server's answer from a new port, as with TFTP, leaves from the address that was asked."""

import socket
from collections.abc import Iterator

import pytest

from lab.gangwayd import Gangway
from lab.netns import Namespace
from tests.kernel.street import HOST4, HOST6, Street

SECOND4, SECOND6 = "10.77.0.77", "fd77::77"
PATIENCE_S = 5


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street("--firewall", "nftables") as made:
        made.host.ip("address", "add", f"{SECOND4}/24", "dev", "eth0")
        made.host.ip("address", "add", f"{SECOND6}/64", "dev", "eth0", "nodad")
        yield made


@pytest.mark.parametrize("address", [HOST4, SECOND4, HOST6, SECOND6])
@pytest.mark.parametrize("client_space", ["neighbour", "host"])
def test_an_answer_from_a_new_port_leaves_from_the_asked_address(
    street: Street, client_space: str, address: str
) -> None:
    family, at = (socket.AF_INET6, "[::]:") if ":" in address else (socket.AF_INET, "")
    with street.server.space.entered():
        server, session = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
    with getattr(street, client_space).entered():
        client = socket.socket(family, socket.SOCK_DGRAM)
    with server, session, client, street.published(street.server, f"{at}69:69/udp"):
        for sock in (server, session, client):
            sock.settimeout(PATIENCE_S)
        server.bind(("", 69))
        client.sendto(b"read", (address, 69))
        _, peer = server.recvfrom(100)
        session.sendto(b"data", peer)
        data, source = client.recvfrom(100)
        assert (data, source[:2]) == (b"data", (address, session.getsockname()[1]))
        client.sendto(b"more", source)
        assert session.recvfrom(100)[0] == b"more"


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_doctor_says_whether_they_do(firewall: str) -> None:
    with Namespace("host") as host, Gangway(host, "--firewall", firewall) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        (check,) = (one for one in gangway.json("doctor") if one["check"] == "nat: UDP answers from new ports")
        assert check["holds"] is (firewall == "nftables")
        assert check["holds"] or check["note"].startswith(
            "iptables does not know which address the client asked: by nat"
        )
