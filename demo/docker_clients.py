"""Who asks a published port at which address, and what comes of it.

How it works.  The server in the container says which address it saw.  The road is not guessed from that: the kernel's
table of sockets tells whom a process on the host is really connected to, dockerd's own rule counts the connections that
it translates, and what is neither has been carried by the relay.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from lab import echo_server
from lab.dockerd import Dockerd
from lab.netns import Container, Host
from lab.redirect import actual_peer

PORT = 8000
SERVER, OTHER = "web", "other"


class Client(NamedTuple):
    """A kind of client, and an address that it asks."""

    origin: str
    address: str
    command: Callable[..., list[str]] | None = None
    """Runs another one there; None: it is a process on the host."""


class Outcome(NamedTuple):
    """What a client got."""

    origin: str
    asked: str
    answer: str
    seen: str
    road: str


def clients(host: Host, remote: Container, docker: Dockerd) -> Iterator[Client]:
    """Every kind of client."""
    yield Client("the host, loopback", "127.0.0.1")
    yield Client("the host, loopback", "::1")
    yield Client("the host, own address", host.gateway4)
    yield Client("the host, own address", host.gateway6)
    yield Client("another machine", host.gateway4, remote.command)
    yield Client("another machine", host.gateway6, remote.command)
    yield Client("another container", host.gateway4, partial(docker.command_in, OTHER))
    yield Client("the container itself", host.gateway4, partial(docker.command_in, SERVER))


def outcomes(host: Host, client: Client) -> Iterator[Outcome]:
    """Asks over TCP and UDP: one outcome if they are alike, else one for each.  NoAnswer if there is none."""
    place = f"[{client.address}]:{PORT}" if ":" in client.address else f"{client.address}:{PORT}"
    found = {}
    for protocol in ("tcp", "udp"):
        before = _translated(host)
        try:
            answer, is_redirected = _ask(host, client, protocol)
        except echo_server.NoAnswer as error:
            raise echo_server.NoAnswer(f"{client.origin} got no right answer: {error}") from None
        is_translated = _translated(host) > before
        road = "redirect" if is_redirected else "nat, by dockerd's rule" if is_translated else "relay"
        found[protocol] = Outcome(client.origin, place, answer.text, answer.peer, road)
    if found["tcp"] == found["udp"]:
        found = {"tcp and udp": found["tcp"]}
    for protocol, outcome in found.items():
        yield outcome._replace(asked=f"{outcome.asked} {protocol}")


def _ask(host: Host, client: Client, protocol: str) -> tuple[echo_server.Answer, bool]:
    """What was answered, and whether it was a socket that had been aimed elsewhere."""
    if client.command is not None:
        return echo_server.request(client.command, protocol, client.address, PORT), False
    aims: list[tuple[str, int]] = []
    with host.entered():
        answer = echo_server.request_here(
            protocol, client.address, PORT, connected=lambda sock: aims.append(actual_peer(sock))
        )
    return answer, aims != [(client.address, PORT)]


def _translated(host: Host) -> int:
    """How many connections dockerd's rules for the port have translated so far."""
    rules = host.run("iptables", "-t", "nat", "-vxnL", "DOCKER").stdout
    return sum(int(count) for count in re.findall(rf"^ *(\d+) .*DNAT .* dpt:{PORT} ", rules, re.MULTILINE))
