"""Where IPv6 is switched off, on the host or in a container, ports are published by IPv4, and gangway says so."""

import subprocess
from collections.abc import Iterator

import pytest

from lab import echo_server
from lab.gangwayd import GANGWAY, CommandFailed, Gangway
from lab.netns import Namespace, end
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel
BOTH = "--subnet", "172.30.0.0/24", "--subnet", "fd30::/64"


def switch_off(space: Namespace, name: str) -> None:
    space.sysctl(f"net.ipv6.conf.{name}.disable_ipv6", 1)


def reaches(space: Namespace, address: str, port: int = 8080) -> bool:
    with space.entered():
        return echo_server.is_answered("tcp", address, port)


@pytest.fixture(params=["all", "default"])
def without(request: pytest.FixtureRequest) -> Iterator[Gangway]:
    """A daemon on a host without IPv6."""
    with Namespace("host") as host:
        switch_off(host, request.param)
        with Gangway(host) as gangway:
            yield gangway


@pytest.fixture(scope="module")
def gangway() -> Iterator[Gangway]:
    """A daemon on a host with IPv6, with a network of both families."""
    with Namespace("host") as host, Gangway(host) as made:
        made("network", "create", "web", *BOTH)
        yield made


def test_run_works_with_ipv4_and_says_so(without: Gangway) -> None:
    web = "python3", "-m", "http.server", "8000"
    words = str(GANGWAY), "run", "-p", "8000:8000", "--", *web
    run = without.host.popen(*words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    assert "network gangway0 has IPv4 only: IPv6 is switched off (net.ipv6.conf." in run.stderr.readline()
    ask = "curl", "-sf", "--max-time", "3", "http://127.0.0.1:8000/"
    wait_until(lambda: without.host.run(*ask, check=False).stdout, "an answer")
    end(run)


def test_network_with_an_ipv6_subnet_is_refused(without: Gangway) -> None:
    with pytest.raises(CommandFailed, match=r"network web cannot have the subnet fd30::/64: IPv6 is switched off"):
        without("network", "create", "web", *BOTH)
    without("network", "create", "web", *BOTH[:2])
    assert "new networks have IPv4 only" in without.run("doctor").stdout


@pytest.mark.parametrize("name", ["all", "default"])
def test_container_without_ipv6_has_an_ipv4_address(gangway: Gangway, name: str) -> None:
    with Namespace("box") as box:
        switch_off(box, name)
        with pytest.raises(CommandFailed, match=r"cannot have the address fd30::9: IPv6 is switched off"):
            gangway("attach", box.name, "--network", "web", "--ip", "fd30::9")
        done = gangway.run("attach", box.name, "--network", "web")
        assert done.stdout.startswith("172.30.0.")
        assert len(done.stdout.split()) == 1
        assert (
            f"container {box.name}: IPv4 only: IPv6 is switched off (net.ipv6.conf.{name}.disable_ipv6 = 1)"
            in done.stderr
        )
        echo_server.serve(box.popen, 80)
        gangway("publish", box.name, "-p", "8080:80")
        for address in ("127.0.0.1", "::1"):
            wait_until(lambda at=address: reaches(gangway.host, at), f"an answer to {address}")  # type: ignore[misc]
        gangway("detach", box.name)


def test_ipv6_that_is_switched_off_later_takes_ipv4_with_it_nowhere(gangway: Gangway) -> None:
    """The bridge is created again as far as it can be, and the log has the reason for the rest."""
    with Namespace("box") as box:
        gangway("attach", box.name, "--network", "web")
        echo_server.serve(box.popen, 80)
        gangway("publish", box.name, "-p", "8080:80")
        switch_off(gangway.host, "default")
        gangway.host.ip("link", "delete", "gw-web")
        wait_until(lambda: "172.30.0.1/24" in gangway.host.ip("address"), "the bridge")
        wait_until(lambda: reaches(gangway.host, "172.30.0.1"), "an answer")
        reason = "cannot add fd30::1/64 to gw-web: IPv6 is switched off (net.ipv6.conf.gw-web.disable_ipv6 = 1)"
        wait_until(lambda: reason in gangway.log.read_text(), "the reason")
        gangway.host.sysctl("net.ipv6.conf.gw-web.disable_ipv6", 0)
        wait_until(lambda: "fd30::1/64" in gangway.host.ip("address"), "the IPv6 address", 12)
        gangway("detach", box.name)
