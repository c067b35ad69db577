"""A kernel that was started with ipv6.disable=1, which only a VM can have: ports are published by IPv4."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from lab import echo_server
from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace, end
from lab.waiting import wait_until

pytestmark = pytest.mark.skipif(os.path.exists("/proc/net/if_inet6"), reason="the kernel has IPv6")
HOST, CLIENT = "10.77.0.1", "10.77.0.2"


@pytest.fixture(scope="module", params=["nftables", "iptables", "none"])
def gangway(request: pytest.FixtureRequest) -> Iterator[Gangway]:
    with Namespace("host") as host, Gangway(host, "--firewall", request.param) as made:
        yield made


def answers(space: Namespace, protocol: str, address: str, port: int) -> bool:
    with suppress(echo_server.NoAnswer), space.entered():
        echo_server.request_here(protocol, address, port, patience_s=5)
        return True
    return False


def test_ports_are_published_by_ipv4(gangway: Gangway) -> None:
    host = gangway.host
    with Namespace("box") as box, Namespace("client") as client:
        host.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", client.name)
        for space, address in ((host, HOST), (client, CLIENT)):
            space.ip("address", "add", f"{address}/24", "dev", "eth0")
            space.ip("link", "set", "eth0", "up")
        echo_server.serve(box.popen, 80)
        gangway("attach", box.name)
        gangway("publish", box.name, "-p", "8080:80", "-p", "8080:80/udp", "-p", "9000-9009:80-89")
        for space, address in ((host, "127.0.0.1"), (host, HOST), (client, HOST)):
            for protocol in ("tcp", "udp"):
                assert answers(space, protocol, address, 8080), (space.name, protocol, address)
            assert answers(space, "tcp", address, 9000)
        assert "new networks have IPv4 only" in gangway.run("doctor").stdout
        gangway("detach", box.name)
        log = gangway.log.read_text()
        assert "Traceback" not in log


def test_run_says_so(gangway: Gangway) -> None:
    words = str(GANGWAY), "run", "-p", "8000:8000", "--", "python3", "-m", "http.server", "8000"
    run = gangway.host.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    assert "has IPv4 only: the kernel has no IPv6" in run.stderr.readline()

    def is_served() -> bool:
        with gangway.host.entered(), suppress(OSError), socket.create_connection(("127.0.0.1", 8000), 3):
            return True
        return False

    wait_until(is_served, "a server at 127.0.0.1", 20)
    end(run)
