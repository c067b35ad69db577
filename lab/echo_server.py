"""A server that answers each client with the address it saw, and its client.

    echo_server.py serve PORT...
    echo_server.py request PROTOCOL ADDRESS PORT

It imports the standard library only, so that it can be run by its path in any network namespace.

A client sends a line; the answer is the client's address as the server saw it, a space, and that line. Over TCP the
server closes the connection then, so TIME_WAIT stays on the proxy's side towards the client. A client that sends
nothing keeps its connection open. Each port is served over TCP, UDP and, where the kernel has it, SCTP, over IPv4 and
IPv6.
"""

import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_PATIENCE_S = 15.0  # SCTP sends the first lost packet anew after 3 s only (RTO.Initial, RFC 9260, 16)
_SCTP = 132
_SELF = (sys.executable, "-I", "-S", __file__)


class NoAnswer(Exception):
    """A client got none, or a wrong one."""


class Answer(NamedTuple):
    """What came back: the client's address as the server saw it, and the line that was sent."""

    peer: str
    text: str


def serve(popen: Callable[..., subprocess.Popen[Any]], *ports: int) -> None:
    """Starts a server for `ports` by `popen` (a namespace's, say), and waits until it serves."""
    process = popen(*_SELF, "serve", *map(str, ports), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise NoAnswer("the server did not start")


def request(command: Callable[..., list[str]], protocol: str, address: str, port: int) -> Answer:
    """Asks where `command` (a namespace's, say) lets the client run.  NoAnswer says why there is none."""
    words = command(*_SELF, "request", protocol, address, str(port))
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    if done.returncode:
        raise NoAnswer(f"{protocol} {address} port {port}: {done.stderr.strip()}")
    return Answer(*done.stdout.split())


def request_here(
    protocol: str,
    address: str,
    port: int,
    patience_s: float = _PATIENCE_S,
    connected: Callable[[socket.socket], None] = lambda client: None,
) -> Answer:
    """Asks from the calling thread's network namespace.  NoAnswer says why there is none.

    `connected` may have a look at the client before it asks.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind, _SCTP if protocol == "sctp" else 0) as client:
            client.settimeout(patience_s)
            client.connect(
                socket.getaddrinfo(address, port, family, kind)[0][4]
            )  # also for UDP: an answer from another address does not count
            connected(client)
            return request_over(client)
    except OSError as error:
        raise NoAnswer(str(error)) from None


def request_over(client: socket.socket) -> Answer:
    """Asks by a socket that is connected to a mirror.  OSError: nothing answers; NoAnswer: not that."""
    client.sendall(b"hello\n")
    got = client.recv(1000).decode()
    match got.split():
        case [peer, "hello"]:
            return Answer(peer, "hello")
    raise NoAnswer(f"the answer is {got!r}")


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
        for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            version = type(kind.__name__, (kind,), {"address_family": family, "server_bind": _bind_one_family})
            try:
                server = version((everywhere, port), handler)
            except OSError:
                if kind is not _SctpServer:
                    raise
                continue  # this kernel has none
            threading.Thread(target=server.serve_forever).start()


def _bind_one_family(server: socketserver.TCPServer) -> None:
    if server.address_family == socket.AF_INET6:
        server.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if server.allow_reuse_address:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.socket.bind(server.server_address)


def main(words: list[str]) -> int:
    """The command line."""
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
