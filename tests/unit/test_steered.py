"""The daemon's steering: ports that are taken and steered, the sockets that serve them, and who has those meanwhile."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from gangway.ebpf.daemon_steering import Steered
from gangway.ebpf.keys import keys
from gangway.ebpf.steering_entries import KINDS, SERVED, TAKEN
from gangway.errors import Conflict, HostRefused, PortInUse, Unsupported
from gangway.host import sockets as ports
from gangway.reconcile.diff import HostPorts, Target
from gangway.relay.client import Relay
from gangway.relay.settings import Settings
from tests.unit.descriptors import identity, socket_count
from tests.unit.pretend_relay import Process
from tests.unit.pretend_steering import Pretended

RANGE = HostPorts("tcp", "0.0.0.0", 8000, 8010)
SIX = HostPorts("udp", "::", 8000, 8010)
TARGET = Target("172.30.0.2", 80, True)
NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, 4: socket.AF_INET, 6: socket.AF_INET6}
WHY = "this kernel does not take the programs"


class Place:
    """A host, its daemons one after the other, and their relays."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._path = folder / "relay"
        self._stack = stack

    def daemon(self) -> "Daemon":
        """One more; it takes over from the one before, which is gone."""
        relay = Relay(self._path, Settings())
        relay.find()
        made = Daemon(relay)
        self._stack.callback(made.close)
        return made


class Daemon:
    """A daemon, as far as it has to do with steering."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.steered = Steered(relay)
        self._is_closed = False

    def keep(self, of: HostPorts) -> None:
        """As the hands do it; with the first port comes a relay."""
        self.steered.take(of)
        self.relay.keep(of, TARGET, None)

    def publish(self, of: HostPorts) -> None:
        self.keep(of)
        self.steered.steer(entries(of))

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.steered.close()
            self.relay.close()


@pytest.fixture(autouse=True)
def a_host_that_can(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where nobody has a port."""
    monkeypatch.setattr("gangway.ebpf.daemon_steering.Steering", Pretended)
    monkeypatch.setattr("gangway.relay.client.subprocess.Popen", Process)
    monkeypatch.setattr(ports, "first_port_in_use", lambda *_: None)
    monkeypatch.setattr(ports, "describe_holder", lambda _protocol, _address, port: f"port {port} is taken by somebody")
    monkeypatch.setattr(Pretended, "made", [], raising=False)
    monkeypatch.setattr(Process, "begun", [], raising=False)
    yield
    for process in Process.begun:
        process.end()


@pytest.fixture
def place(tmp_path: Path, a_host_that_can: None) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, stack)


@pytest.fixture
def daemon(place: Place) -> Daemon:
    return place.daemon()


@pytest.fixture
def steered(daemon: Daemon) -> Steered:
    return daemon.steered


def keys_of(of: HostPorts) -> list[bytes]:
    return list(keys(of.protocol, ip_address(of.address).packed, of.first, of.last))


def entries(of: HostPorts) -> list[tuple[bytes, bytes]]:
    return [(key, SERVED) for key in keys_of(of)]


def trie() -> dict[bytes, bytes]:
    return Pretended.made[-1].trie


def shared() -> dict[tuple[int, int], int]:
    """What the relay's sockets are."""
    return {kind: identity(sock.fileno()) for kind, sock in Process.begun[-1].pool.socks.items()}


def in_the_kernel() -> dict[tuple[int, int], int]:
    """What those are that the kernel steers to."""
    found = Pretended.made[-1].shared
    return {(NUMBERS[protocol], NUMBERS[family]): number for (protocol, family), number in found.items()}


@contextmanager
def held(relay: Relay, name: str) -> Iterator[list[int]]:
    """What things the relay holds."""
    fds = relay.held(name)
    try:
        yield [identity(fd) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


# The sockets


def test_each_protocol_and_family_has_a_socket_that_nobody_can_ask(steered: Steered) -> None:
    assert steered.lacking == ""
    assert set(Pretended.made[-1].shared) == set(KINDS)
    assert len(set(Pretended.made[-1].shared.values())) == 4
    addresses = [sock.getsockname()[0] for sock in steered._sockets]
    assert addresses == ["192.0.0.8", "192.0.0.8", "100::1", "100::1"]
    listens = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in steered._sockets]
    assert listens == [1, 0, 1, 0]


def test_a_relay_holds_what_keeps_it_going_from_its_beginning(daemon: Daemon) -> None:
    daemon.keep(RANGE)
    with held(daemon.relay, "steering") as links, held(daemon.relay, "sockets") as sockets:
        assert links == [identity(fd) for fd in Pretended.made[-1].links]
        assert sockets == [Pretended.made[-1].shared[kind] for kind in KINDS]


def test_a_relay_gets_the_sockets_after_the_ports(daemon: Daemon) -> None:
    """Clients may be waiting there, and would be turned away."""
    daemon.keep(RANGE)
    daemon.keep(SIX)
    assert shared() == {}
    daemon.steered.steer(entries(RANGE))
    assert shared() == in_the_kernel()
    assert len(shared()) == 4
    binding = identity(Pretended.made[-1].binding_fd)
    assert Process.begun[-1].pool.bindings == {socket.AF_INET: binding, socket.AF_INET6: binding}


def test_while_the_relay_has_no_sockets_ports_are_only_taken(daemon: Daemon) -> None:
    daemon.keep(RANGE)
    assert daemon.steered.found() == dict.fromkeys(keys_of(RANGE), TAKEN)
    daemon.steered.steer(entries(RANGE))
    assert daemon.steered.found() == dict(entries(RANGE))
    Process.begun[-1].end()
    assert daemon.steered.found() == dict.fromkeys(keys_of(RANGE), TAKEN)
    assert trie() == dict(entries(RANGE)), "and yet they are steered: clients wait"


def test_a_relay_that_comes_after_one_that_ended_gets_the_same_sockets(daemon: Daemon) -> None:
    daemon.publish(RANGE)
    before = shared()
    Process.begun[-1].end()
    daemon.publish(RANGE)
    assert len(Process.begun) == 2
    assert shared() == before == in_the_kernel()
    assert daemon.steered.found() == dict(entries(RANGE))
    with held(daemon.relay, "sockets") as sockets:
        assert len(sockets) == 4


def test_a_successor_takes_over_the_entries_and_the_sockets(place: Place, daemon: Daemon) -> None:
    daemon.publish(RANGE)
    before = shared()
    daemon.close()
    successor = place.daemon()
    assert len(Pretended.made) == 2
    assert (successor.steered.lacking, successor.steered.found()) == ("", dict(entries(RANGE)))
    assert shared() == before == in_the_kernel()
    with held(successor.relay, "steering") as links, held(successor.relay, "sockets") as sockets:
        assert links == [identity(fd) for fd in Pretended.made[-1].links]
        assert sockets == [Pretended.made[-1].shared[kind] for kind in KINDS]


def test_a_successor_closes_what_it_was_handed(place: Place, daemon: Daemon) -> None:
    daemon.publish(RANGE)
    daemon.close()
    counts = []
    for _ in range(3):
        successor = place.daemon()
        assert successor.relay.held("nothing") == [], "with this answer the one before is worked off"
        counts.append(socket_count())
        successor.close()
    assert len(set(counts)) == 1


def test_a_successor_without_a_relay_begins_anew(place: Place, daemon: Daemon) -> None:
    daemon.publish(RANGE)
    before = set(Pretended.made[-1].shared.values())
    daemon.close()
    Process.begun[-1].end()
    successor = place.daemon()
    assert successor.steered.found() == {}
    assert not before & set(Pretended.made[-1].shared.values())


def test_a_relay_that_has_sockets_of_nobody_gets_these(place: Place, daemon: Daemon) -> None:
    """Those before it were lost with a daemon that could not steer any more."""
    daemon.publish(RANGE)
    daemon.relay.hold("steering", ())
    daemon.relay.hold("sockets", ())
    before = shared()
    daemon.close()
    place.daemon()
    assert shared() == in_the_kernel()
    assert not set(before.values()) & set(shared().values())


def test_a_relay_that_could_not_take_all_sockets_gets_the_others_later(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.keep(RANGE)
    share = daemon.relay.share

    def refuse(protocol: str, family: int, fds: list[int]) -> None:
        if (protocol, family) == KINDS[1]:
            raise HostRefused("the relay has no file descriptor left")
        share(protocol, family, fds)

    with monkeypatch.context() as patch:
        patch.setattr(daemon.relay, "share", refuse)
        with pytest.raises(HostRefused, match="no file descriptor left"):
            daemon.steered.steer(entries(RANGE))
    trie()[keys_of(SIX)[0]] = SERVED
    assert set(daemon.steered.found().values()) == {TAKEN}, "as long as it has not all"
    daemon.steered.steer(entries(RANGE))
    assert shared() == in_the_kernel()
    assert set(daemon.steered.found().values()) == {SERVED}


# Where there is none


def test_where_there_can_be_none_it_says_why(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pretended, "able", False)
    lacking = place.daemon()
    steered = lacking.steered
    assert (steered.lacking, steered.lent_fd) == (WHY, None)
    for refused in (lambda: steered.take(RANGE), lambda: steered.steer(entries(RANGE))):
        with pytest.raises(Unsupported, match=f"one socket cannot serve many ports: {WHY}"):
            refused()
    steered.release(RANGE)
    steered.unsteer(entries(RANGE))
    steered.mend()
    assert (steered.found(), steered.is_intact()) == ({}, True)
    lacking.relay.keep(HostPorts("tcp", "127.0.0.1", 80, 80), TARGET, None)
    with held(lacking.relay, "steering") as links, held(lacking.relay, "sockets") as sockets:
        assert (links, sockets) == ([], [])


def test_a_successor_that_cannot_ends_what_there_was(
    place: Place, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.publish(RANGE)
    daemon.close()
    monkeypatch.setattr(Pretended, "able", False)
    successor = place.daemon()
    assert successor.steered.lacking == WHY
    with held(successor.relay, "steering") as links, held(successor.relay, "sockets") as sockets:
        assert (links, sockets) == ([], [])


@pytest.mark.parametrize("kind", KINDS)
def test_without_one_of_the_sockets_there_is_none(
    place: Place, kind: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = ports.bind_unreachable

    def refuse(protocol: str, family: int) -> socket.socket:
        if (protocol, family) == kind:
            raise HostRefused("no socket can be bound")
        return nowhere(protocol, family)

    monkeypatch.setattr(ports, "bind_unreachable", refuse)
    lacking = place.daemon().steered
    assert lacking.lacking == "no socket can be bound"
    assert Pretended.made[-1].closed, "nothing stays attached"
    assert lacking.lent_fd is None
    with pytest.raises(Unsupported, match="no socket can be bound"):
        lacking.take(RANGE)


def test_a_kernel_without_ipv6_steers_ipv4(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "has_family", lambda family: family == 4)
    four = place.daemon()
    assert four.steered.lacking == ""
    assert set(Pretended.made[-1].shared) == {("tcp", 4), ("udp", 4)}
    with pytest.raises(Unsupported, match="no sockets of IPv6"):
        four.steered.take(SIX)
    assert trie() == {}
    four.publish(RANGE)
    assert len(shared()) == 2
    four.close()
    assert place.daemon().steered.found() == dict(entries(RANGE))
    assert len(shared()) == 2


def test_ipv6_that_came_meanwhile_is_a_successors(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ports, "has_family", lambda family: family == 4)
        four = place.daemon()
        four.publish(RANGE)
        four.close()
    successor = place.daemon()
    assert (successor.steered.lacking, len(shared())) == ("", 4)
    successor.steered.take(SIX)


# The ports


@pytest.mark.parametrize("of", [RANGE, SIX, HostPorts("udp", "127.0.0.1", 1, 65535)])
def test_ports_that_are_taken_are_nobody_elses_until_they_are_let_go(steered: Steered, of: HostPorts) -> None:
    hold = steered.take(of)
    assert trie() == dict.fromkeys(keys_of(of), TAKEN)
    hold.close()
    assert trie() == {}


def test_ports_are_taken_before_anybody_is_asked_whether_they_are_free(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def look(*of: object) -> None:
        asked.append(of)
        assert trie() == dict.fromkeys(keys_of(RANGE), TAKEN)

    monkeypatch.setattr(ports, "first_port_in_use", look)
    steered.take(RANGE)
    assert asked == [tuple(RANGE)]


def test_of_a_range_that_somebody_has_a_port_of_nothing_is_taken(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "first_port_in_use", lambda *_: 8003)
    with pytest.raises(PortInUse, match="port 8003 is taken by somebody"):
        steered.take(RANGE)
    assert trie() == {}


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_one_port_that_somebody_has_bound_is_not_taken(steered: Steered, kind: int, address: str) -> None:
    """Though nobody listens there yet: it is tried."""
    protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as somebody:
        somebody.bind((address, 0))
        port = somebody.getsockname()[1]
        with pytest.raises(PortInUse, match=f"{port}/{protocol} is in use"):
            steered.take(HostPorts(protocol, address, port, port))
        assert trie() == {}
    steered.take(HostPorts(protocol, address, port, port))
    assert set(trie().values()) == {TAKEN}


def test_one_port_is_held_by_a_socket_while_it_is_being_taken(
    steered: Steered, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    looks: list[bool] = []

    def tried(key: bytes, value: bytes) -> None:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        looks.append(True)
        trie()[key] = value

    monkeypatch.setattr(Pretended.made[-1], "set", tried)
    steered.take(HostPorts("tcp", "127.0.0.1", port, port))
    assert looks == [True]
    with socket.create_server(("127.0.0.1", port)):
        assert set(trie().values()) == {TAKEN}


@pytest.mark.parametrize("last", [8000, 8010])
def test_ports_of_an_address_that_is_not_this_hosts_cannot_be_taken(steered: Steered, last: int) -> None:
    with pytest.raises(Conflict, match=r"192\.0\.2\.77 is not an address of this host"):
        steered.take(HostPorts("tcp", "192.0.2.77", 8000, last))
    assert trie() == {}


@pytest.mark.parametrize("refused", range(3))
def test_what_the_kernel_does_not_take_whole_is_not_taken(
    steered: Steered, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered.take(SIX)
    before = dict(trie())
    monkeypatch.setattr(Pretended, "refused", keys_of(RANGE)[refused])
    with pytest.raises(HostRefused, match="takes no more"):
        steered.take(RANGE)
    assert trie() == before


def test_what_is_published_is_found_taken_and_nobody_is_asked(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that came anew is to have it; a port that the relay cannot have is no reason to steer it no more."""
    daemon.publish(RANGE)
    monkeypatch.setattr(ports, "first_port_in_use", lambda *_: pytest.fail("asked"))
    hold = daemon.steered.take(RANGE)
    hold.close()
    assert trie() == dict(entries(RANGE))


def test_ports_that_are_let_go_are_those_that_were_taken_only(daemon: Daemon) -> None:
    daemon.publish(RANGE)
    daemon.steered.take(SIX)
    for of in (RANGE, SIX):
        daemon.steered.release(of)
    assert trie() == dict(entries(RANGE))
    daemon.steered.unsteer(entries(RANGE))
    daemon.steered.unsteer(entries(RANGE))
    assert trie() == {}


@pytest.mark.parametrize("refused", range(3))
def test_all_are_steered_or_none(daemon: Daemon, refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.publish(SIX)
    daemon.keep(RANGE)
    monkeypatch.setattr(Pretended, "refused", keys_of(RANGE)[refused])
    with pytest.raises(HostRefused, match="takes no more"):
        daemon.steered.steer(entries(RANGE))
    assert SERVED not in [trie().get(key) for key in keys_of(RANGE)]
    assert trie().items() >= dict(entries(SIX)).items()


def test_without_a_relay_nothing_is_steered(daemon: Daemon) -> None:
    daemon.steered.take(RANGE)
    with pytest.raises(HostRefused, match="the relay is gone"):
        daemon.steered.steer(entries(RANGE))
    assert trie() == dict.fromkeys(keys_of(RANGE), TAKEN)


# When somebody ends it


def test_one_that_somebody_ended_is_attached_anew(daemon: Daemon) -> None:
    daemon.publish(RANGE)
    before, sockets = Pretended.made[-1], shared()
    daemon.steered.mend()
    assert Pretended.made == [before], "nobody has"
    before.attached = False
    assert not daemon.steered.is_intact()
    daemon.steered.mend()
    after = Pretended.made[-1]
    assert (daemon.steered.is_intact(), before.closed, after.closed) == (True, True, False)
    assert daemon.steered.found() == dict(entries(RANGE))
    assert shared() == sockets == in_the_kernel()
    assert daemon.steered.lent_fd == after.lent_fd
    with held(daemon.relay, "steering") as links, held(daemon.relay, "sockets") as held_sockets:
        assert links == [identity(fd) for fd in after.links]
        assert held_sockets == [after.shared[kind] for kind in KINDS]


def test_one_that_cannot_be_attached_anew_is_none(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.publish(RANGE)
    Pretended.made[-1].attached = False
    monkeypatch.setattr(Pretended, "able", False)
    with pytest.raises(Unsupported, match=WHY):
        daemon.steered.mend()
    assert (daemon.steered.lacking, daemon.steered.is_intact()) == (WHY, True)
    assert (daemon.steered.found(), daemon.steered.lent_fd, Pretended.made[-1].closed) == ({}, None, True)
    with held(daemon.relay, "steering") as links, held(daemon.relay, "sockets") as sockets:
        assert (links, sockets) == ([], [])
    daemon.steered.mend()


def test_a_relay_that_comes_when_it_could_not_be_attached_anew_holds_nothing(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.publish(RANGE)
    Pretended.made[-1].attached = False
    monkeypatch.setattr(Pretended, "able", False)
    with pytest.raises(Unsupported, match=WHY):
        daemon.steered.mend()
    Process.begun[-1].end()
    with socket.create_server(("127.0.0.1", 0)) as own:
        port = own.getsockname()[1]
        daemon.relay.keep(HostPorts("tcp", "127.0.0.1", port, port), TARGET._replace(is_steered=False), own)
    assert (len(Process.begun), shared()) == (2, {})
    with held(daemon.relay, "steering") as links, held(daemon.relay, "sockets") as sockets:
        assert (links, sockets) == ([], [])


def test_a_daemon_that_comes_when_it_can_again_has_steering(
    place: Place, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.publish(RANGE)
    Pretended.made[-1].attached = False
    with monkeypatch.context() as patch:
        patch.setattr(Pretended, "able", False)
        with pytest.raises(Unsupported, match=WHY):
            daemon.steered.mend()
    daemon.close()
    successor = place.daemon()
    assert (successor.steered.lacking, successor.steered.found()) == ("", {})
    successor.publish(SIX)
    assert shared() == in_the_kernel()
