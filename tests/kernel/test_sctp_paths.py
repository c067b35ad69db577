"""SCTP probes all pairs of addresses of both ends: a translated association survives that."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gangway.host.sockets import has_sockets
from gangway.inet import IPPROTO_SCTP
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.ground import echo
from tests.kernel.street import HOST4, HOST6, Street, without_redirect

PORT = 81
"""The container listens here with a dual-stack socket: it announces all its addresses to IPv4 clients, too."""
RTO_MS = 500
"""The retransmission timeout until a path has answered or failed.  Probes follow the handshake by 0.5 to 1.5 of it."""
UNCONFIRMED = "3"
"""A path's state in /proc/net/sctp/remaddr: include/net/sctp/constants.h, sctp_spinfo_state."""
TIMEOUT_S = 30

pytestmark = pytest.mark.skipif(not has_sockets("sctp"), reason="no SCTP")


@pytest.fixture(
    scope="module", params=[("nftables",), ("iptables",), ("iptables", "--chain-prefix", "DOCKER")], ids=" ".join
)
def street(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    with Street("--firewall", *request.param, *without_redirect(tmp_path_factory.mktemp("config"))) as street:
        for address in ("10.77.0.77/24", "fd77::77/64"):
            street.neighbour.ip("address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else []))
        for space in (street.host, street.neighbour, street.server.space):
            space.sysctl("net.sctp.rto_min", 100)
            space.sysctl("net.sctp.rto_initial", RTO_MS)
        yield street


@pytest.mark.parametrize("who", ["host", "neighbour"])
@pytest.mark.parametrize(
    ("ports", "address"),
    [
        (f"{PORT}/sctp", HOST4),
        (f"{PORT}/sctp", HOST6),
        (f"{PORT}/sctp", f"::ffff:{HOST4}"),
        (f"0.0.0.0:0:{PORT}/sctp", f"::ffff:{HOST4}"),
        (f"[::]:0:{PORT}/sctp", HOST6),
        (f"{HOST4}:0:{PORT}/sctp", HOST4),
    ],
)
def test_translated_association_survives_probing(street: Street, ports: str, address: str, who: str) -> None:
    server, client = street.server.space, street.host if who == "host" else street.neighbour
    with (
        street.published(street.server, ports) as port,
        _listener(server) as listener,
        _associated(client, address, port, listener) as ends,
    ):
        _wait_until_all_are_probed(client, server)
        assert UNCONFIRMED in [state for state, _ in _paths(server)]
        echo(*ends)


@contextmanager
def _associated(
    space: Namespace, address: str, port: int, listener: socket.socket
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect a client in `space`; yield its socket and the server's."""
    with space.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM, IPPROTO_SCTP)
    with client:
        client.settimeout(TIMEOUT_S)
        client.connect((address, port))
        served, _ = listener.accept()
        with served:
            served.settimeout(TIMEOUT_S)
            yield client, served


def _listener(space: Namespace) -> socket.socket:
    with space.entered():
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, IPPROTO_SCTP)
    listener.settimeout(TIMEOUT_S)
    listener.bind(("::", PORT))
    listener.listen()
    return listener


def _wait_until_all_are_probed(*spaces: Namespace) -> None:
    """Wait until each path has answered, or its RTO has doubled: the sign that it did not."""
    unprobed = (UNCONFIRMED, RTO_MS)
    wait_until(lambda: not any(unprobed in _paths(space) for space in spaces), "heartbeats on all paths", TIMEOUT_S)


def _paths(space: Namespace) -> list[tuple[str, int]]:
    """Return state and RTO in milliseconds of each path of a namespace's associations."""
    with space.entered():
        _head, *lines = Path("/proc/thread-self/net/sctp/remaddr").read_text().splitlines()
    return [(words[7], int(words[3])) for words in map(str.split, lines)]
