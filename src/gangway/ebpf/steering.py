"""Steering: one socket for each protocol and family serves all published ports (steering.bpf.c says how).

What this file knows: steering's maps, and the sockets that the relay serves.  What it must not know: where ports lead.

How it works.  Each of the sockets has to be bound to some address and port, and no client must be able to reach it
there: it has a port of the kernel's choice at an address that no packet has (RFC 7600, RFC 6666), which bind() allows
although it is not the host's (IP_FREEBIND, ip(7)).  Daemon and relay both have the sockets: while there is no relay,
clients wait in the kernel's queue for the next one.

Ports are reserved before it is checked that they were free.  From then on no other program can bind one, so a program
that has one is found in the kernel's table of sockets.  A single port is tried with a socket of our own, which is open
meanwhile: that is cheaper, and also finds a program that has bound the port and does not listen yet.  A port that
another program holds on purpose (steering.bpf.c) is steered without being reserved.
"""

import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from gangway.ebpf import keys, requirements
from gangway.ebpf.keys import KINDS, PortBlock, SteeringState
from gangway.ebpf.loader import LoadedObject, ObjectFile
from gangway.ebpf.port_map import PortMap
from gangway.ebpf.program import LinkHolder, Program
from gangway.errors import GangwayError, HostRefused, PortInUse, Unsupported
from gangway.host import sockets

OBJECT = ObjectFile(
    path=Path(__file__).with_name("steering.bpf.o"),
    maps=("port_counts", "published", "relay_sockets", "relay_binding", "auto_bound", "bind_states", "excluded"),
    cgroup_programs=("bind4", "bind6", "post_bind4", "post_bind6", "sendmsg4", "sendmsg6", "release"),
    netns_programs=("steer",),
)
_NOT_NEEDED = "it was not needed yet"
_SOCKETS = "sockets"  # the name under which the relay holds them
# All ports of a protocol and family share one queue; memory that is not used costs nothing.
_DATAGRAM_BYTES = 4 << 20
_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h


class Steering(Program):
    """The steering of a network namespace; it takes over from the one whose links and sockets the relay holds.

    `auto_bound_fd` returns the redirect's map of auto-bound ports, if there is one.  `deferred`: unless it takes over,
    nothing is loaded before `start`, as a host without mappings does not need it.
    """

    def __init__(
        self, relay: LinkHolder, auto_bound_fd: Callable[[], int | None] = lambda: None, *, deferred: bool = False
    ) -> None:
        super().__init__(relay, "steering")
        self._auto_bound_fd = auto_bound_fd
        # In the order of KINDS; without IPv6 only the first two.
        self._sockets = [socket.socket(fileno=fd) for fd in relay.held(_SOCKETS)]
        # Auto-bound ports that no socket had when they were looked at last.
        self._unused: set[bytes] = set()
        if self._sockets or not deferred:
            self._start()
        else:
            self.unavailable = _NOT_NEEDED

    def start(self) -> None:
        """Load and attach the programs, if that was not tried yet."""
        if self.unavailable == _NOT_NEEDED:
            self.unavailable = ""
            self._start()

    def entries(self) -> dict[PortBlock, SteeringState]:
        """Return the state of each entry; while the relay lacks the sockets, none is more than reserved."""
        found = self._found()
        is_served = bool(found) and self._relay.is_running() and self._relay.shared_count() == len(self._sockets)
        return {block: SteeringState(value) if is_served else SteeringState.RESERVED for block, value in found.items()}

    def reserve(self, protocol: str, address: str, first: int, last: int) -> ExitStack:
        """Keep other programs from binding these ports.  What is reserved already, or served and not held, is not
        checked.

        Return what releases the ports when it is closed, as far as they are not served then.  PortInUse: a port is in
        use (of a range, the message says by which program).  Conflict: the address is not this host's.  Unsupported:
        steering is unavailable.  On any error nothing is reserved.
        """
        wanted = [*keys.blocks(protocol, address, first, last)]
        if ":" in address and len(self._sockets) < len(KINDS):
            self._require()
            raise Unsupported("this kernel has no IPv6 sockets")
        with self._lock:
            is_known = all(map(self._is_reserved, wanted))
        if not is_known:
            # A single port has a socket meanwhile; a range's address is only checked.  So is a single port's if another
            # program may have the port at an excluded address.
            excluded = self.excluded
            is_bound = first == last and not excluded
            with sockets.bind_port(protocol, address, first if is_bound else 0) as own:
                if not is_bound:
                    own.close()
                with self._lock:
                    added = [block for block in wanted if not self._is_reserved(block)]
                    self._require().update(dict.fromkeys(added, SteeringState.RESERVED))
                try:
                    port = None if is_bound else sockets.first_port_in_use(protocol, address, first, last, excluded)
                    if port is not None:
                        raise PortInUse(sockets.describe_holder(protocol, address, port))
                except GangwayError:
                    self._release(added)
                    raise
        reservation = ExitStack()
        reservation.callback(self.release, protocol, address, first, last)
        return reservation

    def release(self, protocol: str, address: str, first: int, last: int) -> None:
        """Let other programs bind these ports, as far as they are reserved and not served."""
        self._release(keys.blocks(protocol, address, first, last))

    def add(self, entries: Mapping[PortBlock, SteeringState]) -> None:
        """Serve ports by the relay, reserved or held ones: all of them or none.

        HostRefused: the kernel or the relay refused.  Unsupported: steering is unavailable.
        """
        with self._lock:
            port_map = self._require()
            if self._relay.shared_count() < len(self._sockets):
                self._share_sockets(port_map)
            port_map.update(entries)

    def reclaim_auto_bound(self) -> None:
        """Forget auto-bound ports without a socket now and at the last call: the kernel does not report every end."""
        with self._lock:
            found = [] if self._map is None else self._map.loaded.keys("auto_bound", keys.AUTO_BOUND_BYTES)
        ports = {key: keys.unpack_auto_bound(key) for key in found}
        bound = {protocol: sockets.bound_ports(protocol) for protocol, _ in ports.values()}
        unused = {key for key, (protocol, port) in ports.items() if port not in bound[protocol]}
        with self._lock:
            for key in unused & self._unused if self._map is not None else ():
                self._require().loaded.delete("auto_bound", key)
            self._unused = unused

    def close(self) -> None:
        """Close all descriptors; while the relay runs, ports are still steered."""
        super().close()
        for sock in self._sockets:
            sock.close()

    def _is_reserved(self, block: PortBlock) -> bool:
        return self._require().lookup(block) in (SteeringState.RESERVED, SteeringState.SERVED)

    def _release(self, blocks: Iterable[PortBlock]) -> None:
        with self._lock:
            if self._map is not None:
                self._map.remove([block for block in blocks if self._map.lookup(block) == SteeringState.RESERVED])

    def _load(self, former_links: Sequence[int]) -> PortMap:
        missing = requirements.bind_errors()
        if missing is not None:
            raise Unsupported(missing)
        for protocol in {protocol for protocol, _ in KINDS}:
            sockets.bound_ports(protocol)  # HostRefused: without the kernel's socket table no port could be checked
        auto_bound = self._auto_bound_fd()
        loaded = LoadedObject(OBJECT, former_links, maps={} if auto_bound is None else {"auto_bound": auto_bound})
        port_map = PortMap(loaded, "published", keys.STATE_BYTES, keys.STEERING_ROWS, keys.steering_spans)
        try:
            for protocol, family in KINDS[len(self._sockets) :]:
                if sockets.has_sockets(protocol, family):
                    self._sockets.append(sock := sockets.bind_unreachable(protocol, family))
                    if protocol == "udp":
                        with suppress(OSError):
                            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BYTES)
            for kind, sock in zip(KINDS, self._sockets, strict=False):
                port_map.loaded.update("relay_sockets", keys.pack_kind(*kind), sock.fileno().to_bytes(8, sys.byteorder))
        except BaseException:
            port_map.close()
            raise
        return port_map

    def _hand_over(self) -> None:
        if self._map is None:
            for sock in self._sockets:
                sock.close()
            self._sockets = []
        with suppress(HostRefused):  # the relay is ending: the next one gets them
            if self._map is not None and self._relay.shared_count():
                self._share_sockets(self._map)
        super()._hand_over()
        with suppress(HostRefused):
            self._relay.hold(_SOCKETS, [sock.fileno() for sock in self._sockets])

    def _share_sockets(self, port_map: PortMap) -> None:
        """Give the relay the sockets.  It must know its ports before: clients may be waiting."""
        binding = port_map.loaded.map_fd("relay_binding")
        for (protocol, family), sock in zip(KINDS, self._sockets, strict=False):
            self._relay.share(protocol, family, [sock.fileno(), *([binding] if protocol == "udp" else ())])
