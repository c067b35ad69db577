"""Who asks a published port at which address, and what comes of it.

How it works.  The server in the container says which address it saw.  The road is not guessed from that: dockerd's own
rule counts the connections that it redirects, and what it does not count has been carried by the relay.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from lab import mirror
from lab.dockerd import Dockerd
from lab.netns import Container, Host

PORT = 8000
SERVER, OTHER = "web", "other"


class Client(NamedTuple):
    """A kind of client, and an address that it asks."""

    origin: str
    address: str
    command: Callable[..., list[str]]


class Outcome(NamedTuple):
    """What a client got."""

    origin: str
    asked: str
    answer: str
    seen: str
    road: str


def clients(host: Host, remote: Container, docker: Dockerd) -> Iterator[Client]:
    """Every kind of client."""
    yield Client("the host, loopback", "127.0.0.1", host.command)
    yield Client("the host, loopback", "::1", host.command)
    yield Client("the host, own address", host.gateway4, host.command)
    yield Client("the host, own address", host.gateway6, host.command)
    yield Client("another machine", host.gateway4, remote.command)
    yield Client("another machine", host.gateway6, remote.command)
    yield Client("another container", host.gateway4, partial(docker.command_in, OTHER))
    yield Client("the container itself", host.gateway4, partial(docker.command_in, SERVER))


def outcomes(host: Host, client: Client) -> Iterator[Outcome]:
    """Asks over TCP and UDP: one outcome if they are alike, else one for each.  NoAnswer if there is none."""
    place = f"[{client.address}]:{PORT}" if ":" in client.address else f"{client.address}:{PORT}"
    found = {}
    for protocol in ("tcp", "udp"):
        before = _redirected(host)
        try:
            answer = mirror.ask(client.command, protocol, client.address, PORT)
        except mirror.NoAnswer as error:
            raise mirror.NoAnswer(f"{client.origin} got no right answer: {error}") from None
        road = "nat, by dockerd's rule" if _redirected(host) > before else "relay, by gangway"
        found[protocol] = Outcome(client.origin, place, answer.text, answer.peer, road)
    if found["tcp"] == found["udp"]:
        found = {"tcp and udp": found["tcp"]}
    for protocol, outcome in found.items():
        yield outcome._replace(asked=f"{outcome.asked} {protocol}")


def _redirected(host: Host) -> int:
    """How many connections dockerd's rules for the port have redirected so far."""
    rules = host.run("iptables", "-t", "nat", "-vxnL", "DOCKER").stdout
    return sum(int(count) for count in re.findall(rf"^ *(\d+) .*DNAT .* dpt:{PORT} ", rules, re.MULTILINE))
