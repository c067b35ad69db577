"""A server that answers each client with the address it saw, and its client.

    echo_server.py serve PORT...
    echo_server.py request PROTOCOL ADDRESS PORT

It imports the standard library only, so that it can be run by its path in any network namespace.

A client sends a line; the answer is the client's address as the server saw it, a space, and that line. Over TCP the
server closes the connection then, so TIME_WAIT stays on the proxy's side towards the client. A client that sends
nothing keeps its connection open. Each port is served over TCP, UDP and, where the kernel has it, SCTP, over IPv4 and
IPv6.
"""

import errno
import os
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

BRIEF_S = 3.0 if "GANGWAY_VM" in os.environ else 0.7
"""How long to wait for an answer that may never come: an emulated machine is slow."""

_PATIENCE_S = 15.0  # SCTP retransmits the first lost packet after 3 s (RTO.Initial, RFC 9260, 16)
_SCTP = 132
_SELF = (sys.executable, "-I", "-S", __file__)


class NoAnswer(Exception):
    """A client got no answer, or a wrong one."""


class Answer(NamedTuple):
    """What the server returned: the client's address as the server saw it, and the line that was sent."""

    peer: str
    text: str


def serve(popen: Callable[..., subprocess.Popen[Any]], *ports: int) -> None:
    """Start a server for `ports` with `popen` (for example a namespace's), and wait until it serves."""
    process = popen(*_SELF, "serve", *map(str, ports), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise NoAnswer("the echo server did not start")


def request(command: Callable[..., list[str]], protocol: str, address: str, port: int) -> Answer:
    """Run a client where `command` (for example a namespace's) runs it, and return its answer.

    NoAnswer: the client failed; the message says why.
    """
    words = command(*_SELF, "request", protocol, address, str(port))
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    if done.returncode:
        raise NoAnswer(f"{protocol} {address} port {port}: {done.stderr.strip()}")
    return Answer(*done.stdout.split())


def is_answered(protocol: str, address: str, port: int) -> bool:
    """True if anything answers a client in the current network namespace within BRIEF_S."""
    try:
        request_here(protocol, address, port, patience_s=BRIEF_S)
    except NoAnswer:
        return False
    return True


def request_here(
    protocol: str,
    address: str,
    port: int,
    patience_s: float = _PATIENCE_S,
    connected: Callable[[socket.socket], None] = lambda client: None,
) -> Answer:
    """Send a request from the current network namespace, and return the answer.

    `connected` is called with the client's socket before it sends.

    NoAnswer: the request failed; the message says why.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind, _SCTP if protocol == "sctp" else 0) as client:
            client.settimeout(patience_s)
            # UDP sockets connect, too: an answer from another address does not count.
            client.connect(socket.getaddrinfo(address, port, family, kind)[0][4])
            connected(client)
            return request_over(client)
    except OSError as error:
        raise NoAnswer(str(error)) from None


def request_over(client: socket.socket) -> Answer:
    """Send a request over a socket that is connected to an echo server.

    OSError: nothing answers. NoAnswer: something else than the echo server answers.
    """
    client.sendall(b"hello\n")
    received = client.recv(1000).decode()
    match received.split():
        case [peer, "hello"]:
            return Answer(peer, "hello")
    raise NoAnswer(f"unexpected answer {received!r}")


class _Stream(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        if line:
            self.wfile.write(f"{self.client_address[0]} ".encode() + line)


class _Datagram(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(f"{self.client_address[0]} ".encode() + self.rfile.read())


class _StreamServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


class _SctpServer(_StreamServer):
    def __init__(self, at: tuple[str, int], handler: type[socketserver.BaseRequestHandler]) -> None:
        super().__init__(at, handler, bind_and_activate=False)
        self.socket.close()
        self.socket = socket.socket(self.address_family, socket.SOCK_STREAM, _SCTP)
        self.server_bind()
        self.server_activate()


_SERVERS: tuple[tuple[type[socketserver.BaseServer], type[socketserver.BaseRequestHandler]], ...] = (
    (_StreamServer, _Stream),
    (socketserver.UDPServer, _Datagram),
    (_SctpServer, _Stream),
)


def _serve(port: int) -> None:
    for kind, handler in _SERVERS:
        for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            version = type(kind.__name__, (kind,), {"address_family": family, "server_bind": _bind_one_family})
            try:
                server = version((any_address, port), handler)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
                    raise
                continue  # this kernel has no IPv6, or no SCTP
            threading.Thread(target=server.serve_forever).start()


def _bind_one_family(server: socketserver.TCPServer) -> None:
    if server.address_family == socket.AF_INET6:
        server.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if server.allow_reuse_address:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.socket.bind(server.server_address)


def main(words: list[str]) -> int:
    """Run the command line, and return the exit code."""
    match words:
        case ["request", protocol, address, port]:
            try:
                print(*request_here(protocol, address, int(port)))
            except NoAnswer as error:
                print(error, file=sys.stderr)
                return 1
        case ["serve", *ports]:
            for port in ports:
                _serve(int(port))
            print("ready", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
