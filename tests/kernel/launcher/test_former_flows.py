"""UDP clients that are older than a port that dockerd publishes: its rules serve them, and not the relay for ever."""

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from lab.conntrack import Flow, tracked
from lab.netns import Container, Host, Neighbour
from lab.waiting import wait_until
from tests.kernel.launcher.launchers import UDP, Echo, publish

pytestmark = pytest.mark.any_kernel

TRANSLATION = "table ip nat { chain prerouting { type nat hook prerouting priority dstnat; %s; }; }"


@pytest.fixture
def neighbour(host: Host) -> Iterator[Neighbour]:
    host.run("nft", TRANSLATION % "ct state invalid drop")  # connections are tracked from now on
    host.sysctl("net.ipv4.ip_forward", 1)
    with Neighbour(host) as neighbour:
        yield neighbour
    host.run("nft", "delete table ip nat")


def test_sender_that_is_older_than_the_port(host: Host, box: Container, neighbour: Neighbour, port: int) -> None:
    with neighbour.entered():
        sender = socket.socket(socket.AF_INET, UDP)
    with closing(sender), host.entered():
        flow = Flow("udp", neighbour.host4, port, neighbour.host4)
        sender.sendto(b"early", (neighbour.host4, port))
        wait_until(lambda: flow in tracked(), "the sender to be tracked", 3)
        to = f"{box.address4}:{Echo.port}"
        host.run("nft", TRANSLATION % f"ip daddr {neighbour.host4} udp dport {port} dnat to {to}")
        publish(host, box, port, proto="udp")

        def is_translated() -> bool:
            sender.sendto(b"late", (neighbour.host4, port))
            return flow._replace(to=box.address4) in tracked()

        wait_until(is_translated, "the sender to be translated", 5)
        assert flow not in tracked()
