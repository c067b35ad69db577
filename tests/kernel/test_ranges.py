"""Ranges of ports: served by one shared socket and, where steering is unavailable, by a socket for each port."""

import errno
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gangway.host.reserved_ports import RESERVED
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.crossings import arrives, listening
from tests.kernel.snapshot import is_as, snapshot
from tests.kernel.street import HOST4, HOST6, Street

PROTOCOLS = ("tcp", "udp")
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_PROGRAMS = Path(__file__).parents[2] / "src/gangway/ebpf/steering.bpf.o"
WITHOUT = (
    "unshare",
    "--mount",
    "--propagation",
    "slave",
    "sh",
    "-c",
    f'mount --bind /dev/null {_PROGRAMS} && exec "$0" "$@"',
)
EVERY = ("1024-65000:1024-65000/tcp", "1024-65000:1024-65000/udp")


@pytest.fixture(scope="module", params=["steered", pytest.param("sockets", marks=pytest.mark.any_kernel)])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street(within=WITHOUT if request.param == "sockets" else ()) as made:
        yield made


@pytest.fixture(scope="module")
def steered() -> Iterator[Street]:
    with Street() as made:
        yield made


def is_steered(street: Street) -> bool:
    (found,) = (one["holds"] for one in street.gangway.json("doctor") if one["check"] == "steering: attached")
    return bool(found)


def relayed(street: Street, protocol: str, port: int, at: socket.socket, address: str = "127.0.0.1") -> bool:
    """True if the relay serves a client that is bound to an address, and so is not redirected."""
    with street.host.entered():
        client = socket.socket(FAMILIES[6 if ":" in address else 4], KINDS[protocol])
    with client:
        client.settimeout(3)
        client.bind((address, 0))
        client.connect((address, port))
        client.sendall(b"question")
        if protocol == "udp":
            _, peer = at.recvfrom(100)
            at.sendto(b"answer", peer)
        else:
            served, _ = at.accept()
            with served:
                served.sendall(b"answer")
        return client.recv(100) == b"answer"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("ports", ["1-3", "65533-65535", "7000-7000", "1", "65535"])
def test_first_and_last_ports_are_published(street: Street, protocol: str, ports: str) -> None:
    first, _, last = ports.partition("-")
    ends = {int(first), int(last or first)}
    with listening(street.server, protocol, ends) as at, street.published(street.server, f"{ports}:{ports}/{protocol}"):
        for port in ends:
            for address in ("127.0.0.1", "::1"):
                assert relayed(street, protocol, port, at[port], address)
                assert arrives(street.host, protocol, address, port, at[port])
            for address in (HOST4, HOST6):
                assert arrives(street.neighbour, protocol, address, port, at[port])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_adjacent_ranges_lead_to_their_own_containers(street: Street, protocol: str) -> None:
    with ExitStack() as stack:
        lower = stack.enter_context(listening(street.server, protocol, [9000, 9004]))
        upper = stack.enter_context(listening(street.far, protocol, [9005, 9009]))
        stack.enter_context(street.published(street.server, f"9000-9004:9000-9004/{protocol}"))
        stack.enter_context(street.published(street.far, f"9005-9009:9005-9009/{protocol}"))
        for port, at in (*lower.items(), *upper.items()):
            assert relayed(street, protocol, port, at)
            assert arrives(street.neighbour, protocol, HOST4, port, at)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ranges_may_overlap_on_different_addresses_only(street: Street, protocol: str) -> None:
    one, other = f"127.0.0.2:9000-9010:9000-9010/{protocol}", f"127.0.0.3:9005-9015:9005-9015/{protocol}"
    with ExitStack() as stack:
        here = stack.enter_context(listening(street.server, protocol, [9000, 9007]))
        there = stack.enter_context(listening(street.far, protocol, [9007, 9015]))
        stack.enter_context(street.published(street.server, one))
        stack.enter_context(street.published(street.far, other))
        for address, at in (("127.0.0.2", here), ("127.0.0.3", there)):
            for port, sock in at.items():
                assert relayed(street, protocol, port, sock, address)
        for wanted in ("127.0.0.2:9010-9011:9010-9011", "0.0.0.0:8000-9000:8000-9000", "9007:80"):
            done = street.gangway.run("publish", street.near.name, "-p", f"{wanted}/{protocol}")
            assert done.returncode == 1
            assert (
                f"127.0.0.2:9000-9010/{protocol} is already published for container {street.server.name}" in done.stderr
            )
        assert street.gangway.json("ls", street.near.name) == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_part_of_a_range_cannot_be_unpublished(street: Street, protocol: str) -> None:
    wanted = f"9000-9004:9000-9004/{protocol}"
    with listening(street.server, protocol, [9000, 9002]) as at, street.published(street.server, wanted):
        for part in ("9002:9002", "9000-9002:9000-9002", "9001-9010:9001-9010"):
            done = street.gangway.run("unpublish", street.server.name, "-p", f"{part}/{protocol}")
            assert done.returncode == 1
            assert f"has no mapping -p {part}/{protocol}" in done.stderr
        assert [one["host_ports"] for one in street.gangway.json("ls")] == ["9000-9004"] * 2
        for port, sock in at.items():
            assert relayed(street, protocol, port, sock)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_range_with_other_container_ports_works_on_every_road(street: Street, protocol: str) -> None:
    with (
        listening(street.server, protocol, [8000, 8004]) as at,
        street.published(street.server, f"9000-9004:8000-8004/{protocol}"),
    ):
        for port, inner in ((9000, 8000), (9004, 8004)):
            assert relayed(street, protocol, port, at[inner])
            assert arrives(street.host, protocol, "127.0.0.1", port, at[inner])
            assert arrives(street.neighbour, protocol, HOST4, port, at[inner])


def test_unpublish_frees_the_range_and_resets_its_connections(street: Street) -> None:
    with listening(street.server, "tcp", [9003]) as at:
        with street.published(street.server, "9000-9004:9000-9004"), street.host.entered():
            client = socket.socket()
            client.bind(("127.0.0.1", 0))
            client.settimeout(5)
            client.connect(("127.0.0.1", 9003))
            served, _ = at[9003].accept()
        with client, served, pytest.raises(ConnectionResetError):
            client.recv(1)
    with street.host.entered(), socket.create_server(("0.0.0.0", 9003)), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 9002))


@contextmanager
def bound(space: Namespace, protocol: str, address: str, port: int, v6only: bool = False) -> Iterator[socket.socket]:
    with space.entered():
        sock = socket.socket(FAMILIES[6 if ":" in address else 4], KINDS[protocol])
    with sock:
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        sock.bind((address, port))
        yield sock


def is_refused(space: Namespace, protocol: str, address: str, port: int, v6only: bool = False) -> bool:
    """True if a bind() there fails because the port is in use."""
    try:
        with bound(space, protocol, address, port, v6only):
            return False
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return True


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_published_ports_cannot_be_bound(street: Street, protocol: str) -> None:
    with street.published(street.server, f"9000-9004:9000-9004/{protocol}"):
        for address in ("0.0.0.0", "127.0.0.1", "127.0.0.7", HOST4, "::", "::1", HOST6, f"::ffff:{HOST4}"):
            for port, is_in_use in ((8999, False), (9000, True), (9002, True), (9004, True), (9005, False)):
                assert is_refused(street.host, protocol, address, port) is is_in_use, (address, port)
        assert is_refused(street.host, protocol, "::", 9000, v6only=True)
        other = {"tcp": "udp", "udp": "tcp"}[protocol]
        assert not is_refused(street.host, other, "0.0.0.0", 9000)
        for space in (street.neighbour, street.near.space):
            assert not is_refused(space, protocol, "0.0.0.0", 9000)
    assert not is_refused(street.host, protocol, "0.0.0.0", 9000)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ports_of_one_address_cannot_be_bound_there(street: Street, protocol: str) -> None:
    with street.published(street.server, f"127.0.0.2:9000-9004:9000-9004/{protocol}"):
        refused = {
            address: is_refused(street.host, protocol, address, 9001)
            for address in ("127.0.0.2", "0.0.0.0", "::", "127.0.0.1", HOST4, "::1")
        }
        assert refused == {
            "127.0.0.2": True,
            "0.0.0.0": True,
            "::": True,
            "127.0.0.1": False,
            HOST4: False,
            "::1": False,
        }
        assert not is_refused(street.host, protocol, "::", 9001, v6only=True)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::"])
def test_range_with_a_port_in_use_is_refused_with_port_program_and_pid(
    street: Street, protocol: str, address: str
) -> None:
    command = (
        f"import socket, sys; s = socket.socket(socket.AF_INET{6 if ':' in address else ''}, {KINDS[protocol]:d})\n"
    )
    command += f"s.bind(({address!r}, 9003))\n" + ("s.listen()\n" if protocol == "tcp" else "")
    command += "print('ready', flush=True); sys.stdin.read()"
    with street.host.popen("python3", "-c", command, stdin=-1, stdout=-1, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            done = street.gangway.run("publish", street.server.name, "-p", f"9000-9004:9000-9004/{protocol}")
            assert done.returncode == 1
            assert f"0.0.0.0:9003/{protocol} is in use: choose another port, or stop python3 (pid" in done.stderr
            assert street.gangway.json("ls") == []
            assert not is_refused(street.host, protocol, "0.0.0.0", 9002)
            assert is_refused(street.host, protocol, address, 9003)
        finally:
            holder.communicate()
    with street.published(street.server, f"9000-9004:9000-9004/{protocol}"):
        assert is_refused(street.host, protocol, address, 9003)


def test_connected_sockets_do_not_conflict(street: Street) -> None:
    """Only listeners and unconnected UDP sockets conflict with a published port."""
    with bound(street.neighbour, "tcp", "0.0.0.0", 7777) as server, bound(street.host, "udp", HOST4, 9001) as datagrams:
        server.listen()
        datagrams.connect(("10.77.0.2", 7777))
        with bound(street.host, "tcp", HOST4, 9002) as client:
            client.connect(("10.77.0.2", 7777))
            if is_steered(street):
                with street.published(street.server, "9000-9004:9000-9004", "9000-9004:9000-9004/udp"):
                    client.sendall(b"still there")
                    with server.accept()[0] as served:
                        assert served.recv(100) == b"still there"
                        served.sendall(b"and back")
                        assert client.recv(100) == b"and back"


# With steering only


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_port_at_once(steered: Street, protocol: str) -> None:
    with listening(steered.server, protocol, [1024, 65000]) as at, steered.published(steered.server, *EVERY):
        assert len(steered.gangway.json("ls")) == 4
        for port, sock in at.items():
            for address in ("127.0.0.1", "::1"):
                assert relayed(steered, protocol, port, sock, address)
                assert arrives(steered.host, protocol, address, port, sock)
            for space in (steered.neighbour, steered.near.space, steered.far.space, steered.server.space):
                assert arrives(space, protocol, HOST4, port, sock)
                assert arrives(space, protocol, HOST6, port, sock)
        assert is_refused(steered.host, protocol, "0.0.0.0", 50000)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ipv6_clients_of_an_ipv4_only_range_are_relayed(steered: Street, protocol: str) -> None:
    wanted = f"20000-39999:30000-49999/{protocol}"
    with listening(steered.four, protocol, [30000, 49999]) as at, steered.published(steered.four, wanted):
        for port, sock in ((20000, at[30000]), (39999, at[49999])):
            assert arrives(steered.neighbour, protocol, HOST6, port, sock)
            assert arrives(steered.far.space, protocol, "fd31::1", port, sock)


def test_answers_come_from_the_port_that_the_client_sent_to(steered: Street) -> None:
    with (
        listening(steered.four, "udp", [9000, 9001]) as at,
        steered.published(steered.four, "9000-9004:9000-9004/udp"),
        bound(steered.neighbour, "udp", "::", 0) as client,
    ):
        client.settimeout(3)
        for port in (9000, 9001):
            client.sendto(b"to %d" % port, (HOST6, port))
        for port in (9001, 9000):
            data, peer = at[port].recvfrom(100)
            at[port].sendto(data, peer)
            answer, asked = client.recvfrom(100)
            assert (answer, asked[:2]) == (b"to %d" % port, (HOST6, port))


def test_auto_bound_port_is_its_sockets_until_that_closes(steered: Street) -> None:
    """With all ports published, the host can still query name servers, and serve its own clients."""
    with bound(steered.neighbour, "udp", "0.0.0.0", 53) as name_server, steered.published(steered.server, *EVERY):
        name_server.settimeout(3)
        with steered.host.entered():
            client, server = socket.socket(type=socket.SOCK_DGRAM), socket.create_server(("127.0.0.1", 0))
        with client, server:
            client.settimeout(3)
            client.sendto(b"question", ("10.77.0.2", 53))
            name_server.sendto(b"answer", name_server.recvfrom(100)[1])
            assert client.recv(100) == b"answer"
            own = server.getsockname()
            with steered.host.entered(), socket.create_connection(own, 3), server.accept()[0]:
                pass
        with listening(steered.server, "tcp", [own[1]]) as at:
            assert relayed(steered, "tcp", own[1], at[own[1]])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3", "::1", "::"])
def test_socket_at_another_address_does_not_affect_a_published_port(
    steered: Street, protocol: str, address: str
) -> None:
    with (
        listening(steered.server, protocol, [9003, 9004]) as at,
        steered.published(steered.server, f"127.0.0.2:9003-9004:9003-9004/{protocol}"),
        bound(steered.host, protocol, address, 9003, v6only=True) as neighbour,
    ):
        if protocol == "udp":
            neighbour.sendto(b"hello", ("::1" if ":" in address else "127.0.0.1", 1))
        for port, sock in at.items():
            assert relayed(steered, protocol, port, sock, "127.0.0.2")
            assert arrives(steered.host, protocol, "127.0.0.2", port, sock)


def test_publishing_at_another_address_fails_no_client(steered: Street) -> None:
    with steered.published(steered.server, "127.0.0.2:9000:80"):
        before = steered.gangway.relays()
        for _ in range(5):
            steered.publish(steered.far, "127.0.0.3:9000:80", "127.0.0.3:9000:80/udp")
            assert steered.reaches(steered.host, "tcp", "127.0.0.2", 9000)
            steered.gangway("unpublish", steered.far.name)
        assert steered.gangway.relays() == before


IPPROTO_MPTCP = 262


def _multipath() -> socket.socket | None:
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError:
        return None


def test_auto_bound_port_of_a_socket_whose_end_is_not_reported_is_reclaimed(steered: Street) -> None:
    """An MPTCP listener has a TCP socket below it, whose end no eBPF program is called for."""
    with steered.published(steered.server, *EVERY):
        with steered.host.entered():
            multipath = _multipath()
        if multipath is None:
            pytest.skip("this kernel has no MPTCP")
        with multipath:
            multipath.bind(("127.0.0.1", 0))
            multipath.listen()
            address, port = multipath.getsockname()
            with steered.host.entered(), socket.create_connection((address, port), 3), multipath.accept()[0]:
                pass
        with listening(steered.server, "tcp", [port]) as at:
            wait_until(lambda: _arrives(steered, port, at[port]), "the port", 45)


def _arrives(street: Street, port: int, at: socket.socket) -> bool:
    try:
        return arrives(street.host, "tcp", "127.0.0.1", port, at)
    except ConnectionRefusedError:
        return False


def test_every_port_of_a_long_list_is_reserved(steered: Street) -> None:
    ports = list(range(33000, 34000, 2))
    steered.publish(steered.server, *(f"127.0.0.1:{port}:80" for port in ports))
    try:
        assert steered.host.sysctl(RESERVED).split(",") == list(map(str, ports))
    finally:
        steered.gangway("unpublish", steered.server.name)
    assert steered.host.sysctl(RESERVED) == ""


def test_list_that_another_program_rewrites_is_completed(steered: Street) -> None:
    with steered.published(steered.server, "40000-40010:40000-40010"):
        steered.host.sysctl(RESERVED, "50000")
        wait_until(lambda: steered.host.sysctl(RESERVED) == "40000-40010,50000", "the published ports in the list", 25)
    assert steered.host.sysctl(RESERVED) == "50000"
    steered.host.sysctl(RESERVED, "")


def test_published_ports_are_excluded_from_automatic_port_selection(steered: Street) -> None:
    before = snapshot(steered.host)
    steered.host.sysctl(RESERVED, "40007")
    mine = snapshot(steered.host)
    with steered.published(steered.server, "0.0.0.0:40000-59000:40000-59000", "0.0.0.0:34000:80"):
        assert steered.host.sysctl(RESERVED) == "34000,40000-59000", steered.gangway.log.read_text()
        steered.gangway("unpublish", steered.server.name, "-p", "0.0.0.0:34000:80")
        assert steered.host.sysctl(RESERVED) == "40000-59000"
    assert compare_settings(mine, steered)
    steered.host.sysctl(RESERVED, "")
    with steered.published(steered.server, *EVERY):
        assert steered.host.sysctl(RESERVED) == "", "too few ports would be left"
    is_as(steered.host, before)


def compare_settings(before: dict[str, list[str]], street: Street) -> bool:
    return [line for line in before["settings"] if RESERVED in line] == [f"{RESERVED} = {street.host.sysctl(RESERVED)}"]


@pytest.mark.any_kernel
def test_range_that_needs_too_many_descriptors_is_refused(tmp_path: Path) -> None:
    within = (*WITHOUT[:-1], f"ulimit -n 500; {WITHOUT[-1]}")
    with Street(within=within) as street:
        before = snapshot(street.host)
        done = street.gangway.run("publish", street.server.name, "-p", "10000-11000:10000-11000")
        assert done.returncode == 1
        assert "no file descriptor is left" in done.stderr
        note = {one["check"]: one["note"] for one in street.gangway.json("doctor")}["steering: attached"]
        assert re.search(r"cannot read .*steering\.bpf\.o", note)
        assert street.gangway.json("ls") == []
        assert not is_refused(street.host, "tcp", "0.0.0.0", 10000)
        is_as(street.host, before)
        wait_until(lambda: street.publish(street.server, "10000-10100:10000-10100") == [10000, 10000], "a smaller one")


def test_port_of_a_connected_socket_cannot_answer_and_is_logged(tmp_path: Path) -> None:
    log, config = tmp_path / "log", tmp_path / "config.toml"
    config.write_text(f"[relay]\nlog = '{log}'\n")
    with (
        Street("--config", str(config)) as street,
        listening(street.server, "udp", [9001]) as at,
        bound(street.host, "udp", HOST4, 9001) as theirs,
        bound(street.host, "udp", "127.0.0.1", 0) as client,
    ):
        theirs.connect(("10.77.0.2", 7777))
        with street.published(street.server, "9000-9004:9000-9004/udp"):
            client.sendto(b"question", ("127.0.0.1", 9001))
            wait_until(
                lambda: "cannot answer from port 9001: another program uses it" in log.read_text(), "the warning"
            )
            theirs.close()
            assert relayed(street, "udp", 9001, at[9001])
