"""Leases: the mappings that docker-proxy launchers state, for as long as each one's connection lasts.

What this file knows: what a launcher's socket says about its port, and that a lease is kept in memory only.  What it
must not know: connections to launchers.

A lease needs no network or endpoint of gangway's.  It goes through the plan like any other mapping, with the firewall
`none`: dockerd writes its own rules.  Its host address and port are read from the socket, whatever the launcher says:
so nobody can have clients led astray but at ports that are its own.

Leases are granted and ended in a thread of their own, so that none waits for a request.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from threading import RLock

from gangway import runtime
from gangway.errors import GangwayError, InvalidRequest
from gangway.model import ANY, Endpoint, PortMapping, PortRange, Protocol, Source
from gangway.plan import HostFacts, MappingPlan, plan_mapping
from gangway.reconcile.dataplane import Reserved
from gangway.reconcile.diff import diff
from gangway.reconcile.executor import Executor
from gangway.reconcile.state import State, ports_of, redirects_of
from gangway.relay import protocol
from gangway.relay.sockets import PROTOCOLS
from gangway.state.port_index import PortIndex


@dataclass(frozen=True, eq=False)
class Lease:
    """A granted lease.  Its first mapping is that of the socket's own family; a dual-stack socket has two."""

    mappings: tuple[PortMapping, ...]
    address: str
    """The container's."""
    sock: socket.socket
    """The port's socket: ours, too, so that a new relay can be given it."""
    pid: int
    """The launcher's; 0 if it is in a pid namespace that we do not see."""


class Leases:
    """The leases of a network namespace; `facts` gathers what decisions about them depend on."""

    def __init__(self, index: PortIndex, executor: Executor, facts: Callable[[], HostFacts]) -> None:
        self._index = index
        self._executor = executor
        self._facts = facts
        self._lock = RLock()
        self._leases: dict[PortMapping, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, wanted: protocol.Lease, sock: socket.socket, pid: int) -> Lease:
        """Publish the port of a launcher's socket, which is the lease's from now on.

        InvalidRequest: the socket cannot be published.  Conflict: the port is published already.
        """
        lease = Lease(tuple(_mappings(wanted, sock)), wanted.to.address, sock, pid)
        with self._lock, ExitStack() as undo:
            for mapping in lease.mappings:
                self._index.add(mapping)
                undo.callback(self._index.remove, mapping)
            self._carry_out(State(), self._state(lease), lease)
            for mapping in lease.mappings:
                self._leases[mapping] = lease
            undo.pop_all()
        return lease

    def end(self, lease: Lease) -> None:
        """Unpublish a lease's port; it is free afterwards."""
        with self._lock, lease.sock:
            for mapping in lease.mappings:
                del self._leases[mapping]
                self._index.remove(mapping)
            self._carry_out(self._state(lease), State())
            if not self._leases:
                self._executor.dataplane.stop_if_unused()

    def restore(self) -> None:
        """Have a new relay serve every lease.  ExceptionGroup: some could not be served."""
        failures: list[Exception] = []
        with self._lock:
            for lease in dict.fromkeys(self._leases.values()):
                try:
                    self._carry_out(State(), replace(self._state(lease), redirects={}), lease)
                except (GangwayError, OSError) as error:
                    failures.append(error)
        if failures:
            raise ExceptionGroup("leases could not be served again", failures)

    def planned(self) -> tuple[MappingPlan, ...]:
        """Return every lease's mappings, as they are decided now."""
        facts = self._facts()
        return tuple(_plan(mapping, lease, facts) for mapping, lease in tuple(self._leases.items()))

    def find(self, mapping: PortMapping) -> MappingPlan | None:
        """Return a lease's mapping as it is decided now; None if it is no lease's."""
        lease = self._leases.get(mapping)
        return None if lease is None else _plan(mapping, lease, self._facts())

    def _state(self, lease: Lease) -> State:
        """Return what a lease makes of the host: one port of the relay's, and the redirects of all its mappings."""
        facts = self._facts()
        planned = [_plan(mapping, lease, facts) for mapping in lease.mappings]
        return State(
            ports=dict(ports_of(planned[0])),
            redirects=dict(entry for one in planned for entry in redirects_of(one)),
        )

    def _carry_out(self, before: State, after: State, lease: Lease | None = None) -> None:
        with ExitStack() as opened:
            reserved: Reserved = {}
            if lease is not None:
                fds = [lease.sock.fileno()]
                with suppress(OSError):  # it has exited, or the kernel has no pidfd_open (before 5.3)
                    fds.append(os.pidfd_open(lease.pid))
                    opened.callback(os.close, fds[-1])
                reserved = dict.fromkeys(after.ports, fds)
            self._executor.carry_out(diff(before, after), reserved)


def _plan(mapping: PortMapping, lease: Lease, facts: HostFacts) -> MappingPlan:
    return plan_mapping(mapping, Endpoint(mapping.container, "", (ip_address(lease.address),)), None, facts)


def _mappings(wanted: protocol.Lease, sock: socket.socket) -> Iterator[PortMapping]:
    """Yield the mappings of a launcher's socket: at its address, and at IPv4's if it takes both families."""
    if sock.proto != PROTOCOLS[wanted.protocol] or sock.family not in protocol.FAMILIES.values():
        raise InvalidRequest(f"the socket is not a {wanted.protocol} socket")
    if not _is_in_this_namespace(sock):
        raise InvalidRequest("the socket is of another network namespace")
    listens = sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    host, port, *more = sock.getsockname()
    if not listens or not port:
        raise InvalidRequest("the socket is not bound to a port, or does not listen")
    zone = f"%{socket.if_indextoname(more[1])}" if more and more[1] else ""
    address = ip_address(host.partition("%")[0] + zone)
    container, ports = PortRange(wanted.to.first, wanted.to.first), PortRange(port, port)
    yield PortMapping(wanted.to.address, Protocol(wanted.protocol), address, ports, container, Source.LEASE)
    if address == ANY[1] and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        yield PortMapping(wanted.to.address, Protocol(wanted.protocol), ANY[0], ports, container, Source.LEASE)


def _is_in_this_namespace(sock: socket.socket) -> bool:
    with socket.socket(socket.AF_UNIX) as own:
        try:
            return runtime.netns_cookie(sock) == runtime.netns_cookie(own)
        except OSError:  # before Linux 5.14; then nothing is redirected either
            return True
