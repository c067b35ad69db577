"""Launchers as dockerd starts them, clients of their ports, and the daemon that they share.

The launchers run in network namespaces of their own, so each set of them has its own daemon.
"""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from lab.gangwayd import runtime_folder
from lab.netns import Container, Host, Namespace, end
from lab.waiting import wait_until
from tests.kernel import published
from tests.kernel.ground import PATIENCE_S, SLOW_MACHINE
from tests.kernel.published import children, end_processes, processes

BRIEF_S = 20.0 if SLOW_MACHINE else 2.0
LINGER_S = 30.0
"""An idle daemon ends after 5 s, and the relay 3 s later."""
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
KINDS = {"tcp": TCP, "udp": UDP}
Launcher = subprocess.Popen[Any]
_launchers: list[Launcher] = []


class Echo:
    """A server in a namespace that sends back what it gets, over TCP and UDP at one port."""

    port = 7

    def __init__(self, namespace: Namespace) -> None:
        with namespace.entered():
            self._stream = socket.create_server(("0.0.0.0", self.port), backlog=256)
            self._datagram = socket.socket(socket.AF_INET, UDP)
        self._datagram.bind(("0.0.0.0", self.port))
        for serve in (self._accept, self._answer):
            threading.Thread(target=serve, daemon=True).start()

    def close(self) -> None:
        """End the threads."""
        for sock in (self._stream, self._datagram):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes them
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._stream.accept()
                threading.Thread(target=_echo, args=(client,), daemon=True).start()

    def _answer(self) -> None:
        with suppress(OSError):
            while True:
                data, address = self._datagram.recvfrom(65536)
                if address is None:  # shut down
                    return
                self._datagram.sendto(data, address)


def _echo(client: socket.socket) -> None:
    with client, suppress(OSError):
        while data := client.recv(65536):
            client.sendall(data)


# Launchers


def start(host: Host, *flags: str, **options: Any) -> tuple[Launcher, bytes]:
    """Start a launcher as dockerd does; return it, and all data from its status pipe."""
    null: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    launcher, status = published.start(host, *flags, **{**null, **options})
    _launchers.append(launcher)
    return launcher, status


def publish(host: Host, box: Container, port: int, *flags: str, proto: str = "tcp", **options: Any) -> Launcher:
    """Publish the container's echo port, and return the launcher."""
    launcher, status = start(host, *flags_for(box, port, proto), *flags, **options)
    assert status == b"0\n", status
    return launcher


def flags_for(box: Container, port: int, proto: str = "tcp", host_ip: str = "0.0.0.0") -> list[str]:
    """Return the flags that dockerd gives."""
    host_side = ["-proto", proto, "-host-ip", host_ip, "-host-port", str(port)]
    return [*host_side, "-container-ip", box.address4, "-container-port", str(Echo.port)]


def refused(host: Host, *flags: str, **options: Any) -> str:
    """Start a launcher that exits as dockerd expects of one that cannot publish; return the reason."""
    launcher, status = start(host, *flags, **options)
    assert launcher.wait(PATIENCE_S) == 1
    assert status[:2] == b"1\n"
    return status[2:].decode()


class Finished(NamedTuple):
    """The exit status and output of a launcher."""

    code: int
    status: bytes
    out: str
    err: str


def finish(host: Host, *flags: str) -> Finished:
    """Run a launcher that exits by itself."""
    launcher, status = start(host, *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = launcher.communicate(timeout=PATIENCE_S)
    return Finished(launcher.returncode, status, out.decode(), err.decode())


def stop(launcher: Launcher, by: signal.Signals = signal.SIGINT) -> int:
    """End a launcher as dockerd does; return its exit status."""
    launcher.send_signal(by)
    return launcher.wait(PATIENCE_S)


# Clients


def connect(host: Host, port: int, address: str = "127.0.0.1", kind: int = TCP) -> socket.socket:
    """Return a client on the host.  It is bound to a loopback address, so it is not redirected: the relay serves it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with host.entered():
        client = socket.socket(family, kind)
    client.settimeout(PATIENCE_S)
    try:
        if ip_address(address).is_loopback:
            client.bind((address, 0))
        client.connect((address, port))
    except OSError:
        client.close()
        raise
    return client


def exchange(client: socket.socket) -> None:
    """Check that the server at the other end of a connection echoes."""
    client.sendall(b"hello")
    assert client.recv(64) == b"hello"


def serves(host: Host, port: int, address: str = "127.0.0.1", kind: int = TCP) -> bool:
    """True if the port's server echoes within a while."""
    with suppress(TimeoutError), connect(host, port, address, kind) as client:
        client.sendall(b"hello")
        return client.recv(64) == b"hello"
    return False


def ends(client: socket.socket) -> bool:
    """True if the connection ends or is reset within a moment."""
    client.settimeout(BRIEF_S)
    try:
        return client.recv(64) == b""
    except ConnectionResetError:
        return True


@contextmanager
def bound(host: Host, port: int, kind: int = TCP, family: int = socket.AF_INET) -> Iterator[socket.socket]:
    """Bind a server's socket to a port of the host.  OSError: the port is in use."""
    with host.entered():
        server = socket.socket(family, kind)
    with server:
        if kind == TCP:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(("", port))
        yield server


def is_free(host: Host, port: int, kind: int = TCP) -> bool:
    """True if a server can bind the port."""
    try:
        with bound(host, port, kind):
            return True
    except OSError:
        return False


def nothing_is_bound(host: Host) -> bool:
    """True if no socket of the host listens."""
    return host.run("ss", "-HSltun").stdout == "" and host.run("ss", "-Hltun").stdout == ""


# The daemon and the relay


def daemon_and_relay(host: Namespace) -> tuple[int, int]:
    """Return the pids of the two processes; there is exactly one of each."""
    daemon, relay = processes(host)
    assert children(daemon) == [relay]
    return daemon, relay


def are_replaced(host: Namespace, *old: int) -> bool:
    """True if a daemon and a relay run, and the processes `old` do not."""
    now = list(processes(host))
    return len(now) >= 2 and not {*now} & {*old}


def is_clean(host: Namespace) -> bool:
    """True if neither a daemon, nor a relay, nor their runtime folder is left."""
    return not any(processes(host)) and not runtime_folder(host).exists()


def wait_until_clean(host: Namespace) -> None:
    """Wait until an idle daemon and its relay have ended, with all their files."""
    wait_until(lambda: is_clean(host), "the end of the daemon, its relay and their folder", LINGER_S)


def open_control(path: Path | str) -> socket.socket:
    """Return a connection to a control socket, as a launcher makes it."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(PATIENCE_S)
    try:
        client.connect(str(path))
    except OSError:
        client.close()
        raise
    return client


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Act as another user within the block."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def kill(*pids: int) -> None:
    """End processes with SIGKILL."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def site() -> Iterator[tuple[Host, Container]]:
    """Create a host and a container that echoes; end the launchers, the daemon and the relay afterwards."""
    with Host() as host:
        box = host.container()
        echo = Echo(box)
        try:
            yield host, box
        finally:
            echo.close()
            for launcher in _launchers:
                end(launcher)
            _launchers.clear()
            end_processes(host)
