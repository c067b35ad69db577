"""Fixtures of the relay's tests: hosts whose relay has its own settings, published ports, and servers behind them."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from lab.netns import Container, Host
from lab.processes import pids_running
from lab.waiting import wait_until
from tests.kernel.published import end_processes, open_socket, processes, publish, start, status_of

SLOW_MACHINE = "GANGWAY_VM" in os.environ
PATIENCE_S = 50.0 if SLOW_MACHINE else 5.0
BRIEF_S = 3.0 if SLOW_MACHINE else 0.3
"""A test that nothing happens waits this long."""
RESET = b"\1\0\0\0\0\0\0\0"
"""struct linger: close at once, with a reset."""
_SETTINGS = 'mount -t overlay -o lowerdir="$0:/etc" overlay /etc && exec "$@"'


class Site:
    """A host with two containers, and settings for its relay: its launchers see another /etc.

    Sockets are not redirected, unless `redirect=True`: connections to 127.0.0.1 must come through the relay.
    """

    def __init__(self, folder: Path, before: tuple[str, ...] = (), **settings: object) -> None:
        self.log = folder / "log"
        (folder / "etc/gangway").mkdir(parents=True)
        settings = {"redirect": False, **settings}
        lines = [f'log = "{self.log}"', "[relay]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        (folder / "etc/gangway/gangway.toml").write_text("\n".join(lines))
        self.before = ("unshare", "--mount", "sh", "-c", _SETTINGS, str(folder / "etc"), *before)
        self.host = Host()

    def __enter__(self) -> Self:
        self.host.__enter__()
        self.box, self.other = self.host.container(), self.host.container()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end_daemon()
        finally:
            self.host.close()

    def daemon(self) -> int:
        """Return the pid of the daemon that the launchers have started."""
        return pids_running("gangway.daemon", self.host)[0]

    def relay(self) -> int:
        """Return the pid of the relay, which serves already."""
        return wait_until(self._relay, "the relay", PATIENCE_S)

    def _relay(self) -> int:
        pids = list(processes(self.host))[1:]
        return pids[0] if pids and status_of(pids[0])["Uid"].startswith("65534\t") else 0

    def log_lines(self, text: str) -> list[str]:
        """Return the lines of the log that contain `text`."""
        return [line for line in self.log.read_text().splitlines() if text in line]

    def end_daemon(self) -> None:
        """End the daemon and the relay, which would wait some seconds for a next port."""
        end_processes(self.host)


class Port:
    """A published port; `server` is a socket in the container, bound to the backend's address."""

    def __init__(self, site: Site, proto: str, address: str, server: socket.socket) -> None:
        self.site = site
        self.proto = proto
        self.address = address
        self.server = server
        self.scope = ExitStack()
        self.number = 0
        self.launcher: subprocess.Popen[Any]

    def keep(self, sock: socket.socket) -> socket.socket:
        """Set a timeout for `sock`, and close it together with the port."""
        sock.settimeout(PATIENCE_S)
        if sock.proto == socket.IPPROTO_TCP:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.scope.enter_context(sock)

    def connect(self, address: str = "", by: Host | Container | None = None) -> socket.socket:
        """Return a client of the port: a connected socket."""
        address = address or self.address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with (by or self.site.host).entered():
            client = self.keep(socket.socket(family, self.server.type, self.server.proto))
        client.connect((address, self.number))
        return client

    def accept(self) -> socket.socket:
        """Accept the next connection in the container."""
        return self.keep(self.server.accept()[0])

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Return a client and its connection in the container."""
        client = self.connect()
        return client, self.accept()

    def stop(self) -> int:
        """Unpublish the port as dockerd does; return the launcher's exit status."""
        self.launcher.send_signal(signal.SIGINT)
        return self.launcher.wait(PATIENCE_S)


class Ports:
    """The ports that one test publishes."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._scope = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._scope.close()

    def tcp(self, host_ip: str = "127.0.0.1", address: str = "", container: str = "", proto: str = "tcp") -> Port:
        """Publish a port with a listening server.

        `address` is the address that clients connect to, `container` the backend's address.
        """
        port = self._serve(proto, address or host_ip, container)
        port.server.listen(512)
        return self._publish(port, host_ip)

    def udp(self, host_ip: str = "127.0.0.1", address: str = "", container: str = "") -> Port:
        """Publish a UDP port; the arguments are those of `tcp`."""
        return self._publish(self._serve("udp", address or host_ip, container), host_ip)

    def passed(self, listener: socket.socket, address: str, container: str = "") -> Port:
        """Publish a socket that is already bound, and pass it to the relay."""
        proto = "udp" if listener.type == socket.SOCK_DGRAM else "tcp"
        port = self._serve(proto, address, container)
        if proto == "tcp":
            port.server.listen(512)
        port.number = listener.getsockname()[1]
        to, number = port.server.getsockname()[:2]
        flags = ["-proto", proto, "-host-ip", "::", "-host-port", str(port.number), "-use-listen-fd"]
        flags += ["-container-ip", to, "-container-port", str(number)]
        with listener:
            port.launcher, status = start(self.site.host, *flags, before=self.site.before, passed=listener.fileno())
        assert status == b"0\n", status
        return port

    def to_nowhere(self, container: str) -> Port:
        """Publish a TCP port whose backend's address does not exist."""
        port = self._serve("tcp", "127.0.0.1", "")
        port.launcher, port.number = publish(self.site.host, "tcp", "127.0.0.1", container, 80, self.site.before)
        return port

    def _serve(self, proto: str, address: str, container: str) -> Port:
        server = open_socket(self.site.box, proto, container or self.site.box.address4)
        port = Port(self.site, proto, address, server)
        self._scope.callback(self._end, port)
        port.keep(server)
        return port

    def _publish(self, port: Port, host_ip: str) -> Port:
        to, number = port.server.getsockname()[:2]
        port.launcher, port.number = publish(self.site.host, port.proto, host_ip, to, number, self.site.before)
        return port

    def _end(self, port: Port) -> None:
        with port.scope:
            if hasattr(port, "launcher") and port.launcher.poll() is None:
                assert port.stop() == 0


@contextmanager
def site_and_ports(folder: Path, before: tuple[str, ...] = (), **settings: object) -> Iterator[tuple[Site, Ports]]:
    """Create a site for one test."""
    with Site(folder, before, **settings) as site, Ports(site) as ports:
        yield site, ports


def exactly(sock: socket.socket, size: int) -> bytes:
    """Receive `size` bytes; fewer if the stream ends before."""
    parts = []
    while size > 0 and (part := sock.recv(min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def echo(client: socket.socket, served: socket.socket, text: bytes = b"some text") -> None:
    """Check both directions of a connection."""
    client.sendall(text)
    assert exactly(served, len(text)) == text
    served.sendall(text.upper())
    assert exactly(client, len(text)) == text.upper()


def few_descriptors(limit: int) -> tuple[str, ...]:
    """Return the words that start a program with so many descriptors, and without the privilege to have more."""
    return "setpriv", "--bounding-set=-sys_resource", "prlimit", f"--nofile={limit}:{limit}"


def crowd_in(port: Port, count: int) -> list[socket.socket]:
    """Connect `count` clients until the relay runs out of descriptors; each has sent its number."""
    clients = [port.connect() for _ in range(count)]
    for number, client in enumerate(clients):
        client.sendall(b"%2d" % number)
    wait_until(lambda: port.site.log_lines("out of file descriptors"), "a relay without descriptors", PATIENCE_S)
    return clients


def serve_one_by_one(port: Port, clients: list[socket.socket]) -> None:
    """Serve all clients, each as soon as another one has ended."""
    for _ in clients:
        with port.accept() as connection:
            number = int(exactly(connection, 2))
            connection.sendall(b"%2d" % number)
            assert exactly(clients[number], 2) == b"%2d" % number
        clients[number].close()


def stop_ends_all(port: Port, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
    """Unpublish the port: both ends of its connections are reset at once, and its socket is closed."""
    assert port.stop() == 0
    for sock in (sock for pair in pairs for sock in pair):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    with pytest.raises(ConnectionRefusedError):
        port.connect()


def reset(sock: socket.socket) -> None:
    """Close a connection with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()
