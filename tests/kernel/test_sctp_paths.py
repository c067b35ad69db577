"""SCTP's ends know all of each other's addresses and try them: an association through the rules outlives that."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gangway.kernel.ports import IPPROTO_SCTP, has_sockets
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, Street, without_redirect

PORT = 81
"""Where the container listens by both families at once: it tells a client by IPv4 all that it has."""
PATIENCE_S = 30

pytestmark = pytest.mark.skipif(not has_sockets("sctp"), reason="no SCTP")


@pytest.fixture(
    scope="module", params=[("nftables",), ("iptables",), ("iptables", "--chain-prefix", "DOCKER")], ids=" ".join
)
def street(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    with Street("--firewall", *request.param, *without_redirect(tmp_path_factory.mktemp("config"))) as street:
        for space in (street.host, street.server.space):  # the first try comes half of this after the handshake
            space.sysctl("net.sctp.rto_min", 100)
            space.sysctl("net.sctp.rto_initial", 500)
        yield street


@pytest.mark.parametrize("address", [HOST4, HOST6])
def test_an_association_outlives_the_first_heartbeats(street: Street, address: str) -> None:
    host, server = street.host, street.server.space
    with street.published(street.server, f"{PORT}/sctp") as port, _listener(server) as listener:
        with host.entered():
            client = _connect(address, port)
        served, _ = listener.accept()
        with client, served:
            for sock in (client, served):
                sock.settimeout(PATIENCE_S)
            tried = [server] if address == HOST6 else [server, host]  # who knows of more addresses than one
            before = [_control_chunks(space) for space in tried]
            wait_until(
                lambda: all(_control_chunks(space) > count for space, count in zip(tried, before, strict=True)),
                "heartbeats",
                PATIENCE_S,
            )
            client.sendall(b"there")
            assert served.recv(100) == b"there"
            served.sendall(b"and back")
            assert client.recv(100) == b"and back"


def _listener(space: Namespace) -> socket.socket:
    with space.entered():
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, IPPROTO_SCTP)
    listener.bind(("::", PORT))
    listener.listen()
    listener.settimeout(PATIENCE_S)
    return listener


def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM, IPPROTO_SCTP)
    client.settimeout(PATIENCE_S)
    client.connect((address, port))
    return client


def _control_chunks(space: Namespace) -> int:
    """How many chunks other than data a namespace has sent."""
    with space.entered():
        lines = Path("/proc/thread-self/net/sctp/snmp").read_text().splitlines()
    return int(dict(line.split() for line in lines)["SctpOutCtrlChunks"])
