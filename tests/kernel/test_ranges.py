"""Ranges of ports, by one socket for all of them and by a socket for each port."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.kernel.crossings import arrives, listening
from tests.kernel.host_ports import KINDS, PROTOCOLS, WITHOUT_STEERING, bound, is_refused, is_steered, relayed
from tests.kernel.street import HOST4, HOST6, Street


@pytest.fixture(scope="module", params=["steered", pytest.param("sockets", marks=pytest.mark.any_kernel)])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    with Street(within=WITHOUT_STEERING if request.param == "sockets" else ()) as made:
        yield made


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("ports", ["1-3", "65533-65535", "7000-7000", "1", "65535"])
def test_the_first_and_the_last_port_can_be_published(street: Street, protocol: str, ports: str) -> None:
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


@pytest.mark.any_kernel
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_range_may_overlap_on_another_address_and_not_on_the_same(street: Street, protocol: str) -> None:
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
def test_a_part_of_a_range_cannot_be_unpublished(street: Street, protocol: str) -> None:
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
def test_a_range_of_other_container_ports_is_shifted_on_every_road(street: Street, protocol: str) -> None:
    with (
        listening(street.server, protocol, [8000, 8004]) as at,
        street.published(street.server, f"9000-9004:8000-8004/{protocol}"),
    ):
        for port, inner in ((9000, 8000), (9004, 8004)):
            assert relayed(street, protocol, port, at[inner])
            assert arrives(street.host, protocol, "127.0.0.1", port, at[inner])
            assert arrives(street.neighbour, protocol, HOST4, port, at[inner])


def test_an_unpublished_range_is_free_and_its_connections_have_ended(street: Street) -> None:
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
def test_ports_published_at_one_address_cannot_be_bound_there(street: Street, protocol: str) -> None:
    with street.published(street.server, f"127.0.0.2:9000-9004:9000-9004/{protocol}"):
        in_use = {
            address: is_refused(street.host, protocol, address, 9001)
            for address in ("127.0.0.2", "0.0.0.0", "::", "127.0.0.1", HOST4, "::1")
        }
        assert in_use == {
            "127.0.0.2": True,
            "0.0.0.0": True,
            "::": True,
            "127.0.0.1": False,
            HOST4: False,
            "::1": False,
        }
        assert not is_refused(street.host, protocol, "::", 9001, v6only=True)


@pytest.mark.any_kernel
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::"])
def test_a_range_with_a_port_in_use_is_refused_with_port_program_and_pid(
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


def test_connected_sockets_of_other_programs_do_not_prevent_a_range(street: Street) -> None:
    """Only a socket that waits for any client keeps others from using its port."""
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
