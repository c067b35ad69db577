"""Requests that fail: the error is one line that says what to do, and nothing is changed.

What gangway lists is compared after each request, and what is in the kernel after the last one.
"""

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gangway.cli.client import ask_running
from lab.netns import Namespace
from tests.kernel.snapshot import compare, snapshot
from tests.kernel.street import HOST4, Box, Street

pytestmark = pytest.mark.any_kernel

INVALID, FAILED = 2, 1
_BAD = "network", "create", "bad"


class Quiet(Street):
    """The street, with a program that listens on a port, and a container that is not attached."""

    free: Namespace
    listed: list[object]
    """What gangway lists before the first request."""

    def lists(self) -> list[object]:
        """Return what gangway lists."""
        return [ask_running(str(self.gangway.socket), "GET", path) for path in ("/networks", "/mappings")]


@pytest.fixture(scope="module")
def street(firewall: str) -> Iterator[Quiet]:
    with Quiet("--firewall", firewall) as made, ExitStack() as stack:
        made.free = stack.enter_context(Namespace("free"))
        made.publish(made.server, "8080:80", "8080:80/udp", f"{HOST4}:8081:80")
        with made.host.entered():
            program = stack.enter_context(socket.create_server((HOST4, 7000)))
            assert program.getsockname()[1] == 7000
            datagram = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
            datagram.bind(("::", 7001))
        made.listed, before = made.lists(), snapshot(made.host)
        yield made
        assert compare(before, snapshot(made.host)) == []


def _refused(street: Quiet, words: tuple[str, ...], code: int) -> str:
    """Return the one line of the error; check that gangway lists the same as before."""
    done = street.gangway.run(*_named(street, words))
    assert street.lists() == street.listed
    return _line(done, code)


def _line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done
    assert done.stdout == ""
    assert re.fullmatch(r"gangway: .+\n", done.stderr), done.stderr
    return done.stderr


def _named(street: Quiet, words: tuple[str, ...]) -> list[str]:
    boxes: dict[str, Box] = {"SERVER": street.server, "FAR": street.far, "FOUR": street.four}
    names = {word: box.name for word, box in boxes.items()}
    names |= {"FREE": street.free.name, "FREE-PATH": street.free.path, "HOST": street.host.name}
    names |= {"SERVER-PATH": street.server.space.path}
    return [names.get(word, word) for word in words]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*_BAD, "--subnet", "172.40.0.0/33"), "172.40.0.0/33"),
        ((*_BAD, "--subnet", "172.40.0.1/24"), "'172.40.0.1/24': it has host bits set; write 172.40.0.0/24"),
        ((*_BAD, "--subnet", "home"), "invalid subnet 'home'"),
        ((*_BAD, "--subnet", "172.40.0.0/31"), "no room"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--subnet", "172.41.0.0/24"), "one subnet of IPv4"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--gateway", "172.41.0.1"), "172.41.0.1 is not in"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--gateway", "fd00::1"), "fd00::1 is not in"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--gateway", "172.40.0.0"), "172.40.0.0 is not a host address"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--gateway", "172.40.0.255"), "172.40.0.255 is not a host address"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--gateway", "door"), "'door' is not an IP address"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--bridge", "sixteencharacter"), "sixteencharacter.*longer than 15"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--bridge", "a/b"), "invalid bridge name 'a/b'"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--mtu", "10"), "MTU 10 is out of range.*68 to 65535"),
        (("network", "create", "a b", "--subnet", "172.40.0.0/24"), "invalid network name 'a b'"),
        (("publish", "SERVER", "-p", "80:80/icmp"), "-p '80:80/icmp': .*'icmp'.*tcp, udp or sctp"),
        (("publish", "SERVER", "-p", "9-8:9-8"), "reversed.*8-9"),
        (("publish", "SERVER", "-p", "1-70000:1-70000"), "70000 is out of range.*65535"),
        (("publish", "SERVER", "-p", "80-90:80-85"), "11 host ports for 6 container ports"),
        (("publish", "SERVER", "-p", "web"), "'web' is not a port"),
        (("publish", "SERVER", "-p", "300.1.1.1:80:80"), "'300.1.1.1' is not an IP address"),
        (("publish", "SERVER", "-p", "8090:80", "-p", "8091:80/icmp"), "icmp"),
        (("publish", "SERVER", "-p", "8090:80", "-p", "224.0.0.1:80:80/udp"), "224.0.0.1 is a multicast address"),
        (("publish", "SERVER", "-p", "[ff02::1]:80:80"), "ff02::1 is a multicast address"),
        (("publish", "SERVER", "-p", "255.255.255.255:80:80/udp"), "255.255.255.255 is a broadcast address"),
        (("publish", "SERVER", "-p", "10.77.0.255:80:80/udp"), "10.77.0.255 is a broadcast address"),
        (("publish", "SERVER", "-p", "10.77.0.255:80-90:80-90"), "10.77.0.255 is a broadcast address"),
        (("publish", "SERVER", "-p", "[0.0.0.0]:80:80"), "write 0.0.0.0 without brackets"),
        (("publish", "SERVER", "-p", "[::ffff:0.0.0.0]:80:80"), "in IPv6 notation: write 0.0.0.0"),
        (("publish", "SERVER", "-p", f"{'9' * 5000}:80"), "is not a port"),
        (("attach", f"pid:{'9' * 5000}", "--network", "web"), "is not a process id|at most"),
        (("attach", "a b", "--network", "web"), "invalid container 'a b'.*no spaces"),
        (("network", "create", "n" * 129, "--subnet", "172.40.0.0/24"), "at most 128"),
        (("unpublish", "SERVER", "-p", "9-8:9-8"), "reversed"),
        (("attach", "pid:none", "--network", "web"), "'none' is not a process id"),
        (("attach", "FREE", "--network", "web", "--ip", "nowhere"), "'nowhere' is not an IP address"),
        (("explain", "somewhere"), "invalid address 'somewhere': write HOST-IP:PORT"),
        (("explain", "127.0.0.1:80-90"), "invalid port '80-90': ask for one"),
    ],
    ids=lambda value: "-".join(value[:2] + value[-1:]) if isinstance(value, tuple) else "",
)
def test_an_invalid_request_is_refused(street: Quiet, words: tuple[str, ...], message: str) -> None:
    assert re.search(message, _refused(street, words, INVALID))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*_BAD, "--subnet", "172.30.0.0/25"), "172.30.0.0/25 overlaps 172.30.0.0/24 of network web"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--subnet", "fd30::/48"), "fd30::/48 overlaps fd30::/64 of network web"),
        ((*_BAD, "--subnet", "10.77.0.0/16"), "10.77.0.0/16 overlaps 10.77.0.0/24.*eth0"),
        (("network", "create", "web", "--subnet", "172.40.0.0/24"), "network web exists already"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--bridge", "gw-web"), "gw-web belongs to network web already"),
        ((*_BAD, "--subnet", "172.40.0.0/24", "--bridge", "eth0"), "interface eth0 exists already.*--bridge"),
        (("network", "rm", "web"), "has containers.*detach"),
        (("network", "rm", "none"), "no network named 'none'; networks: old, other, web"),
        (("network", "inspect", "none"), "no network named 'none'"),
        (("attach", "FREE", "--network", "none"), "no network named 'none'"),
        (("attach", "no-such-name", "--network", "web"), "no network namespace /run/netns/no-such-name"),
        (("attach", "pid:4194305", "--network", "web"), "no network namespace /proc/4194305"),
        (("attach", "SERVER", "--network", "web"), "attached to network web already.*detach"),
        (("attach", "SERVER"), "attached to network web already.*name another network"),
        (("detach", "SERVER", "--network", "other"), "not attached to network other; it is on web"),
        (("attach", "SERVER-PATH", "--network", "other"), "attached already"),
        (("attach", "HOST", "--network", "web"), "host's own"),
        (("attach", "FREE", "--network", "web", "--ip", "172.30.0.2"), "address 172.30.0.2 is in use"),
        (("attach", "FREE", "--network", "web", "--ip", "172.30.0.1"), "address 172.30.0.1 is in use"),
        (("detach", "FREE"), "no container named '.*free' is attached"),
        (("publish", "FREE", "-p", "80"), "no container named '.*free' is attached; attached: .*srv"),
        (("publish", "FAR", "-p", "8080:80"), "8080/tcp is already published for container .*srv"),
        (("publish", "FAR", "-p", "8079-8082:80-83"), "808[01]/tcp is already published for container .*srv"),
        (("publish", "SERVER", "-p", "8090:80", "-p", "8091:80", "-p", "8080:80/udp"), "8080/udp is already published"),
        (("publish", "SERVER", "-p", "8090:80", "-p", "8090:81"), "8090/tcp is already published"),
        (("publish", "SERVER", "-p", "192.0.2.1:80:80"), "192.0.2.1 is not an address of this host"),
        (("unpublish", "SERVER", "-p", "9999:80"), "no mapping -p 9999:80.*gangway ls"),
        (("unpublish", "FREE"), "no container named '.*free' is attached"),
        (("ls", "FREE"), "no container named '.*free' is attached"),
        (("explain", f"{HOST4}:9999"), "nothing is published.*gangway ls"),
    ],
    ids=lambda value: "-".join(value[:2] + value[-1:]) if isinstance(value, tuple) else "",
)
def test_a_conflicting_request_is_refused(street: Quiet, words: tuple[str, ...], message: str) -> None:
    assert re.search(message, _refused(street, words, FAILED))


@pytest.mark.parametrize(
    "port", ["7000:80", "0.0.0.0:7000:80", f"{HOST4}:7000:80", "6998-7001:80-83", "7001:80/udp", "[::]:7001:80/udp"]
)
def test_a_port_in_use_is_refused_with_the_programs_name_and_pid(street: Quiet, port: str) -> None:
    line = _refused(street, ("publish", "SERVER", "-p", "8090:80", "-p", port), FAILED)
    with open("/proc/self/comm") as comm:
        name = comm.read().strip()
    assert re.search(
        rf"port \S+:700[01]/\S+ is in use: choose another port, or stop {re.escape(name)} \(pid \d+\)", line
    )
    with open("/proc/self/stat") as stat:
        assert f"(pid {stat.read().split()[0]})" in line


def test_a_deleted_namespace_is_refused(street: Quiet) -> None:
    with Namespace("brief") as brief:
        name = brief.name
    line = _refused(street, ("attach", name, "--network", "web"), FAILED)
    assert name in line


def test_a_choice_of_ports_that_are_all_in_use_is_refused(street: Quiet) -> None:
    line = _refused(street, ("publish", "SERVER", "-p", f"{HOST4}:8080-8081:80"), FAILED)
    assert re.search("none of the host ports 8080-8081 is free", line)


@pytest.mark.parametrize(
    "words",
    [
        ("publish", "SERVER"),
        ("network", "create"),
        ("explain", "1.1.1.1:1", "--from", "moon"),
        ("frob",),
        ("run", "--nmae", "x", "--", "true"),
        ("run", "--nmae=x", "true"),
        ("run", "--name", "", "--", "true"),
        ("network", "create", "", "--subnet", "172.40.0.0/24"),
        ("network", "rm", ""),
        ("ls", ""),
        ("ls", "--socket", ""),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_hint_at_help(street: Quiet, words: tuple[str, ...]) -> None:
    assert "--help" in _refused(street, words, INVALID)
