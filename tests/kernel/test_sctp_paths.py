"""SCTP's ends try all pairs of their addresses: a translated association outlives that."""

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
"""Where the container listens by both families at once: it tells a client by IPv4 all that it has."""
RTO_MS = 500
"""Before a path has answered or failed.  It is tried half of this to one and a half after the handshake."""
UNCONFIRMED = "3"
"""A path's state in /proc/net/sctp/remaddr: include/net/sctp/constants.h, sctp_spinfo_state."""
PATIENCE_S = 30

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
def test_a_translated_association_outlives_them(street: Street, ports: str, address: str, who: str) -> None:
    server, client = street.server.space, street.host if who == "host" else street.neighbour
    with (
        street.published(street.server, ports) as port,
        _listener(server) as listener,
        _associated(client, address, port, listener) as ends,
    ):
        _wait_until_all_are_tried(client, server)
        assert UNCONFIRMED in [state for state, _ in _paths(server)]
        echo(*ends)


@contextmanager
def _associated(
    space: Namespace, address: str, port: int, listener: socket.socket
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client in `space` and the end that serves it."""
    with space.entered():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM, IPPROTO_SCTP)
    with client:
        client.settimeout(PATIENCE_S)
        client.connect((address, port))
        served, _ = listener.accept()
        with served:
            served.settimeout(PATIENCE_S)
            yield client, served


def _listener(space: Namespace) -> socket.socket:
    with space.entered():
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, IPPROTO_SCTP)
    listener.settimeout(PATIENCE_S)
    listener.bind(("::", PORT))
    listener.listen()
    return listener


def _wait_until_all_are_tried(*spaces: Namespace) -> None:
    """Each path has answered, or has been silent: then its RTO doubles."""
    untried = (UNCONFIRMED, RTO_MS)
    wait_until(lambda: not any(untried in _paths(space) for space in spaces), "heartbeats on all paths", PATIENCE_S)


def _paths(space: Namespace) -> list[tuple[str, int]]:
    """State and RTO, in milliseconds, of each path of the associations that a namespace has."""
    with space.entered():
        _head, *lines = Path("/proc/thread-self/net/sctp/remaddr").read_text().splitlines()
    return [(words[7], int(words[3])) for words in map(str.split, lines)]
