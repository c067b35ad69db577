"""Ranges of ports that one socket serves: what other sockets of the host do meanwhile, and which ports are reserved."""

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gangway.host.reserved_ports import RESERVED
from lab.waiting import wait_until
from tests.kernel.crossings import arrives, listening
from tests.kernel.host_ports import EVERY, PROTOCOLS, WITHOUT_STEERING, bound, is_refused, relayed
from tests.kernel.snapshot import snapshot, wait_until_restored
from tests.kernel.street import HOST4, HOST6, Street


@pytest.fixture(scope="module")
def steered() -> Iterator[Street]:
    with Street() as made:
        yield made


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_port_can_be_published_at_once(steered: Street, protocol: str) -> None:
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


@pytest.mark.any_kernel
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ipv6_clients_of_an_ipv4_only_range_are_relayed(steered: Street, protocol: str) -> None:
    wanted = f"20000-39999:30000-49999/{protocol}"
    with listening(steered.four, protocol, [30000, 49999]) as at, steered.published(steered.four, wanted):
        for port, sock in ((20000, at[30000]), (39999, at[49999])):
            assert arrives(steered.neighbour, protocol, HOST6, port, sock)
            assert arrives(steered.far.space, protocol, "fd31::1", port, sock)


def test_datagrams_of_one_socket_to_two_ports_of_a_range_are_two_flows(steered: Street) -> None:
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
            answer, peer = client.recvfrom(100)
            assert (answer, peer[:2]) == (b"to %d" % port, (HOST6, port))


def test_a_published_port_that_the_kernel_chose_for_a_socket_is_its_own_until_it_is_closed(steered: Street) -> None:
    """A host with all its ports published can still query name servers, and have servers of its own."""
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


@pytest.mark.any_kernel
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.3", "::1", "::"])
def test_a_socket_with_the_same_port_at_another_address_receives_nothing(
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


@pytest.mark.any_kernel
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_relay_has_carried_is_shown(steered: Street, protocol: str) -> None:
    ports = f"127.0.0.2:9005-9006:9005-9006/{protocol}"
    with listening(steered.server, protocol, [9005]) as at, steered.published(steered.server, ports):
        for _ in range(3):
            assert relayed(steered, protocol, 9005, at[9005], "127.0.0.2")

        def counted() -> dict[str, int]:
            (found,) = steered.gangway.json("ls", steered.server.name)
            return dict(found["relayed"])

        wait_until(lambda: counted()["connections"] == 3 and counted()["up_bytes"], "the numbers")
        assert "3 (" in steered.gangway("ls", steered.server.name, "--wide")
        kind = "clients" if protocol == "udp" else "connections"
        assert f"relayed so far: {kind} 3 (" in steered.gangway("explain", f"127.0.0.2:9005/{protocol}")


def test_new_clients_of_both_families_at_once_are_answered(steered: Street) -> None:
    """Each port gets a socket to answer from; to bind them, the relay's threads share one variable."""
    ports = range(9100, 9140)
    published = steered.published(steered.server, "9100-9139:9100-9139/udp")
    with listening(steered.server, "udp", ports) as at, published, ExitStack() as stack:
        clients = [
            (port, stack.enter_context(bound(steered.host, "udp", address, 0)), address)
            for port in ports
            for address in ("127.0.0.1", "::1")
        ]
        for port, client, address in clients:
            client.settimeout(5)
            client.sendto(b"question", (address, port))
        for sock in at.values():
            for _ in range(2):
                sock.sendto(b"answer", sock.recvfrom(100)[1])
        assert [client.recvfrom(100)[1][:2] for _, client, _ in clients] == [(at_, port) for port, _, at_ in clients]


@pytest.mark.any_kernel
def test_publishing_a_port_at_another_address_does_not_disturb_the_first(steered: Street) -> None:
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


def test_an_auto_bound_port_is_reclaimed_though_the_sockets_end_was_not_reported(steered: Street) -> None:
    """The TCP socket beneath an MPTCP listener is closed without a call of our program."""
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


def test_many_single_ports_are_all_reserved(steered: Street) -> None:
    ports = list(range(33000, 34000, 2))
    steered.publish(steered.server, *(f"127.0.0.1:{port}:80" for port in ports))
    try:
        assert steered.host.sysctl(RESERVED).split(",") == list(map(str, ports))
    finally:
        steered.gangway("unpublish", steered.server.name)
    assert steered.host.sysctl(RESERVED) == ""


def test_a_list_that_another_program_overwrites_is_completed(steered: Street) -> None:
    with steered.published(steered.server, "40000-40010:40000-40010"):
        steered.host.sysctl(RESERVED, "50000")
        wait_until(lambda: steered.host.sysctl(RESERVED) == "40000-40010,50000", "the published ports", 25)
    assert steered.host.sysctl(RESERVED) == "50000"
    steered.host.sysctl(RESERVED, "")


def test_published_ports_are_excluded_from_automatic_selection_unless_too_few_are_left(steered: Street) -> None:
    before = snapshot(steered.host)
    steered.host.sysctl(RESERVED, "40007")
    with steered.published(steered.server, "0.0.0.0:40000-59000:40000-59000", "0.0.0.0:34000:80"):
        assert steered.host.sysctl(RESERVED) == "34000,40000-59000", steered.gangway.log.read_text()
        steered.gangway("unpublish", steered.server.name, "-p", "0.0.0.0:34000:80")
        assert steered.host.sysctl(RESERVED) == "40000-59000"
    assert steered.host.sysctl(RESERVED) == "40007"
    steered.host.sysctl(RESERVED, "")
    with steered.published(steered.server, *EVERY):
        assert steered.host.sysctl(RESERVED) == "", "nothing would be left"
    wait_until_restored(steered.host, before)


@pytest.mark.any_kernel
def test_a_range_that_needs_more_descriptors_than_allowed_is_refused(tmp_path: Path) -> None:
    within = (*WITHOUT_STEERING[:-1], f"ulimit -n 500; {WITHOUT_STEERING[-1]}")
    with Street(within=within) as street:
        before = snapshot(street.host)
        done = street.gangway.run("publish", street.server.name, "-p", "10000-11000:10000-11000")
        assert done.returncode == 1
        assert "no file descriptor is left" in done.stderr
        note = {one["check"]: one["note"] for one in street.gangway.json("doctor")}["steering: attached"]
        assert re.search(r"cannot read .*steering\.bpf\.o", note)
        assert street.gangway.json("ls") == []
        assert not is_refused(street.host, "tcp", "0.0.0.0", 10000)
        wait_until_restored(street.host, before)
        wait_until(lambda: street.publish(street.server, "10000-10100:10000-10100") == [10000, 10000], "a smaller one")


@pytest.mark.any_kernel
def test_a_port_that_cannot_be_answered_from_is_logged(tmp_path: Path) -> None:
    log, config = tmp_path / "log", tmp_path / "config.toml"
    config.write_text(f"log = '{log}'\n")
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
