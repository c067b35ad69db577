"""Host ports for a `-p`: choose them, and reserve them before another program binds one.

A port is reserved by a socket of its own, or by steering.  A request is for all of its ports at all of its addresses,
or for none.  Where it leaves a choice, the next choice is tried when one port of it is in use: the number has to be the
same for 0.0.0.0 and ::.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Self

from gangway.ebpf.steering import Steering
from gangway.errors import Conflict, GangwayError, PortInUse, Unsupported
from gangway.host import sockets
from gangway.model import ANY, PortMapping, PortRange, PortRequest
from gangway.plan import MappingPlan
from gangway.reconcile.state import ports_of
from gangway.relay.protocol import HostPorts, Mode, Serve
from gangway.state.port_index import PortIndex

Held = dict[HostPorts, socket.socket | ExitStack]
"""What reserves ports: closing it frees them."""

# How many numbers of the kernel's choice are tried.
_TRIES = 20
# The range to choose from where the kernel has no sockets of the protocol, and so cannot choose (RFC 6335, 6).
_DYNAMIC = PortRange(49152, 65535)


class Allocation:
    """The host ports that are about to be published; `decide` plans a mapping.

    At the end of the block its reservations are closed, and `mappings` that are left in it are removed from the index.
    """

    def __init__(self, index: PortIndex, steering: Steering, decide: Callable[[PortMapping], MappingPlan]) -> None:
        self._index, self._steering, self._decide = index, steering, decide
        self.held: Held = {}  # what reserves ports: closing it frees them
        self.mappings: list[PortMapping] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for mapping in self.mappings:
            self._index.remove(mapping)
        with ExitStack() as last:  # a failure keeps no port reserved but its own
            for held in self.held.values():
                last.callback(held.close)

    def allocate(self, container: str, request: PortRequest) -> None:
        """Reserve the ports of a request for a container, and add its mappings.

        PortInUse, Conflict: a port is in use; the message says by what.
        """
        refused: GangwayError | None = None
        for choice in self._choices(request):
            try:
                return self._reserve(container, request, choice)
            except (PortInUse, Conflict) as error:
                refused = error
        if request.is_choice:
            wanted = f"none of the host ports {request.host_ports}" if request.host_ports else "no host port"
            raise PortInUse(f"{wanted} is free; the last one tried: {refused}")
        raise refused or PortInUse("no host port is free")

    def reserve(self, mapping: PortMapping, name_holder: bool = True) -> None:
        """Reserve the ports of a mapping, unless dockerd holds them, and add it.

        PortInUse, Conflict: a port is in use; the message says by which program only if `name_holder`.
        """
        has_sockets = sockets.has_sockets(mapping.protocol.value)
        with self._part() as part:
            self._index.add(mapping)
            part.mappings.append(mapping)
            for ports, served in ports_of(self._decide(mapping)) if has_sockets and not mapping.is_held else ():
                part.held[ports] = self._hold(served, name_holder)
            part.move_to(self)

    def reserved(self) -> dict[HostPorts, Sequence[int]]:
        """Return the reserved ports, each with the descriptors that the relay needs to serve it."""
        return {ports: [held.fileno()] if isinstance(held, socket.socket) else [] for ports, held in self.held.items()}

    def _choices(self, request: PortRequest) -> Iterator[PortRange]:
        """Yield the host ports to try; the kernel chooses where any will do."""
        given = request.host_ports
        if given is not None and not request.is_choice:
            yield given
        elif given is None and sockets.has_sockets(request.protocol.value):
            for _ in range(_TRIES):
                with sockets.bind_port(request.protocol.value, str(request.host_addresses[0]), 0) as sock:
                    number = sock.getsockname()[1]
                yield PortRange(number, number)
        else:
            numbers = given or _DYNAMIC
            yield from (PortRange(port, port) for port in range(numbers.first, numbers.last + 1))

    def _reserve(self, container: str, request: PortRequest, host_ports: PortRange) -> None:
        """Reserve these ports at each address of a request: all or none."""
        with self._part() as part:
            for address in request.host_addresses:
                ports = host_ports, request.container_ports
                mapping = PortMapping(
                    container, request.protocol, address, *ports, request.source, admitted=request.admitted
                )
                try:
                    part.reserve(mapping, name_holder=not request.is_choice)
                except Unsupported:
                    # The kernel has no IPv6; `::` may be left out if the request does not name it.
                    if address != ANY[1] or request.host_addresses != ANY:
                        raise
            part.move_to(self)

    def _part(self) -> "Allocation":
        """Return a part of this allocation, which is added to it whole or not at all."""
        return Allocation(self._index, self._steering, self._decide)

    def move_to(self, other: "Allocation") -> None:
        """Let another allocation have what this one has reserved."""
        other.mappings += self.mappings
        other.held |= self.held
        self.mappings, self.held = [], {}

    def _hold(self, served: Serve, name_holder: bool) -> socket.socket | ExitStack:
        """Reserve ports.  PortInUse says which program has one only if `name_holder`: finding out takes a while."""
        ports = served.ports
        try:
            if served.mode is Mode.SHARED:
                return self._steering.reserve(*ports)
            return sockets.bind_port(ports.protocol, ports.address, ports.first)
        except PortInUse:
            if name_holder and ports.first == ports.last:
                raise PortInUse(sockets.describe_holder(ports.protocol, ports.address, ports.first)) from None
            raise
