"""Host ports for a `-p`: choosing them, and taking them before anybody else does.

What this file knows: what a PortRequest asks for, and that ports are taken by a socket for each, or by steering.  What
it must not know: what becomes of them.

A request is for all of its ports at all of its addresses, or for none.  Where it leaves a choice, the next choice is
tried when one port of it is taken: for 0.0.0.0 and :: the number has to be the same.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from gangway.ebpf.steering import Reservation, Steering
from gangway.errors import Conflict, GangwayError, PortTaken, Unsupported
from gangway.host import sockets as ports
from gangway.model import ANY, Address, PortMapping, PortRange, PortRequest
from gangway.plan import MappingPlan
from gangway.reconcile.diff import HostPorts, ports_of
from gangway.state.port_index import PortIndex

Reserved = dict[HostPorts, socket.socket | Reservation]
"""Sockets, and what steering has taken; closed, the ports are anybody's."""

# How many numbers of the kernel's choice are tried.
_TRIES = 20
# Where a number is looked for when the kernel has no sockets of the protocol to choose one by (RFC 6335, 6).
_DYNAMIC = PortRange(49152, 65535)


class Reserving:
    """Takes ports for a container.

    `decide` says what becomes of a mapping.  `steered`: where one socket serves many ports.
    """

    def __init__(
        self, container: str, taken: PortIndex, steered: Steering, decide: Callable[[PortMapping], MappingPlan]
    ) -> None:
        self._container = container
        self._taken = taken
        self._steered = steered
        self._decide = decide

    def reserve(self, request: PortRequest) -> tuple[list[PortMapping], Reserved]:
        """The mappings that a request means, and what takes their ports; they are the caller's.

        PortTaken, Conflict: they cannot be had, and who has them.
        """
        refused: GangwayError | None = None
        for choice in self._choices(request):
            try:
                return self._take(request, choice)
            except (PortTaken, Conflict) as error:
                refused = error
        if request.is_choice:
            raise PortTaken(f"none of the host ports {request.host_ports or ''} is free; the last one tried: {refused}")
        raise refused or PortTaken("there is no port to take")

    def _choices(self, request: PortRequest) -> Iterator[PortRange]:
        """The host ports to try; that of a free one is decided by taking it."""
        given = request.host_ports
        if given is not None and not request.is_choice:
            yield given
        elif given is None and ports.has_sockets(request.protocol.value):
            for _ in range(_TRIES):
                yield self._free(request)
        else:
            numbers = given or _DYNAMIC
            yield from (PortRange(port, port) for port in range(numbers.first, numbers.last + 1))

    def _free(self, request: PortRequest) -> PortRange:
        with ports.take(request.protocol.value, str(request.host_addresses[0]), 0) as sock:
            number = sock.getsockname()[1]
        return PortRange(number, number)

    def _take(self, request: PortRequest, host_ports: PortRange) -> tuple[list[PortMapping], Reserved]:
        mappings: list[PortMapping] = []
        reserved: Reserved = {}
        with ExitStack() as opened:
            for address in request.host_addresses:
                mapping = PortMapping(self._container, request.protocol, address, host_ports, request.container_ports)
                other = self._taken.collision(mapping)
                if other is not None:
                    raise Conflict(f"{mapping} is taken: container {other.container} has {other}")
                try:
                    reserved |= self._take_at(mapping, request.is_choice, opened)
                except Unsupported:
                    if not _can_do_without(address, request):
                        raise
                else:
                    mappings.append(mapping)
            opened.pop_all()
        return mappings, reserved

    def _take_at(self, mapping: PortMapping, is_choice: bool, opened: ExitStack) -> Reserved:
        found: Reserved = {}
        if ports.has_sockets(mapping.protocol.value):
            for at, target in ports_of(self._decide(mapping)):
                found[at] = take(at, self._steered if target.is_steered else None, name_holder=not is_choice)
                opened.callback(found[at].close)
        return found


def take(at: HostPorts, steered: Steering | None, name_holder: bool = True) -> socket.socket | Reservation:
    """Takes a port by a socket of its own, or some by steering.  PortTaken says who has one, if that is asked for."""
    try:
        return ports.take(at.protocol, at.address, at.first) if steered is None else steered.reserve(*at)
    except PortTaken:
        if name_holder and at.first == at.last:
            raise PortTaken(ports.named(at.protocol, at.address, at.first)) from None
        raise


def _can_do_without(address: Address, request: PortRequest) -> bool:
    """Nobody has asked for :: by name, and this kernel has no IPv6."""
    return address == ANY[1] and request.host_addresses == ANY
