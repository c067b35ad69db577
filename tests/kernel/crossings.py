"""Many connection attempts at once, and servers in containers that show which port a client reached."""

import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from lab.netns import Namespace
from lab.waiting import wait_until
from tests.kernel.street import HOST4, HOST6, Box, Street

_PATIENCE_S = 3.0
_ETH_P_ALL = 3  # include/uapi/linux/if_ether.h
# By EtherType: the family, where the destination's address begins, where the ports do (RFC 791, RFC 8200).
_HEADERS = {0x0800: (socket.AF_INET, 16, 20), 0x86DD: (socket.AF_INET6, 24, 40)}
_TABLE = "77"


class Question(NamedTuple):
    """A connection attempt, or a datagram, from a client in `space`."""

    space: Namespace
    protocol: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.space.name} at {self.address} port {self.port}/{self.protocol}"


def reached(street: Street, questions: Iterable[Question]) -> list[str]:
    """Try all questions at once; return those that were answered."""
    asked = list(questions)
    with ThreadPoolExecutor(len(asked)) as pool:
        answered = list(pool.map(lambda one: street.reaches(*one), asked))
    return [str(one) for one, is_answered in zip(asked, answered, strict=True) if is_answered]


def everywhere(
    clients: Iterable[Namespace], addresses: Iterable[str], port: int, protocols: Iterable[str] = ("tcp", "udp")
) -> list[Question]:
    """Return a question for each client, address and protocol; empty addresses are skipped."""
    where = [address for address in addresses if address]
    return [
        Question(client, protocol, address, port) for client in clients for address in where for protocol in protocols
    ]


@contextmanager
def listening(box: Box, protocol: str, ports: Iterable[int]) -> Iterator[dict[int, socket.socket]]:
    """Listen on each port in a container, for clients of both families."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with ExitStack() as stack:
        found = {}
        with box.space.entered():
            for port in ports:
                found[port] = sock = stack.enter_context(socket.socket(socket.AF_INET6, kind))
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.settimeout(_PATIENCE_S)
                sock.bind(("::", port))
                if protocol == "tcp":
                    sock.listen()
        yield found


def client_of(space: Namespace, protocol: str, address: str, port: int) -> socket.socket:
    """Return a client in `space` that has sent the address and port that it is connected to."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with space.entered():
        client = socket.socket(family, kind)
        try:
            client.settimeout(_PATIENCE_S)
            client.connect(socket.getaddrinfo(address, port, family, kind)[0][4])
            client.sendall(f"{address} {port}".encode())
        except BaseException:
            client.close()
            raise
    return client


def arrives(space: Namespace, protocol: str, address: str, port: int, at: socket.socket) -> bool:
    """True if a client there reaches this socket within `_PATIENCE_S` and receives its answer."""
    sent = f"{address} {port}".encode()
    with client_of(space, protocol, address, port) as client, suppress(TimeoutError):
        if protocol == "tcp":
            served, _ = at.accept()
            with served:
                served.settimeout(_PATIENCE_S)
                served.sendall(served.recv(1000))
        else:
            data, peer = at.recvfrom(1000)
            at.sendto(data, peer)
        return client.recv(1000) == sent
    return False


@contextmanager
def routed_at(host: Namespace, neighbour: Namespace) -> Iterator[None]:
    """Have the neighbour route 127.0.0.1 and ::1 to the host, as an attacker would."""
    undo = []

    def change(do: tuple[str, ...], back: tuple[str, ...]) -> None:
        neighbour.ip(*do)
        undo.append(back)

    before = neighbour.sysctl("net.ipv4.conf.all.route_localnet")
    neighbour.sysctl("net.ipv4.conf.all.route_localnet", 1)
    try:
        for family, loopback, via in (("-4", "127.0.0.1", HOST4), ("-6", "::1", HOST6)):
            route = (loopback, "via", via, "table", _TABLE)
            change((family, "route", "add", *route), (family, "route", "del", *route))
            ours = ("to", loopback, "lookup", _TABLE, "pref", "1")
            change((family, "rule", "add", *ours), (family, "rule", "del", *ours))
            later = ("lookup", "local", "pref", "2")
            change((family, "rule", "add", *later), (family, "rule", "del", *later))
            first = ("lookup", "local", "pref", "0")
            change((family, "rule", "del", *first), (family, "rule", "add", *first))
        yield
    finally:
        for back in reversed(undo):
            neighbour.ip(*back)
        neighbour.sysctl("net.ipv4.conf.all.route_localnet", before)


class Tap:
    """Records packets that arrive at an interface of the host, before any firewall rule.

    At `lo` those are the packets to the relay: a redirected socket sends nothing there.
    """

    def __init__(self, host: Namespace, interface: str) -> None:
        with host.entered():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
            self._sock.bind((interface, _ETH_P_ALL))
        self._sock.setblocking(False)

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def saw(self, address: str, port: int) -> None:
        """Wait for a packet to this address and port.  AssertionError: none came."""
        wait_until(lambda: self.has_seen(address, port), f"a packet to {address} port {port}", _PATIENCE_S)

    def has_seen(self, address: str, port: int) -> bool:
        """True if a packet to this address and port has come since the last call."""
        with suppress(BlockingIOError):
            while True:
                packet, (_, kind, *_) = self._sock.recvfrom(2000)
                if kind in _HEADERS:
                    family, start, end = _HEADERS[kind]
                    to = socket.inet_ntop(family, packet[start:end])
                    if to == address and int.from_bytes(packet[end + 2 : end + 4]) == port:
                        return True
        return False
