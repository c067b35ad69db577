"""Reads how much of the kernel's limits is in use (`limits.py`).

Facts that it leans on:

* nf_conntrack_count counts the calling thread's namespace; nf_conntrack_max holds for each namespace, and can be
  changed in the initial one only (net/netfilter/nf_conntrack_standalone.c).
* fs.epoll.max_user_watches limits all epoll sets of a user together (epoll(7)), and nothing tells how many watches a
  user has.  A thread of the relay watches each descriptor once at most, so their product is an upper bound; what an
  epoll set watches is in /proc/PID/fdinfo (proc(5), `tfd`).
* The size of /proc/PID/fd is the number of open descriptors (proc(5), Linux 6.2); before, it is 0.
* A socket that connects gets a local port of net.ipv4.ip_local_port_range.  TCP connections to different addresses or
  ports can share one; a UDP socket has its port alone.  Clients by nat use the ports of their own namespaces.
* A port in TIME_WAIT cannot be used again for the same destination, unless net.ipv4.tcp_tw_reuse is 1 (ip-sysctl.rst).
"""

import os
import re
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gangway.host import netlink, sysctl
from gangway.host.source_ports import PORTS
from gangway.inet import FAMILIES, IPV4_MAPPED, PROTOCOLS, format_host, pack_address
from gangway.limits import (
    ALL_OPEN_FILES,
    CONNTRACK_MAX,
    FREE_SOURCE_PORTS,
    LOCAL_PORTS,
    OPEN_FILES,
    SOURCE_PORTS,
    WATCHES,
    Usage,
)

_SOCK_DIAG, _BY_FAMILY = 4, 20  # include/uapi/linux/netlink.h, sock_diag.h
# include/uapi/linux/inet_diag.h: struct inet_diag_req_v2 with an empty socket ID; of struct inet_diag_msg the ports of
# both ends and the peer's address
_REQUEST = struct.Struct("=BBBxI48x")
_ENDS = struct.Struct("!4xHH16x16s")
# include/net/tcp_states.h: all but TIME_WAIT, CLOSE, LISTEN and the bound sockets; TIME_WAIT; any
_CONNECTED, _TIME_WAIT, _ANY_STATE = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11)), 1 << 6, (1 << 32) - 1
_COUNT = re.compile(r"^(TCP|TCP6|UDP|UDP6): inuse (\d+)(?: orphan \d+ tw (\d+))?", re.MULTILINE)
_MAX_OPEN_FILES = re.compile(r"^Max open files +(\d+)", re.MULTILINE)
_NEAR = 0.8  # the share of sockets to local ports from which on it pays to look at each socket

Containers = Callable[[], Collection[str]]
"""Returns the addresses of containers."""
BusiestSource = Callable[[], tuple[int, str]]
"""Counts like `source_ports.busiest`."""


class LocalPorts(NamedTuple):
    """The range that the kernel selects local ports from, and how many of them are not reserved."""

    first: int
    last: int
    free: int


def usages(
    relay: int | None, ports: LocalPorts, containers: Containers, busiest_source: BusiestSource
) -> Iterator[Usage]:
    """Yield what can be known of each limit; a process that has just ended is left out.

    `relay` is the relay's pid.
    """
    yield from _tracked(busiest_source)
    yield from _open_files("the daemon", os.getpid(), "requests and launchers wait")
    if relay is not None:
        yield from _open_files("the relay", relay, "new clients wait")
    yield from _all_open_files()
    if relay is not None:
        yield from _watches(relay)
    if ports.free > 0:
        yield from _local_ports(ports, containers)


def _tracked(busiest_source: BusiestSource) -> Iterator[Usage]:
    """Yield how many connections are tracked, and how many of them have the ports of one translated source address.

    The latter exactly, if there are nearly as many as ports.
    """
    count, most = (_number(f"net.netfilter.nf_conntrack_{name}") for name in ("count", "max"))
    if count is None:
        return
    if most:  # 0: no limit
        yield Usage("tracked connections", count, most, CONNTRACK_MAX, "packets of new connections are dropped")
    ports, who = len(PORTS), "to one destination"
    if is_near := count >= _NEAR * ports:
        count, who = busiest_source()
    consequence = f"new masqueraded connections {who} are dropped"
    yield Usage("masquerade ports", count, ports, SOURCE_PORTS, consequence, not is_near, FREE_SOURCE_PORTS)


def _open_files(name: str, pid: int, consequence: str) -> Iterator[Usage]:
    with suppress(OSError):
        found = _MAX_OPEN_FILES.search(Path(f"/proc/{pid}/limits").read_text())
        if found is not None and int(found[1]):
            yield Usage(f"file descriptors of {name}", _descriptors(pid), int(found[1]), OPEN_FILES, consequence)


def _all_open_files() -> Iterator[Usage]:
    words = (sysctl.read("fs.file-nr") or "").split()
    if len(words) == 3:
        yield Usage("open files of all processes", int(words[0]), int(words[2]), ALL_OPEN_FILES, "new clients wait")


def _watches(relay: int) -> Iterator[Usage]:
    """Yield how many watches the relay has: exactly, if it may have nearly all."""
    most = _number("fs.epoll.max_user_watches")
    with suppress(OSError):
        used = _descriptors(relay) * len(os.listdir(f"/proc/{relay}/task"))
        is_near = most is not None and used >= _NEAR * most
        if is_near:
            used = sum(Path(entry.path).read_text().count("\ntfd:") for entry in os.scandir(f"/proc/{relay}/fdinfo"))
        if most:
            yield Usage(
                "epoll watches of the relay", used, most, WATCHES, "new clients are not served", is_bound=not is_near
            )


def _local_ports(ports: LocalPorts, containers: Containers) -> Iterator[Usage]:
    """Yield how many local ports UDP and TCP use: exactly, if there are nearly as many sockets as ports."""
    found, busiest = _socket_counts(), "a container port"
    udp, tcp = found["UDP"] + found["UDP6"], found["TCP"] + found["TCP6"] + found["tw"]
    is_udp_near, is_tcp_near = (count >= _NEAR * ports.free for count in (udp, tcp))
    if is_udp_near:
        udp = _udp_ports(ports)
    if is_tcp_near:
        tcp, busiest = _connections(containers())
    what = "connections by relay and redirect to"
    yield Usage("local UDP ports", udp, ports.free, LOCAL_PORTS, "new UDP clients are not relayed", not is_udp_near)
    yield Usage("local TCP ports", tcp, ports.free, LOCAL_PORTS, f"{what} {busiest} are refused", not is_tcp_near)


def _socket_counts() -> Counter[str]:
    """Return how many sockets this namespace has, by the names in /proc/net/sockstat; `tw` are those in TIME_WAIT."""
    counts: Counter[str] = Counter()
    for name in ("sockstat", "sockstat6"):
        with suppress(OSError):  # the kernel has no IPv6
            for kind, used, waiting in _COUNT.findall(Path("/proc/thread-self/net", name).read_text()):
                counts[kind] += int(used)
                counts["tw"] += int(waiting or 0)
    return counts


def _udp_ports(ports: LocalPorts) -> int:
    """Return how many ports of the range have a UDP socket."""
    return len({port for _, port, _, _ in _sockets("udp", _ANY_STATE) if ports.first <= port <= ports.last})


def _connections(containers: Collection[str]) -> tuple[int, str]:
    """Return the number of local ports that are used for the busiest port of these addresses, and its name."""
    wanted = {pack_address(address): address for address in containers}
    states = _CONNECTED if sysctl.read("net.ipv4.tcp_tw_reuse") == "1" else _CONNECTED | _TIME_WAIT
    counts: Counter[tuple[str, int]] = Counter()
    for family, _, port, packed in _sockets("tcp", states):
        address = wanted.get(IPV4_MAPPED + packed[:4] if family == socket.AF_INET else packed)
        if address is not None:
            counts[address, port] += 1
    for (address, port), count in counts.most_common(1):
        return count, f"{format_host(address)}:{port}"
    return 0, "a container port"


def _sockets(protocol: str, states: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield family, local port, peer's port and packed peer's address of each socket that is in one of these states."""
    with suppress(OSError), netlink.connect(_SOCK_DIAG) as diag:  # the kernel lists none: CONFIG_INET_DIAG
        for family in FAMILIES.values():
            body = _REQUEST.pack(family, PROTOCOLS[protocol], 0, states)
            for data in netlink.dump(diag, netlink.pack_message(_BY_FAMILY, netlink.REQUEST | netlink.DUMP, body)):
                for message in netlink.messages(data):
                    yield family, *_ENDS.unpack_from(data, message.start + netlink.MESSAGE.size)


def _descriptors(pid: int) -> int:
    """Return the number of a process's open descriptors.  OSError: it has ended."""
    folder = f"/proc/{pid}/fd"
    return os.stat(folder).st_size or len(os.listdir(folder))


def _number(name: str) -> int | None:
    text = sysctl.read(name)
    return int(text) if text is not None and text.isdecimal() else None
