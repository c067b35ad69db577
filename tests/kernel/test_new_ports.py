"""By nat: a UDP server's answer from a new port, as with TFTP, leaves from the address that was asked."""

import socket
from collections.abc import Iterator

import pytest

from tests.kernel.street import HOST4, Street

SECOND = "10.77.0.77"
PATIENCE_S = 5


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street("--firewall", "nftables") as made:
        made.host.ip("address", "add", f"{SECOND}/24", "dev", "eth0")
        yield made


@pytest.mark.parametrize("address", [HOST4, SECOND])
@pytest.mark.parametrize("client_space", ["neighbour", "host"])
def test_an_answer_from_a_new_port_leaves_from_the_asked_address(
    street: Street, client_space: str, address: str
) -> None:
    with street.server.space.entered():
        server, session = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with getattr(street, client_space).entered():
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server, session, client, street.published(street.server, "69:69/udp"):
        for sock in (server, session, client):
            sock.settimeout(PATIENCE_S)
        server.bind(("", 69))
        client.sendto(b"read", (address, 69))
        _, peer = server.recvfrom(100)
        session.sendto(b"data", peer)
        data, source = client.recvfrom(100)
        assert (data, source) == (b"data", (address, session.getsockname()[1]))
        client.sendto(b"more", source)
        assert session.recvfrom(100)[0] == b"more"
