"""The relay's processes: when workers are started, which flows they get, their descriptors and privileges."""

import os
import random
import selectors
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self

import pytest

from lab.waiting import wait_until
from tests.kernel.ground import (
    PATIENCE_S,
    SLOW_MACHINE,
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
from tests.kernel.published import children, descriptors, processes, status_of

pytestmark = pytest.mark.any_kernel

_CONNECTIONS = 20
_RETIREMENT_S = 200.0 if SLOW_MACHINE else 20.0
_LISTENS_INET = "0A"  # include/net/tcp_states.h
_LISTENS_UNIX = "00010000"  # __SO_ACCEPTCON


class Echo:
    """Connections of a port whose container sends back all that it receives."""

    def __init__(self, port: Port, count: int = _CONNECTIONS) -> None:
        self.port = port
        self.clients: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._stop, stopped = socket.socketpair()
        self._selector.register(port.keep(stopped), selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve)
        self._random = random.Random(count)
        for _ in range(count):
            client, served = port.pair()
            self.clients.append(client)
            self._selector.register(served, selectors.EVENT_READ, served)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                self._send_back(key.data)

    def _send_back(self, served: socket.socket) -> None:
        with suppress(ConnectionResetError, BrokenPipeError):
            if data := served.recv(1 << 16):
                return served.sendall(data)
        self._selector.unregister(served)
        served.close()

    def exchange(self) -> None:
        """Send a few bytes or many on each connection, and receive all of them back, in order."""
        sizes = self._random.choices([1, 100, 5_000, 40_000], [60, 30, 8, 2], k=len(self.clients))
        sent = [self._random.randbytes(size) for size in sizes]
        for client, data in zip(self.clients, sent, strict=True):
            client.sendall(data)
        for client, data in zip(self.clients, sent, strict=True):
            assert exactly(client, len(data)) == data

    def until_there_are_workers(self, count: int) -> list[int]:
        """Make traffic until there are `count` workers, and some more after that; return their pids."""
        site = self.port.site

        def busy() -> list[int]:
            self.exchange()
            workers = site.workers()
            return workers if len(workers) == count else []

        with _preferred(site.relay()), _bulk(self.port):
            workers = wait_until(busy, f"{count} workers", 4 * PATIENCE_S)
            for _ in range(20):
                self.exchange()
        for _ in range(50):
            self.exchange()
        return workers


@contextmanager
def _preferred(relay: int) -> Iterator[None]:
    """Prefer the relay, and then this process, to others, which may keep the machine busy.

    With autogroups (sched(7)) the kernel compares nice values within a session only, and the relay has its own.
    """
    os.setpriority(os.PRIO_PROCESS, relay, -15)
    for pid in (relay, os.getpid()):
        _prefer_session(pid, -10)
    try:
        yield
    finally:
        for pid in (relay, os.getpid()):
            _prefer_session(pid, 0)


def _prefer_session(pid: int, nice: int) -> None:
    """Set the nice value of a process's session, if it has one: a session older than autogroups has none (EINVAL)."""
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


@contextmanager
def _bulk(port: Port) -> Iterator[None]:
    """A saturated connection, which keeps the relay busier than its sender and receiver."""
    with Ports(port.site) as ports:
        client, served = ports.tcp().pair()
        threads = [
            threading.Thread(target=_flood, args=(client,)),
            threading.Thread(target=_receive_all, args=(served,)),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def _flood(sock: socket.socket) -> None:
    block = bytes(1 << 16)
    with suppress(OSError):
        while True:
            sock.sendall(block)


def _receive_all(sock: socket.socket) -> None:
    into = bytearray(1 << 16)
    with suppress(OSError):
        while sock.recv_into(into):
            pass


def _sockets(pid: int) -> list[str]:
    return [name for name in descriptors(pid) if name.startswith("socket:")]


def _has_one_socket(pid: int) -> bool:
    return len(_sockets(pid)) == 1


@contextmanager
def _crowd(folder: Path, workers: int) -> Iterator[tuple[Site, Ports, Echo, list[int]]]:
    """A site with busy connections and this many processes, the relay included."""
    with site_and_ports(folder, workers=workers) as (site, ports), Echo(ports.tcp()) as busy:
        yield site, ports, busy, busy.until_there_are_workers(workers - 1)


def test_idle_relay_has_no_workers(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, workers=4) as (site, ports):
        some = [ports.tcp() for _ in range(5)] + [ports.tcp("::", "::1")]
        for port in some:
            echo(*port.pair())
        assert list(processes(site.host)) == [site.daemon(), site.relay()]


def test_relay_with_one_worker_starts_no_others(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, workers=1) as (site, ports), Echo(ports.tcp()) as busy:
        for _ in range(50 if SLOW_MACHINE else 1000):
            busy.exchange()
        assert site.workers() == []


def test_workers_share_the_load_without_loss_of_data(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=3) as (site, _, busy, workers):
        for pid in (site.relay(), *workers):
            assert len(_sockets(pid)) >= 8, "each has a part of the connections"
        for client in busy.clients:
            client.shutdown(socket.SHUT_WR)
            assert exactly(client, 1) == b""
        assert site.workers() == workers
        assert len(site.log_lines("started 2 worker process(es)")) == 1


def test_new_connections_are_distributed(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=2) as (site, ports, _, workers):
        port = ports.tcp()
        before = Counter({pid: len(_sockets(pid)) for pid in (site.relay(), *workers)})
        pairs = [port.pair() for _ in range(12)]
        for pair in pairs:
            echo(*pair)
        after = Counter({pid: len(_sockets(pid)) for pid in (site.relay(), *workers)})
        assert min((after - before)[pid] for pid in after) >= 6, "each gets some of the 24 sockets"


def test_half_closed_connections_survive_the_start_of_workers(tmp_path: Path) -> None:
    with site_and_ports(tmp_path, workers=2) as (_, ports):
        port = ports.tcp()
        client, served = port.pair()
        client.shutdown(socket.SHUT_WR)
        assert served.recv(1) == b""
        with Echo(ports.tcp()) as busy:
            busy.until_there_are_workers(1)
            served.sendall(b"still here")
            served.close()
            assert exactly(client, 100) == b"still here"


def test_unpublish_ends_connections_of_workers_at_once(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=2) as (site, ports, busy, _):
        port = ports.tcp()
        pairs = [port.pair() for _ in range(12)]
        for pair in pairs:
            echo(*pair)
        stop_ends_all(port, pairs)
        with site.host.entered(), closing(socket.create_server((port.address, port.number))):
            pass
        busy.exchange()


def test_killed_worker_ends_only_its_own_connections(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=3) as (site, ports, busy, (victim, survivor)):
        relay = site.relay()
        os.kill(victim, signal.SIGKILL)
        ended = wait_until(lambda: _ended(busy.clients), "the end of its connections", PATIENCE_S)
        wait_until(lambda: site.log_lines("ended unexpectedly"), "a line in the log", PATIENCE_S)
        busy.clients = [client for client in busy.clients if client not in ended]
        assert len(busy.clients) >= _CONNECTIONS // 3
        busy.exchange()
        port = ports.tcp()
        for _ in range(10):
            echo(*port.pair())
        assert site.relay() == relay
        assert survivor in site.workers()
        wait_until(lambda: victim not in site.workers(), "the relay to collect the dead worker", PATIENCE_S)


def _ended(clients: list[socket.socket]) -> list[socket.socket]:
    """Return the connections that have ended or were reset."""
    ended = []
    for client in clients:
        client.setblocking(False)
        with suppress(BlockingIOError):
            with suppress(ConnectionResetError):
                assert client.recv(1, socket.MSG_PEEK) == b""
            ended.append(client)
        client.settimeout(PATIENCE_S)
    return ended


def test_without_descriptors_in_all_processes_clients_wait(tmp_path: Path) -> None:
    limit = few_descriptors(64)
    with site_and_ports(tmp_path, limit, workers=2) as (site, ports), Echo(ports.tcp()) as busy:
        workers = busy.until_there_are_workers(1)
        relay = site.relay()
        port = ports.tcp()
        serve_one_by_one(port, crowd_in(port, 80))
        assert (site.relay(), site.workers()) == (relay, workers)
        busy.exchange()
        echo(*port.pair())


def test_workers_end_with_the_relay(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=3) as (site, _, busy, workers):
        old = site.relay()
        os.kill(old, signal.SIGKILL)
        ended = {old, *workers}
        wait_until(lambda: not ended & set(processes(site.host)), "the end of the workers", PATIENCE_S)
        wait_until(lambda: len(_ended(busy.clients)) == _CONNECTIONS, "the end of all connections", PATIENCE_S)
        served = busy.port.connect(), busy.port.accept()
        echo(*served)


@pytest.mark.slow
def test_workers_have_only_their_own_sockets_and_end_when_idle(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=3) as (site, ports, busy, workers):
        listening = _listening(site.relay())
        assert len(listening) == 2, "the launchers' socket, and the port"
        for worker in workers:
            assert not listening & set(_sockets(worker))
        for client in busy.clients:
            client.close()
        for worker in workers:
            wait_until(partial(_has_one_socket, worker), "a worker with its channel only", PATIENCE_S)
            assert descriptors(worker).count("anon_inode:[eventpoll]") == 1
        alone = [site.daemon(), site.relay()]
        wait_until(lambda: list(processes(site.host)) == alone, "the end of the workers", _RETIREMENT_S)
        wait_until(lambda: not children(site.relay()), "the relay to collect the dead workers", PATIENCE_S)
        echo(*ports.tcp().pair())


def _listening(pid: int) -> set[str]:
    """Return the listening sockets of a process, as /proc/PID/fd names them."""
    inodes = []
    for name, state_column, inode_column, listens in (
        ("tcp", 3, 9, _LISTENS_INET),
        ("tcp6", 3, 9, _LISTENS_INET),
        ("unix", 3, 6, _LISTENS_UNIX),
    ):
        rows = [line.split() for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
        inodes += [row[inode_column] for row in rows if row[state_column] == listens]
    return {f"socket:[{inode}]" for inode in inodes} & set(_sockets(pid))


def test_relay_and_workers_have_no_privileges(tmp_path: Path) -> None:
    with _crowd(tmp_path, workers=2) as (site, _, _, workers):
        for pid in (site.relay(), *workers):
            status = status_of(pid)
            assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
            assert status["Groups"] == ""
            assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert status["NoNewPrivs"] == "1"
