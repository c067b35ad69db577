"""Limits of the kernel that are nearly reached: `doctor` has the numbers and names the setting; the relay goes on."""

import re
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import echo_server
from lab.gangwayd import Gangway
from lab.netns import Namespace
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel

_LOW = 20  # the limit of tracked connections and of epoll watches, as the daemon sees it
_PORTS = 60
_OPEN_FILES = 500
_RESET = struct.pack("ii", 1, 0)
_SEEN = ("net/netfilter/nf_conntrack_max", "fs/epoll/max_user_watches")


@pytest.fixture(scope="module")
def relay_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits") / "relay.log"


@pytest.fixture(scope="module")
def gangway(relay_log: Path) -> Iterator[Gangway]:
    """A daemon that sees low limits, which only the machine itself may set."""
    low, config = relay_log.with_name("low"), relay_log.with_name("gangway.toml")
    low.write_text(f"{_LOW}\n")
    config.write_text(f'log = "{relay_log}"\n')
    binds = " && ".join(f"mount --bind {low} /proc/sys/{name}" for name in _SEEN)
    with Namespace("host") as host:
        within: tuple[str, ...] = (
            "unshare",
            "--mount",
            "--propagation",
            "slave",
            "sh",
            "-ec",
            f'{binds}; exec "$0" "$@"',
        )
        within += "prlimit", f"--nofile={_OPEN_FILES}"
        with Gangway(host, "--config", str(config), within=within) as made:
            made("network", "create", "web", "--subnet", "172.30.0.0/24")
            host.ip("addr", "add", "fd77::1/64", "dev", "lo", "nodad")
            yield made


@pytest.fixture(scope="module")
def box(gangway: Gangway) -> Iterator[Namespace]:
    with Namespace("box") as made:
        gangway("attach", made.name, "--network", "web", "--ip", "172.30.0.2")
        echo_server.serve(made.popen, 80)
        gangway("publish", made.name, "-p", "8080:80", "-p", "[fd77::1]:8081:81")
        yield made


def limit(gangway: Gangway, what: str) -> tuple[bool, str]:
    """Return what `doctor` says of a limit: whether it is far away, and the note."""
    (found,) = (one for one in gangway.json("doctor") if one["check"] == f"limit: {what}")
    return found["holds"], found["note"]


def accepted(server: socket.socket, earlier: int) -> socket.socket:
    """Return the connection after as many earlier ones, which have ended."""
    for _ in range(earlier):
        server.accept()[0].close()
    return server.accept()[0]


def test_tracked_connections(gangway: Gangway, box: Namespace) -> None:
    with gangway.host.entered(), ExitStack() as stack:
        for _ in range(_LOW):
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)).sendto(b"x", ("172.30.0.2", 9))
    holds, note = limit(gangway, "tracked connections")
    assert not holds
    assert re.fullmatch(
        rf"\d+ of {_LOW} in use: packets of new connections are dropped: raise net.netfilter.nf_conntrack_max .*", note
    )


def test_descriptors_and_watches(gangway: Gangway, box: Namespace) -> None:
    (relay,) = gangway.relays()
    count = len(list(Path(f"/proc/{relay}/fd").iterdir()))
    expected = f"{count} of {_OPEN_FILES} in use; set by the limit of open files (LimitNOFILE= "
    holds, note = limit(gangway, "file descriptors of the relay")
    assert holds
    assert note.startswith(expected)
    holds, note = limit(gangway, "file descriptors of the daemon")
    assert holds
    assert f" of {_OPEN_FILES} in use" in note
    watches = sum(one.read_text().count("\ntfd:") for one in Path(f"/proc/{relay}/fdinfo").iterdir())
    assert limit(gangway, "epoll watches of the relay")[1].startswith(f"{watches} of {_LOW} in use")


def test_local_ports_run_out(gangway: Gangway, box: Namespace, relay_log: Path) -> None:
    """A client by relay is refused while all ports are used for its container's port, and is served afterwards."""
    assert limit(gangway, "local TCP ports")[0]
    with box.entered():
        server = socket.create_server(("172.30.0.2", 81), backlog=2 * _PORTS)
    gangway.host.sysctl("net.ipv4.ip_local_port_range", f"40000 {39999 + _PORTS}")
    with server, gangway.host.entered():
        with ExitStack() as stack:
            for _ in range(_PORTS):
                client = stack.enter_context(socket.create_connection(("172.30.0.2", 81), 5))
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)  # leaves no port in TIME_WAIT
            holds, note = limit(gangway, "local TCP ports")
            assert not holds
            assert note.startswith(f"{_PORTS} of {_PORTS} in use: connections by relay and redirect to 172.30.0.2:81 ")
            assert "raise net.ipv4.ip_local_port_range (sysctl)" in note
            for _ in range(2):
                with pytest.raises(ConnectionResetError), socket.create_connection(("fd77::1", 8081), 5) as client:
                    client.recv(1)
            line = "cannot connect to tcp 172.30.0.2:81: no local port is free: widen net.ipv4.ip_local_port_range"
            wait_until(lambda: line in relay_log.read_text(), "a line in the log")
        with socket.create_connection(("fd77::1", 8081), 5) as client:
            client.sendall(b"later")
            with accepted(server, _PORTS) as served:
                assert served.recv(5) == b"later"
