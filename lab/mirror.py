"""A server that tells each client what it sees of it, and the client that asks: `mirror.py serve PORT...`, `mirror.py
ask PROTOCOL ADDRESS PORT`.

What this file knows: nothing but sockets, so that it can be run by path in any network namespace.

How it works.  A client sends a line; the answer is the address that the server saw, a space, and that line.  Over TCP
it is the server that closes then, so it is the proxy's side towards the client that stays in TIME_WAIT.  A client that
sends nothing keeps its connection for as long as it likes.  Each port is served over TCP and UDP, IPv4.
"""

import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

_PATIENCE_S = 5.0
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


def ask(command: Callable[..., list[str]], protocol: str, address: str, port: int) -> Answer:
    """Asks where `command` (a namespace's, say) lets the client run.  NoAnswer says why there is none."""
    words = command(*_SELF, "ask", protocol, address, str(port))
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    if done.returncode:
        raise NoAnswer(f"{protocol} {address} port {port}: {done.stderr.strip()}")
    return Answer(*done.stdout.split())


def ask_here(protocol: str, address: str, port: int) -> Answer:
    """Asks from the calling thread's network namespace.  NoAnswer says why there is none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind) as client:
            client.settimeout(_PATIENCE_S)
            client.connect((address, port))  # also for UDP: an answer from another address does not count
            client.sendall(b"hello\n")
            got = client.recv(1000).decode()
    except OSError as error:
        raise NoAnswer(str(error)) from None
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


def main(words: list[str]) -> int:
    """The command line."""
    match words:
        case ["ask", protocol, address, port]:
            try:
                print(*ask_here(protocol, address, int(port)))
            except NoAnswer as error:
                print(error, file=sys.stderr)
                return 1
        case ["serve", *ports]:
            for port in ports:
                for server in (_StreamServer, socketserver.UDPServer):
                    handler = _Stream if server is _StreamServer else _Datagram
                    threading.Thread(target=server(("0.0.0.0", int(port)), handler).serve_forever).start()
            print("ready", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
