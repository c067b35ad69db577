"""The wire protocol: every message between the daemon and its relay, and between launchers and the daemon.

Each message is one datagram of a SOCK_SEQPACKET unix socket: words separated by spaces, with descriptors attached where
noted (SCM_RIGHTS; the pidfd is optional, as pidfd_open(2) needs Linux 5.3).  A request's first word is the name of its
type, the others are its fields.  The first message of a connection carries the protocol's version.  A message that
`parse` refuses ends its connection.

A relay answers daemons of every version, and what a daemon needs to replace it (relay/replacement.py) keeps its form
in all of them: `hello`, `remove`, `list` and the last six requests.

    daemon → relay    hello VERSION
                      serve PROTO HOST-IP FIRST LAST CONTAINER-IP FIRST own        with the port's socket
                      serve PROTO HOST-IP FIRST LAST CONTAINER-IP FIRST leased     the same, and the launcher's pidfd
                      serve PROTO HOST-IP FIRST LAST CONTAINER-IP FIRST shared     by the socket given with `share`
                      serve PROTO HOST-IP FIRST LAST CONTAINER-IP FIRST held       the same; for UDP with a raw socket
                      serve … SUBNET...                      any of these, for the host's own clients and those of some
                                                             subnets only
                      remove PROTO HOST-IP FIRST LAST        answered when the port is free
                      list OFFSET                            the served ports, from one of them on; the mode of a
                                                             leased one whose launcher has exited is `ended`
                      count OFFSET                           what was counted of the served ports, from one of them on
                      share PROTO FAMILY    with the socket that serves ports without one of their own; for UDP also
                                            the map `binding` of ebpf/steering.bpf.c
                      countshared                            how many such sockets there are
                      hold NAME COUNT                        keep COUNT descriptors open, in place of those held before
                      getheld NAME                           answered with those descriptors
                      exclude OFFSET ADDRESS...              the addresses that nobody is served at, from the one at
                                                             OFFSET on; all that there were from there on are replaced
                      listheld                               the names of what is held
                      listexcluded                           those addresses
                      getport PROTO HOST-IP FIRST LAST       answered with the descriptors that its `serve` came with
                      getshared PROTO FAMILY                 the same, of `share`; none if there was none
                      retire SECONDS                         another relay serves the ports: accept no client any
                                                             more, and end with the last connection, or after so long
    relay → daemon    ok [TEXT]    or    error TEXT          to `list`, TEXT has a line for each port: the words of its
                                                           `serve`; to `count`, the words of its `remove` and the
                                                           numbers; to `hello`, the version of the protocol, and
                                                           that of gangway; to `countshared`, the number

    launcher → daemon lease VERSION PROTO CONTAINER-IP CONTAINER-PORT        with the port's socket
    daemon → launcher ok           or    error TEXT

A lease ends with its connection.  A launcher that stops shuts its side down and waits for the daemon to close.
"""

import socket
from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from gangway.inet import PROTOCOLS
from gangway.relay.sockets import Counters, family_of

VERSION = 2
"""Between daemon and relay.  Version 1 could not be replaced by another one."""
LEASE_VERSION = 1
"""Between launcher and daemon: launchers are not replaced, so a daemon has to know every earlier version, too."""
MAX_REQUEST_BYTES = 4096
MAX_ANSWER_BYTES = 1 << 16
MAX_DESCRIPTORS = 32
PAGE = 200
"""The most ports in one answer to `list` or `count`."""
PAGE_BYTES = MAX_ANSWER_BYTES - MAX_REQUEST_BYTES
"""An answer that has as many bytes is not continued."""
MOST_SUBNETS = 64
"""In one `serve`."""
EXCLUDED_PAGE = 10
"""Addresses in one `exclude`."""
REDIRECT = "redirect"
"""The name under which the daemon has the relay hold the loopback redirect."""
LOG = "log"
"""The name under which the relay is given its log file, which it does not hold but uses."""
_LAST_PORT = 65535


class ProtocolError(Exception):
    """The peer sent a malformed message, or one of another version of the protocol."""


class Mode(StrEnum):
    """How clients reach the relay at a port."""

    OWN = "own"  # by a socket of its own, until the daemon removes the port
    LEASED = "leased"  # the same, but the port ends with the launcher's process, should the daemon be away then
    ENDED = "ended"  # leased, but the launcher has exited; only in the answer to `list`
    SHARED = "shared"  # by the socket that the kernel steers all such ports of a protocol and family to
    HELD = "held"  # the same, but another program's socket is bound to the port: UDP answers leave by a raw socket


LEASES = (Mode.LEASED, Mode.ENDED)
"""The modes of ports that belong to leases."""


class HostPorts(NamedTuple):
    """Ports of one host address, from `first` to `last`."""

    protocol: str
    address: str
    first: int
    last: int


class Destination(NamedTuple):
    """The container address, and the container port that the first host port leads to."""

    address: str
    first: int


class Hello(NamedTuple):
    version: int


class Serve(NamedTuple):
    ports: HostPorts
    to: Destination
    mode: Mode
    admitted: tuple[str, ...] = ()  # the subnets of clients, as ADDRESS/PREFIX-LENGTH; empty: everybody


class Remove(NamedTuple):
    ports: HostPorts


class List(NamedTuple):
    offset: int


class Count(NamedTuple):
    offset: int


class Share(NamedTuple):
    protocol: str
    family: int  # 4 or 6


class CountShared(NamedTuple):
    pass


class Hold(NamedTuple):
    name: str
    number: int  # of descriptors


class GetHeld(NamedTuple):
    name: str


class Exclude(NamedTuple):
    offset: int
    addresses: tuple[str, ...]


class ListHeld(NamedTuple):
    pass


class ListExcluded(NamedTuple):
    pass


class GetPort(NamedTuple):
    ports: HostPorts


class GetShared(NamedTuple):
    protocol: str
    family: int  # 4 or 6


class Retire(NamedTuple):
    limit_s: int


class Lease(NamedTuple):
    protocol: str
    to: Destination


_ALONE: dict[str, type[CountShared | ListHeld | ListExcluded]]
_ALONE = {"countshared": CountShared, "listheld": ListHeld, "listexcluded": ListExcluded}
_WITH_NUMBER: dict[str, type[Hello | List | Count | Retire]]
_WITH_NUMBER = {"hello": Hello, "list": List, "count": Count, "retire": Retire}
_WITH_PORTS: dict[str, type[Remove | GetPort]] = {"remove": Remove, "getport": GetPort}
_WITH_KIND: dict[str, type[Share | GetShared]] = {"share": Share, "getshared": GetShared}
Request = (
    Hello
    | (Serve | Remove | List | Count | Share | CountShared | Hold | GetHeld | Exclude | Lease)
    | (ListHeld | ListExcluded | GetPort | GetShared | Retire)
)


def canonical(address: str) -> str:
    """Return an address, perhaps with a zone, in the kernel's spelling (inet_ntop(3))."""
    plain, percent, zone = address.partition("%")
    family = family_of(plain)
    return socket.inet_ntop(family, socket.inet_pton(family, plain)) + percent + zone


def encode(request: Request) -> bytes:
    """Return a request as the datagram that `parse` understands."""
    verb = f"lease {LEASE_VERSION}" if isinstance(request, Lease) else type(request).__name__.lower()
    return " ".join((verb, *_words(request))).encode()


def parse(data: bytes) -> Request:
    """Return the request in a datagram.  ProtocolError: it is malformed, or of another version."""
    try:
        match data.decode().split():
            case ["lease", version, *_] if version.isdecimal() and version != str(LEASE_VERSION):
                raise ProtocolError(f"protocol version {version} is not supported (this is version {LEASE_VERSION})")
            case ["hello" | "list" | "count" | "retire" as verb, number]:
                return _WITH_NUMBER[verb](_number(number))
            case ["exclude", offset, *addresses]:
                return Exclude(_number(offset), tuple(map(_address, addresses)))
            case ["serve", *words] if Mode.ENDED not in words:
                return _serve(words)
            case ["remove" | "getport" as verb, *words]:
                return _WITH_PORTS[verb](_host_ports(words))
            case ["share" | "getshared" as verb, protocol, "4" | "6" as family]:
                return _WITH_KIND[verb](_protocol(protocol), int(family))
            case ["countshared" | "listheld" | "listexcluded" as verb]:
                return _ALONE[verb]()
            case ["hold", name, count] if _number(count) <= MAX_DESCRIPTORS:
                return Hold(name, _number(count))
            case ["getheld", name]:
                return GetHeld(name)
            case ["lease", version, protocol, address, port] if version == str(LEASE_VERSION):
                return Lease(_protocol(protocol), Destination(_address(address), _port(port)))
    except ValueError:
        pass
    raise ProtocolError(f"malformed message {data[:80]!r}")


def encode_served(served: Serve) -> str:
    """Return a line of the answer to `list`."""
    return " ".join(_words(served))


def parse_served(line: str) -> Serve:
    """Return a served port from a line of the answer to `list`.  ProtocolError: it is malformed."""
    try:
        return _serve(line.split())
    except ValueError:
        raise ProtocolError(f"malformed port {line[:80]!r}") from None


def parse_leased(line: str) -> Serve | None:
    """Return a leased port from a line of the answer to `list`, None for any other.  ProtocolError: it is malformed."""
    words = line.split()
    return parse_served(line) if any(mode in words for mode in LEASES) else None


def encode_counted(ports: HostPorts, counters: Counters) -> str:
    """Return a line of the answer to `count`."""
    return " ".join(_words((ports, counters)))


def parse_counted(line: str) -> tuple[HostPorts, Counters]:
    """Return a port and its counters from a line of the answer to `count`.  ProtocolError: it is malformed."""
    words = line.split()
    try:
        return _host_ports(words[:4]), Counters._make(map(_number, words[4:]))
    except (ValueError, TypeError):
        raise ProtocolError(f"malformed counters {line[:80]!r}") from None


def encode_answer(text: str = "") -> bytes:
    """Return the answer to a request that was carried out."""
    return f"ok {text}".rstrip(" ").encode()


def encode_refusal(reason: str) -> bytes:
    return f"error {reason}".encode()


def parse_answer(data: bytes) -> tuple[bool, str]:
    """Return whether a request was carried out, and the text or reason.  ProtocolError: it is malformed."""
    verdict, _, text = data.decode(errors="replace").partition(" ")
    if verdict not in ("ok", "error"):
        raise ProtocolError(f"malformed answer {data[:80]!r}")
    return verdict == "ok", text


def _words(fields: tuple[object, ...]) -> Iterator[str]:
    for field in fields:
        if isinstance(field, tuple):
            yield from _words(field)
        else:
            yield str(field)


def _serve(words: list[str]) -> Serve:
    host, (address, first, mode, *admitted) = words[:4], words[4:]
    destination = Destination(_address(address), _port(first))
    served = Serve(_host_ports(host), destination, Mode(mode), tuple(map(_subnet, admitted)))
    span = served.ports.last - served.ports.first
    if served.to.first + span > _LAST_PORT or (span and served.mode not in (Mode.SHARED, Mode.HELD)):
        raise ValueError(words)
    if len(admitted) > MOST_SUBNETS:
        raise ValueError(words)
    return served


def _host_ports(words: list[str]) -> HostPorts:
    protocol, address, first, last = words
    plain, percent, zone = address.partition("%")
    ports = HostPorts(_protocol(protocol), _address(plain) + percent + zone, _port(first), _port(last))
    if ports.first > ports.last or (percent and not (zone and ":" in plain)):
        raise ValueError(words)
    return ports


def _protocol(text: str) -> str:
    if text not in PROTOCOLS:
        raise ValueError(text)
    return text


def _address(text: str) -> str:
    try:
        socket.inet_pton(family_of(text), text)
    except OSError:
        raise ValueError(text) from None
    return text


def _subnet(text: str) -> str:
    address, _, length = text.partition("/")
    if _number(length) > (128 if ":" in _address(address) else 32):
        raise ValueError(text)
    return text


def _port(text: str) -> int:
    port = _number(text)
    if not 0 < port <= _LAST_PORT:
        raise ValueError(text)
    return port


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):  # int() also takes signs, underscores and other scripts' digits
        raise ValueError(text)
    return int(text)
