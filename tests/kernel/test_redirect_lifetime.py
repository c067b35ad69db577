"""The redirect while daemons and relays end and start; where it is unavailable; and what it leaves behind."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gangway.ebpf import redirect, steering
from lab.netns import Namespace
from lab.redirect import actual_peer, cgroup_links_of, detach_link, link_exists
from lab.waiting import wait_until
from tests.kernel.load import Client, under_load
from tests.kernel.street import Street

pytestmark = pytest.mark.any_kernel

LINKS = len(redirect.OBJECT.cgroup_programs) + len(steering.OBJECT.cgroup_programs)

_LIBRARY = next((path for path in Path("/usr/lib").glob("*/libbpf.so.1")), Path("/nonexistent"))


@pytest.fixture(scope="module")
def street() -> Iterator[Street]:
    with Street() as made:
        yield made


def links(street: Street) -> set[int]:
    """Return the IDs of the links that the daemon and its relay hold, as far as they run."""
    daemon = street.gangway.daemon
    there = [daemon.pid] if daemon is not None and daemon.poll() is None else []
    return cgroup_links_of([*there, *street.gangway.relays()])


def road(street: Street, port: int, protocol: str = "tcp") -> str:
    return street.road(street.host, protocol, "127.0.0.1", port)[0]


def connected(space: Namespace, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    with space.entered():
        made = socket.socket(socket.AF_INET, kind)
    made.settimeout(10)
    made.connect(("127.0.0.1", port))
    return made


def clients(street: Street, port: int) -> list[Client]:
    return [Client(street.host, protocol, "127.0.0.1", port) for protocol in ("tcp", "udp")]


def test_killing_the_daemon_under_load_fails_no_client(street: Street) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(street.published(street.server, "8080:80/tcp", "8080:80/udp"))
        before = stack.enter_context(connected(street.host, port))
        datagrams = stack.enter_context(socket_of(street.host))
        with under_load(clients(street, port)) as load:
            for _ in range(3):
                street.gangway.kill()
                load.wait_for_answers()
                assert road(street, port) == "redirect"
                _check_unconnected(datagrams, port)
                street.gangway.start()
                load.wait_for_answers()
                assert len(links(street)) == LINKS
                _check_unconnected(datagrams, port)
        assert before.getpeername() == ("127.0.0.1", port)
        before.sendall(b"hello\n")
        assert b"hello" in before.recv(100)


def socket_of(space: Namespace) -> socket.socket:
    with space.entered():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.settimeout(10)
    return made


def _check_unconnected(sock: socket.socket, port: int) -> None:
    sock.sendto(b"hello\n", ("127.0.0.1", port))
    assert sock.recvfrom(100)[1] == ("127.0.0.1", port)


def test_an_answer_after_a_restart_comes_from_the_requested_address(street: Street) -> None:
    with street.server.space.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.settimeout(10)
        server.bind((street.server.address4, 8100))
        with street.published(street.server, "8100:8100/udp"), socket_of(street.host) as client:
            client.sendto(b"question", ("127.0.0.1", 8100))
            _, peer = server.recvfrom(100)
            street.gangway.kill()
            street.gangway.start()
            server.sendto(b"answer", peer)
            assert client.recvfrom(100) == (b"answer", ("127.0.0.1", 8100))


def test_publishing_other_ports_fails_no_client(street: Street) -> None:
    with (
        street.published(street.server, "8080:80/tcp", "8080:80/udp") as port,
        under_load(clients(street, port)) as load,
    ):
        for _ in range(5):
            with street.published(street.near, "7900-8000:7900-8000/tcp", "8079:80/udp", "127.0.0.2:8081:80"):
                load.wait_for_answers()


def test_use_counts_survive_the_daemon(street: Street) -> None:
    with street.published(street.server, "8080:80") as port:
        for _ in range(4):
            connected(street.host, port).close()
        street.gangway.kill()
        connected(street.host, port).close()
        street.gangway.start()
        assert [one["redirected"] for one in street.gangway.json("ls")] == [5, 0]


def test_no_link_is_left_when_the_daemon_stops() -> None:
    with Street() as street:
        with street.published(street.server, "8080:80") as port:
            assert road(street, port) == "redirect"
            ours = links(street)
            assert len(ours) == LINKS
        street.leave()
        street.gangway.stop()
        wait_until(lambda: not any(map(link_exists, ours)), "the end of its links")


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("first", ["daemon", "relay"])
def test_no_link_is_left_when_daemon_and_relay_are_killed(street: Street, first: str) -> None:
    with street.published(street.server, "8080:80"):
        ours, relays = links(street), street.gangway.relays()
        if first == "daemon":
            street.gangway.kill()
            assert all(map(link_exists, ours))  # the relay holds them
        _kill(relays)
        street.gangway.kill()
        _kill(street.gangway.relays())  # a daemon that survived its relay has started another
        wait_until(lambda: not any(map(link_exists, ours)), "the end of its links")
        street.gangway.start()


def test_detached_links_are_attached_again(street: Street) -> None:
    with street.published(street.server, "8080:80") as port:
        for _ in range(2):
            with connected(street.host, port) as before:
                for link in links(street):
                    detach_link(link)
                assert road(street, port) == "relay"
                wait_until(lambda: road(street, port) == "redirect", "the redirect", 25)
                assert before.getpeername() == ("127.0.0.1", port)
        assert len(links(street)) == LINKS


def test_two_daemons_on_one_machine_do_not_interfere(street: Street) -> None:
    with Street() as other:
        other.publish(other.server, "8080:80")
        with street.published(street.server, "8080:80"):
            pass
        assert road(other, 8080) == "redirect"
        assert not street.reaches(street.host, "tcp", "127.0.0.1", 8080)
        with connected(other.host, 8080) as client, other.host.entered():
            assert actual_peer(client) == ("172.30.0.2", 80)


_MOUNTS = ("unshare", "--mount", "--propagation", "slave", "sh", "-c")


@pytest.mark.parametrize(
    ("within", "check", "message"),
    [
        pytest.param(
            (*_MOUNTS, f'mount --bind /dev/null {_LIBRARY} && exec "$0" "$@"'),
            "libbpf",
            "libbpf.so.1 is not installed",
            marks=pytest.mark.skipif(not _LIBRARY.exists(), reason="libbpf is not where Debian has it"),
        ),
        (("unshare", "--cgroup"), "cgroup v2", "cgroup namespace of its own"),
        ((*_MOUNTS, 'mount -t tmpfs none /sys/kernel/btf && exec "$0" "$@"'), "kernel types", "has no BTF"),
    ],
    ids=["libbpf", "cgroups", "types"],
)
def test_without_a_requirement_the_relay_serves_and_doctor_names_it(
    within: tuple[str, ...], check: str, message: str
) -> None:
    with Street(within=within) as street, street.published(street.server, "8080:80", "8080:80/udp") as port:
        for protocol in ("tcp", "udp"):
            assert road(street, port, protocol) == "relay"
        (answer,) = street.gangway.json("explain", f"127.0.0.1:{port}", "--from", "loopback")
        (route,) = answer["mapping"]["routes"]
        assert (route["road"], route["code"]) == ("relay", "no_redirect")
        assert message in route["fact"]
        failing = {one["check"]: one["note"] for one in street.gangway.json("doctor") if not one["holds"]}
        assert message in failing[f"eBPF: {check}"]
        assert message in failing["redirect: attached"]
        assert message in failing["steering: attached"]


def test_unmounted_cgroups_are_mounted_for_the_daemon_alone() -> None:
    hide = 'grep " - cgroup2 " /proc/self/mountinfo | cut -d" " -f5 | xargs -r umount && exec "$0" "$@"'
    with Street(within=(*_MOUNTS, hide)) as street, street.published(street.server, "8080:80") as port:
        daemon = street.gangway.daemon
        assert daemon is not None
        assert " - cgroup2 " not in Path(f"/proc/{daemon.pid}/mountinfo").read_text()
        assert road(street, port) == "redirect"


def _listener(space: Namespace, port: int) -> socket.socket | None:
    with space.entered(), suppress(OSError):
        return socket.create_server(("127.0.0.1", port))
    return None


def test_a_port_that_another_program_took_meanwhile_is_not_redirected(street: Street) -> None:
    with street.published(street.server, "8080:80") as port:
        street.gangway.kill()
        _kill(street.gangway.relays())
        theirs = wait_until(lambda: _listener(street.host, port), "the end of the relay's socket")
        assert theirs is not None
        with theirs:
            street.gangway.start()
            with connected(street.host, port) as client, street.host.entered():
                assert actual_peer(client) == ("127.0.0.1", port)
        wait_until(lambda: street.reaches(street.host, "tcp", "127.0.0.1", port), "the port", 25)
        assert road(street, port) == "redirect"
