"""The daemon's steering, if this host can have one: which ports nobody else gets, and by which sockets they are served.

What this file knows: that the relay keeps steering going when the daemon ends, and what the sockets that it shares are
like.  What it must not know: which ports are published, how the kernel is told.

How it works.  Each protocol and family has one socket.  It has to be bound to some address and port, and whatever that
is, is nobody else's: so it is a port that the kernel chooses, at an address that nobody can ask (RFC 7600, RFC 6666),
which is allowed without being the host's (IP_FREEBIND, ip(7)).  Relay and daemon both have the sockets: while there is
no relay, clients wait in the kernel's queue for the next one.

Ports are taken before anybody is asked whether they were free: from then on nobody else can bind one, so who has one
has had it before, and is found in the kernel's table of sockets.  One port by itself is tried by a socket of one's own,
which is held meanwhile: that is cheaper, and finds also who has bound it and does not listen yet.
"""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address

from gangway.ebpf.keys import keys
from gangway.ebpf.steering import Steering
from gangway.ebpf.steering_entries import KINDS, TAKEN
from gangway.errors import GangwayError, HostRefused, PortInUse, Unsupported
from gangway.host import sockets as ports
from gangway.reconcile.diff import HostPorts
from gangway.relay.client import Relay

_LINKS, _SOCKETS = "steering", "sockets"  # what the relay holds them under
# All ports of a protocol and family wait in one queue; what is not used costs nothing.
_DATAGRAM_BYTES = 4 << 20
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h


class Steered:
    """The steering of a network namespace; `lacking` says why there is none, if there is none.

    It takes over from a daemon that was here before.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._steering: Steering | None = None
        self._sockets: list[socket.socket] = []
        self.lacking = ""
        self._unused: set[bytes] = set()
        """Keys of ports that were lent, and that no socket had when one looked last."""
        links, sockets = relay.held(_LINKS), relay.held(_SOCKETS)
        try:
            for protocol, _ in KINDS:
                ports.bound_ports(protocol)  # without that nobody could tell whose a port is
            self._load(links, sockets)
        except (Unsupported, HostRefused) as error:
            self.lacking = str(error)
            self._have_held()
        finally:
            for fd in (*links, *sockets):
                os.close(fd)

    def close(self) -> None:
        """Lets go of it; while a relay lives it goes on."""
        if self._steering is not None:
            self._steering.close()
        for sock in self._sockets:
            sock.close()

    @property
    def lent_fd(self) -> int | None:
        """The map of ports that are lent, if there is steering; it stays ours."""
        return None if self._steering is None else self._steering.lent_fd

    def is_intact(self) -> bool:
        """Nobody else has ended it."""
        return self._steering is None or self._steering.is_attached()

    def mend(self) -> None:
        """Attaches it anew if somebody else has ended it.  Unsupported: that cannot be done any more."""
        before = self._steering
        if before is None or before.is_attached():
            return
        self._steering, sockets, self._sockets = None, self._sockets, []
        try:
            self._load(before.links, [sock.fileno() for sock in sockets])
        except (Unsupported, HostRefused) as error:
            self.lacking = str(error)
            self._have_held()
            raise
        finally:
            before.close()
            for sock in sockets:
                sock.close()

    def take_back(self) -> None:
        """What is lent to sockets whose end was not told; it is called now and then."""
        if self._steering is None:
            return
        lent = dict(self._steering.lent())
        bound = {protocol: ports.bound_ports(protocol) for protocol, _ in lent.values()}
        unused = {key for key, (protocol, port) in lent.items() if port not in bound[protocol]}
        for key in unused & self._unused:
            self._steering.take_back(key)
        self._unused = unused

    def take(self, of: HostPorts) -> "Hold":
        """Nobody else gets these ports any more.  PortInUse: somebody has one (of many, it says who); nothing is
        taken."""
        steering, wanted = self._need(of), list(_keys(of))
        if not all(steering.look_up(key) for key in wanted):
            with _tried(of):
                try:
                    for key in wanted:
                        if not steering.look_up(key):
                            steering.set(key, TAKEN)
                    if of.first != of.last:
                        _check_free(of)
                except GangwayError:
                    self.release(of)
                    raise
        return Hold(self, of)

    def release(self, of: HostPorts) -> None:
        """Those of these ports that are taken, and not steered, are anybody's."""
        if self._steering is not None:
            for key in _keys(of):
                if self._steering.look_up(key) == TAKEN:
                    self._steering.erase(key)

    def steer(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """What arrives for these, which were taken, gets to the relay: all or none."""
        steering = self._need()
        done: list[tuple[bytes, bytes]] = []
        try:
            if self._relay.shared() < len(self._sockets):
                self._share(steering)
            for key, value in entries:
                steering.set(key, value)
                done.append((key, value))
        except GangwayError:
            self.unsteer(done)
            raise

    def unsteer(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """No more, and they are anybody's."""
        if self._steering is not None:
            for key, _ in entries:
                self._steering.erase(key)

    def found(self) -> Mapping[bytes, bytes]:
        """The entries that there are; while the relay has not got the sockets, none of them is served."""
        if self._steering is None:
            return {}
        entries = dict(self._steering.entries())
        is_served = self._relay.lives() and self._relay.shared() == len(self._sockets)
        return entries if is_served else dict.fromkeys(entries, TAKEN)

    def _need(self, of: HostPorts | None = None) -> Steering:
        if self._steering is None:
            raise Unsupported(f"one socket cannot serve many ports: {self.lacking}")
        if of is not None and ":" in of.address and len(self._sockets) < len(KINDS):
            raise Unsupported("the kernel has no sockets of IPv6")
        return self._steering

    def _load(self, former: Sequence[int], sockets: Sequence[int]) -> None:
        """Likewise with the sockets of a daemon that was here before, or new ones."""
        steering = Steering(former)
        try:
            for kind in KINDS:
                if ports.has_family(kind[1]):
                    handed = sockets[len(self._sockets) :][:1]
                    sock = socket.socket(fileno=os.dup(*handed)) if handed else _new_socket(*kind)
                    self._sockets.append(sock)
                    steering.share(*kind, sock.fileno())
        except BaseException:
            steering.close()
            for sock in self._sockets:
                sock.close()
            self._sockets = []
            raise
        self._steering = steering
        with suppress(HostRefused):  # the relay is about to end: the next one gets them
            if self._relay.shared():
                self._share(steering)
        self._have_held()

    def _share(self, steering: Steering) -> None:
        """The relay gets the sockets: after the ports, as clients may be waiting."""
        for (protocol, family), sock in zip(KINDS, self._sockets, strict=False):
            beside = [steering.binding_fd] if protocol == "udp" else []
            self._relay.share(protocol, family, [sock.fileno(), *beside])

    def _have_held(self) -> None:
        with suppress(HostRefused):
            self._relay.hold(_LINKS, self._steering.links if self._steering is not None else ())
            self._relay.hold(_SOCKETS, [sock.fileno() for sock in self._sockets])


def _keys(of: HostPorts) -> Iterator[bytes]:
    return keys(of.protocol, ip_address(of.address).packed, of.first, of.last)


class Hold:
    """Ports that are taken; closed, they are anybody's."""

    def __init__(self, steered: Steered, of: HostPorts) -> None:
        self._steered = steered
        self._of = of

    def close(self) -> None:
        """They are not needed."""
        self._steered.release(self._of)


@contextmanager
def _tried(of: HostPorts) -> Iterator[None]:
    """One port is held by a socket for the time of the block.  PortInUse: somebody has it; Conflict: the address is not
    this host's, be it one port or many."""
    with ports.bind_port(of.protocol, of.address, of.first if of.first == of.last else 0) as sock:
        if of.first != of.last:
            sock.close()
        yield


def _check_free(of: HostPorts) -> None:
    port = ports.first_port_in_use(*of)
    if port is not None:
        raise PortInUse(ports.describe_holder(of.protocol, of.address, port))


def _new_socket(protocol: str, family: int) -> socket.socket:
    sock = ports.bind_unreachable(protocol, family)
    if protocol == "udp":
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BYTES)
    return sock
