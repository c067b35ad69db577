"""The kinds of clients of a published port, and the road that each of them gets.

The server in the container reports which address it saw, but the road is not guessed from that. The kernel's table of
sockets shows the peer that a process on the host is really connected to (redirect); dockerd's rule counts the
connections that it translates (nat); all others were carried by the relay.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from lab import echo_server
from lab.addresses import host_port
from lab.dockerd import Dockerd
from lab.netns import Container, Host
from lab.redirect import actual_peer

PORT = 8000
SERVER, OTHER = "web", "other"


class Client(NamedTuple):
    """A kind of client, and the address that it connects to."""

    origin: str
    address: str
    command: Callable[..., list[str]] | None = None
    """Returns the command line that runs a program where the client is; None: the client is a process on the host."""


class Outcome(NamedTuple):
    """What a client got: the answer, the source address that the container saw, and the road."""

    origin: str
    target: str
    answer: str
    seen: str
    road: str


def clients(host: Host, remote: Container, docker: Dockerd) -> Iterator[Client]:
    """Yield every kind of client."""
    yield Client("the host, loopback", "127.0.0.1")
    yield Client("the host, loopback", "::1")
    yield Client("the host, own address", host.gateway4)
    yield Client("the host, own address", host.gateway6)
    yield Client("another machine", host.gateway4, remote.command)
    yield Client("another machine", host.gateway6, remote.command)
    yield Client("another container", host.gateway4, partial(docker.command_in, OTHER))
    yield Client("the container itself", host.gateway4, partial(docker.command_in, SERVER))


def outcomes(host: Host, client: Client) -> Iterator[Outcome]:
    """Send requests over TCP and UDP; yield one outcome if the results are the same, else one for each protocol.

    echo_server.NoAnswer: a request failed.
    """
    found = {}
    for protocol in ("tcp", "udp"):
        before = _translated_count(host)
        try:
            answer, is_redirected = _request(host, client, protocol)
        except echo_server.NoAnswer as error:
            raise echo_server.NoAnswer(f"request from {client.origin} failed: {error}") from None
        is_translated = _translated_count(host) > before
        road = "redirect" if is_redirected else "nat (dockerd's rule)" if is_translated else "relay"
        found[protocol] = Outcome(client.origin, host_port(client.address, PORT), answer.text, answer.peer, road)
    if found["tcp"] == found["udp"]:
        found = {"tcp and udp": found["tcp"]}
    for protocol, outcome in found.items():
        yield outcome._replace(target=f"{outcome.target} {protocol}")


def _request(host: Host, client: Client, protocol: str) -> tuple[echo_server.Answer, bool]:
    """Return the answer, and whether the client's socket was redirected."""
    if client.command is not None:
        return echo_server.request(client.command, protocol, client.address, PORT), False
    peers: list[tuple[str, int]] = []
    with host.entered():
        answer = echo_server.request_here(
            protocol, client.address, PORT, connected=lambda sock: peers.append(actual_peer(sock))
        )
    return answer, peers != [(client.address, PORT)]


def _translated_count(host: Host) -> int:
    """Return the number of connections that dockerd's rules for the port have translated so far."""
    rules = host.run("iptables", "-t", "nat", "-vxnL", "DOCKER").stdout
    return sum(int(count) for count in re.findall(rf"^ *(\d+) .*DNAT .* dpt:{PORT} ", rules, re.MULTILINE))
