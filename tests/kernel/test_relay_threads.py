"""The relay's threads: they share connections, end them together, and have no privileges."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from lab.waiting import wait_until
from tests.kernel.ground import (
    Port,
    Ports,
    Site,
    crowd_in,
    echo,
    exactly,
    few_descriptors,
    serve_one_by_one,
    site_and_ports,
    stop_ends_all,
)
from tests.kernel.published import processes

pytestmark = pytest.mark.any_kernel

_THREADS = 3
_CONNECTIONS = 24


class Thread(NamedTuple):
    """A thread of the relay: its status, and how long it has used a core, in ticks."""

    status: dict[str, str]
    ticks: int


def _threads(pid: int) -> dict[str, Thread]:
    """Return the relay's threads that carry byte streams, by name."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        after_name = (task / "stat").read_text().rpartition(") ")[2].split()
        if status["Name"].startswith("relay-"):
            found[status["Name"]] = Thread(status, int(after_name[11]) + int(after_name[12]))
    return found


def _send_back(served: socket.socket) -> None:
    with served, suppress(OSError):
        while data := served.recv(1 << 16):
            served.sendall(data)


@contextmanager
def _busy(port: Port) -> Iterator[list[socket.socket]]:
    """Connections of a port whose container sends back all that it receives."""
    clients, threads = [], []
    for _ in range(_CONNECTIONS):
        client, served = port.pair()
        clients.append(client)
        threads.append(threading.Thread(target=_send_back, args=(served,)))
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        for client in clients:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def _exchange(clients: list[socket.socket]) -> None:
    """Send a few bytes or many on each connection, and receive all of them back, in order."""
    sizes = random.Random(len(clients)).choices([1, 100, 5_000, 40_000], [60, 30, 8, 2], k=len(clients))
    sent = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    for client, data in zip(clients, sent, strict=True):
        client.sendall(data)
    for client, data in zip(clients, sent, strict=True):
        assert exactly(client, len(data)) == data


@pytest.fixture(scope="module")
def threaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Ports]]:
    with site_and_ports(tmp_path_factory.mktemp("threads"), workers=_THREADS) as made:
        yield made


def test_connections_are_shared_without_loss_of_data(threaded: tuple[Site, Ports]) -> None:
    site, ports = threaded
    with _busy(ports.tcp()) as clients:
        before = _threads(site.relay())
        assert len(before) == _THREADS

        def all_worked() -> bool:
            _exchange(clients)
            now = _threads(site.relay())
            return all(now[name].ticks > thread.ticks for name, thread in before.items())

        wait_until(all_worked, "all threads to have used a core", 20)
        for client in clients:
            client.shutdown(socket.SHUT_WR)
            assert exactly(client, 1) == b""
    assert list(processes(site.host)) == [site.daemon(), site.relay()]


def test_unpublish_ends_connections_of_all_threads_at_once(threaded: tuple[Site, Ports]) -> None:
    site, ports = threaded
    with _busy(ports.tcp()) as clients:
        port = ports.tcp()
        pairs = [port.pair() for _ in range(12)]
        for pair in pairs:
            echo(*pair)
        stop_ends_all(port, pairs)
        with site.host.entered(), closing(socket.create_server((port.address, port.number))):
            pass
        _exchange(clients)


def test_threads_have_no_privileges(threaded: tuple[Site, Ports]) -> None:
    site, ports = threaded
    echo(*ports.tcp().pair())
    for thread in _threads(site.relay()).values():
        status = {name: value.strip() for name, value in thread.status.items()}
        assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
        assert status["Groups"] == ""
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"


def test_without_descriptors_clients_of_all_threads_wait(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, few_descriptors(128), workers=_THREADS) as (site, ports):
        port = ports.tcp()
        relay = site.relay()
        serve_one_by_one(port, crowd_in(port, 80))
        assert site.relay() == relay
        echo(*port.pair())
