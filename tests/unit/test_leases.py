"""Leases: what a launcher's socket says, what a lease publishes, and what is left when something fails."""

import os
import socket
import subprocess
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest

from gangway.ebpf.keys import PortBlock, Target
from gangway.errors import Conflict, HostRefused, InvalidRequest
from gangway.host import sockets, sysctl
from gangway.plan import MappingPlan, Origin, Road
from gangway.reconcile.dataplane import TW_REUSE
from gangway.reconcile.diff import Redirects
from gangway.relay import protocol
from gangway.relay.protocol import Destination, HostPorts, Mode, Serve
from gangway.state.leases import Lease
from lab.netns import Namespace
from tests.unit.fake_daemon import Daemon, listening
from tests.unit.samples import lease as leased
from tests.unit.samples import mapping

BOX4, BOX6 = "172.17.0.2", "fd00::2"

pytestmark = pytest.mark.usefixtures("own_namespace")


def grant(daemon: Daemon, sock: socket.socket, box: str = BOX4, name: str = "tcp") -> Lease:
    """Take a lease for port 80 of a container; the socket is the lease's from now on."""
    return daemon.leases.grant(protocol.Lease(name, Destination(box, 80)), sock, os.getpid())


def redirect(address: str, port: int, box: str = BOX4, name: str = "tcp") -> dict[PortBlock, Target]:
    """Return the redirect's entry of a lease at an address."""
    return {PortBlock(name, address, port, port): Target(box, 80)}


def is_unused(daemon: Daemon) -> bool:
    """True if nothing is left of any lease."""
    left = daemon.relay.ports, daemon.redirect.targets, len(daemon.leases), daemon.leases.planned()
    return not any(left)


@pytest.mark.parametrize("name", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("address", "v6only", "box", "redirected"),
    [
        ("0.0.0.0", True, BOX4, ["0.0.0.0"]),
        ("127.0.0.5", True, BOX4, ["127.0.0.5"]),
        ("::", True, BOX4, ["::"]),
        ("::", False, BOX4, ["::", "0.0.0.0"]),
        ("::1", True, BOX6, ["::1"]),
        # IPv4 clients cannot be redirected to IPv6; the relay serves them.
        ("::", False, BOX6, ["::"]),
        ("0.0.0.0", True, BOX6, []),
    ],
)
def test_socket_decides_what_is_published(
    daemon: Daemon, address: str, v6only: bool, box: str, redirected: list[str], name: str
) -> None:
    sock = listening(address, 8000, v6only, name)
    lease = grant(daemon, sock, box, name)
    ports = HostPorts(name, address, 8000, 8000)
    assert daemon.relay.served() == [Serve(ports, Destination(box, 80), Mode.LEASED)]
    assert len(daemon.relay.descriptors[ports]) == 2  # the socket, and the launcher's pidfd
    entries = [redirect(one, 8000, box, name) for one in redirected]
    assert daemon.redirect.targets == {block: target for entry in entries for block, target in entry.items()}
    assert [one.mapping for one in daemon.leases.planned()] == list(lease.mappings)
    daemon.leases.end(lease)
    assert is_unused(daemon)
    assert 8000 not in sockets.bound_ports(name)


def test_dual_stack_socket_has_a_mapping_of_each_family(daemon: Daemon) -> None:
    lease = grant(daemon, listening("::", 8000, v6only=False))
    six, four = lease.mappings
    assert (str(six), str(four)) == ("[::]:8000:80/tcp", "0.0.0.0:8000:80/tcp")
    assert len(daemon.leases) == 2
    for mapping_of_lease in lease.mappings:
        planned = daemon.leases.find(mapping_of_lease)
        assert planned is not None
        roads = {route.origin: route.road for route in planned.routes}
        assert roads[Origin.LOOPBACK] is Road.REDIRECT
        assert roads[Origin.REMOTE] is Road.RELAY
    daemon.leases.end(lease)
    assert daemon.leases.find(six) is None


def test_without_the_redirect_everything_is_relayed(daemon: Daemon) -> None:
    daemon.redirect.unavailable = "this kernel has no cgroup v2"
    lease = grant(daemon, listening("0.0.0.0", 8000))
    assert daemon.relay.ports
    assert not daemon.redirect.targets
    daemon.leases.end(lease)
    assert is_unused(daemon)


def test_conflict_with_an_api_mapping(daemon: Daemon) -> None:
    published = mapping("0.0.0.0", "8000", container="box")
    daemon.registry.index.add(published)
    with pytest.raises(Conflict, match=r"^0\.0\.0\.0:8000/tcp is already published for container box: choose another"):
        grant(daemon, listening("127.0.0.1", 8000))
    with pytest.raises(Conflict):  # its mapping of IPv6 is free, that of IPv4 is not
        grant(daemon, listening("::", 8000, v6only=False))
    assert is_unused(daemon)
    assert daemon.registry.index.collision(leased("::", "8000")) is None
    assert not sockets.bound_ports("tcp")


def test_conflict_of_an_api_mapping_with_a_lease(daemon: Daemon) -> None:
    lease = grant(daemon, listening("0.0.0.0", 8000))
    wanted = mapping("127.0.0.1", "7999-8001")
    with pytest.raises(
        Conflict, match=r"^0\.0\.0\.0:8000/tcp is published by Docker for 172\.17\.0\.2: choose another"
    ):
        daemon.registry.index.require_free(wanted)
    daemon.leases.end(lease)
    daemon.registry.index.require_free(wanted)


def test_socket_of_another_namespace_is_refused(daemon: Daemon) -> None:
    with Namespace("other") as other:
        with other.entered():
            sock = listening("0.0.0.0", 8000)
        with pytest.raises(InvalidRequest, match="the socket is of another network namespace"):
            grant(daemon, sock)
    assert is_unused(daemon)
    assert sock.fileno() == -1


@pytest.mark.parametrize("is_bound", [True, False])
def test_socket_that_does_not_listen_is_refused(daemon: Daemon, is_bound: bool) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if is_bound:
        sock.bind(("0.0.0.0", 8000))
    with pytest.raises(InvalidRequest, match="not bound to a port, or does not listen"):
        grant(daemon, sock)
    assert is_unused(daemon)


def test_unbound_udp_socket_is_refused(daemon: Daemon) -> None:
    with pytest.raises(InvalidRequest, match="not bound to a port"):
        grant(daemon, socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP), name="udp")


def test_socket_of_another_protocol_is_refused(daemon: Daemon) -> None:
    with pytest.raises(InvalidRequest, match="the socket is not a udp socket"):
        grant(daemon, listening("0.0.0.0", 8000), name="udp")


@pytest.mark.parametrize("failing", ["relay.serve", "redirect.add"])
def test_lease_that_fails_leaves_nothing(daemon: Daemon, failing: str) -> None:
    daemon.calls.fail(failing)
    sock = listening("::", 8000, v6only=False)
    with pytest.raises(HostRefused, match=failing):
        grant(daemon, sock)
    assert is_unused(daemon)
    assert sock.fileno() == -1
    daemon.calls.fail()
    assert grant(daemon, listening("::", 8000, v6only=False)).mappings


@pytest.mark.parametrize("failing", ["redirect.remove", "relay.remove"])
def test_end_frees_what_it_can(daemon: Daemon, failing: str) -> None:
    lease = grant(daemon, listening("0.0.0.0", 8000))
    daemon.calls.fail(failing)
    with pytest.raises(HostRefused, match=failing):
        daemon.leases.end(lease)
    assert len(daemon.leases) == 0
    assert daemon.registry.index.collision(lease.mappings[0]) is None
    assert (not daemon.relay.ports, not daemon.redirect.targets) == (
        failing != "relay.remove",
        failing != "redirect.remove",
    )


def test_tcp_tw_reuse_is_restored_when_no_lease_is_left(daemon: Daemon) -> None:
    before = sysctl.read(TW_REUSE)
    first, second = grant(daemon, listening("0.0.0.0", 8000)), grant(daemon, listening("0.0.0.0", 8001))
    assert sysctl.read(TW_REUSE) == "1"
    daemon.leases.end(first)
    assert not daemon.dataplane.stop_if_unused()
    assert sysctl.read(TW_REUSE) == "1"
    daemon.leases.end(second)
    assert daemon.dataplane.stop_if_unused()
    assert sysctl.read(TW_REUSE) == before
    assert daemon.calls.count("relay.stop") == 1
    grant(daemon, listening("0.0.0.0", 8000))
    assert sysctl.read(TW_REUSE) == "1"


def test_new_relay_serves_every_lease(daemon: Daemon) -> None:
    """The redirects are not added again: that would reset their counters."""
    for address, v6only in (("::", False), ("127.0.0.1", True)):
        grant(daemon, listening(address, 8000 + v6only, v6only))
    served, redirected = dict(daemon.relay.ports), dict(daemon.redirect.targets)
    daemon.relay.kill()
    daemon.leases.restore()
    assert (daemon.relay.ports, daemon.redirect.targets) == (served, redirected)
    assert daemon.calls.count("redirect.add") == 2
    daemon.relay.kill()
    daemon.calls.fail("relay.serve")
    with pytest.raises(ExceptionGroup) as failed:
        daemon.leases.restore()
    assert len(failed.value.exceptions) == 1  # a relay that cannot be started is not tried again for each lease
    assert daemon.leases.is_incomplete
    daemon.calls.fail()
    daemon.leases.restore()
    assert daemon.relay.ports == served
    assert not daemon.leases.is_incomplete


def test_exited_launcher_gets_no_lease_and_no_port_of_a_new_relay(daemon: Daemon) -> None:
    """The relay could not notice its end, should the daemon end before."""
    launcher = subprocess.Popen(["sleep", "60"])
    wanted = protocol.Lease("tcp", Destination(BOX4, 80))
    daemon.leases.grant(wanted, listening("127.0.0.1", 8000), launcher.pid)
    launcher.kill()
    launcher.wait()
    with pytest.raises(ProcessLookupError):
        daemon.leases.grant(wanted, listening("127.0.0.1", 8001), launcher.pid)
    assert len(daemon.relay.ports) == len(daemon.redirect.targets) == 1
    daemon.relay.kill()
    daemon.leases.restore()
    assert daemon.relay.ports == {}


# A comparison in another thread


def test_comparison_does_not_find_leases(daemon: Daemon) -> None:
    stray = redirect("127.0.0.1", 9000)
    daemon.redirect.targets |= stray
    grant(daemon, listening("::", 8000, v6only=False))
    for _ in range(2):
        found = daemon.dataplane.found()
        assert (found.ports, found.redirects) == ({}, stray)
        daemon.relay.kill()  # and before a new relay serves it, the lease's redirect stays


def test_comparison_does_not_find_an_earlier_daemons_leases(daemon: Daemon, tmp_path: Path) -> None:
    grant(daemon, listening("::", 8000, v6only=False))
    with ExitStack() as stack:
        later = Daemon(tmp_path, daemon)
        stack.callback(later.close)
        assert len(later.redirect.targets) == 2
        found = later.dataplane.found()
        assert (found.ports, found.redirects) == ({}, {})
        lease = grant(later, daemon.leases._leases[leased("::", "8000", "80")].sock.dup())
        later.leases.end(lease)
        assert is_unused(later)


def test_step_from_before_a_lease_does_not_remove_its_redirect(daemon: Daemon) -> None:
    entries = redirect("0.0.0.0", 8000)
    stale = Redirects((*entries.items(), *redirect("127.0.0.1", 9000).items()), ())
    daemon.redirect.targets |= redirect("0.0.0.0", 8000, "172.17.0.9") | redirect("127.0.0.1", 9000)
    lease = grant(daemon, listening("0.0.0.0", 8000))
    daemon.executor.do(stale)
    assert daemon.redirect.targets == entries
    daemon.leases.end(lease)
    assert not daemon.redirect.targets


def test_former_flows_of_new_udp_leases_are_deleted_once(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[tuple[str, str]] = []

    def delete(found: Iterable[MappingPlan]) -> bool:
        deleted.extend((str(one.mapping.host_address), str(one.container_address)) for one in found)
        return False

    monkeypatch.setattr(daemon.leases, "_delete_former_flows", delete)
    ended = grant(daemon, listening("127.0.0.3", protocol="udp"), name="udp")
    grant(daemon, listening("127.0.0.4", protocol="udp"), name="udp")
    grant(daemon, listening("127.0.0.5"))
    daemon.leases.end(ended)
    assert daemon.leases.is_settling
    daemon.leases.settle()
    assert not daemon.leases.is_settling
    assert deleted == [("127.0.0.4", BOX4)]


def test_former_flows_that_late_answers_bring_back_are_deleted(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [True, False, False, True]  # an answer by the relay arrives before the fourth look
    looks: list[bool] = []

    def delete(_planned: object) -> bool:
        looks.append(len(looks) < len(there) and there[len(looks)])
        return looks[-1]

    monkeypatch.setattr(daemon.leases, "_delete_former_flows", delete)
    grant(daemon, listening("127.0.0.3", protocol="udp"), name="udp")
    while daemon.leases.is_settling:
        daemon.leases.settle()
        assert len(looks) < 100
    assert looks[:4] == there
    assert not any(looks[4:])
