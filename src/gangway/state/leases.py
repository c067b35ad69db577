"""Leases: the mappings that docker-proxy launchers request, for as long as each one's connection lasts.

What this file knows: what a launcher's socket says about its port, and that a lease is kept in memory only.  What it
must not know: connections to launchers.

A lease needs no network or endpoint of gangway's.  It goes through the plan like any other mapping, with the firewall
`none`: dockerd writes its own rules.  Its host address and port are read from the socket, whatever the launcher says:
so no launcher can redirect clients of ports that are not its own.

Leases are granted, ended and restored in a thread of their own, so that none waits for a request.  Questions may come
from any thread.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address

from gangway import runtime
from gangway.ebpf import keys
from gangway.ebpf.keys import PortBlock, Target
from gangway.errors import GangwayError, InvalidRequest
from gangway.facts import HostFacts
from gangway.host import sockets
from gangway.inet import FAMILIES, PROTOCOLS
from gangway.model import ANY, PortMapping, PortRange, Protocol, Source, lease_endpoint
from gangway.plan import MappingPlan, plan_mapping
from gangway.reconcile.dataplane import DataPlane, lease_blocks
from gangway.reconcile.state import ports_of, redirects_of
from gangway.relay import protocol
from gangway.relay.protocol import Mode, Serve
from gangway.state.port_index import PortIndex

_LOOKS = 10  # how often to look for former flows of a lease's clients if there were any at first: for a second


@dataclass(frozen=True, eq=False)
class Lease:
    """A granted lease.  Its first mapping is that of the socket's own family; a dual-stack socket has two."""

    mappings: tuple[PortMapping, ...]
    sock: socket.socket  # the port's socket: ours, too, so that a new relay can be given it
    pid: int  # the launcher's; 0 if it is in a pid namespace that we do not see


class Leases:
    """The leases of a network namespace; `facts` gathers what decisions about them depend on.

    `delete_former_flows` deletes tracked connections to a mapping's ports that do not lead to its container; it returns
    whether there were any.
    """

    def __init__(
        self,
        index: PortIndex,
        dataplane: DataPlane,
        facts: Callable[[], HostFacts],
        delete_former_flows: Callable[[Iterable[MappingPlan]], bool],
    ) -> None:
        self._index, self._dataplane, self._facts = index, dataplane, facts
        self._delete_former_flows = delete_former_flows
        self._leases: dict[PortMapping, Lease] = {}
        self._settling: dict[PortMapping, int] = {}  # how often flows of a new lease's clients are still to be deleted
        self.unclaimed = {one.ports for one in dataplane.leased()}
        """Ports that an earlier daemon leased, and whose launchers have not taken new leases yet."""
        self.is_incomplete = False  # a new relay could not be given all leases: `restore` has to be called again

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def has_any(self) -> bool:
        """True if launchers have ports, or had them when the daemon started and are about to take them again."""
        return bool(self._leases or self.unclaimed)

    def grant(self, wanted: protocol.Lease, sock: socket.socket, pid: int) -> Lease:
        """Publish the port of a launcher's socket, which is the lease's from now on; it is closed if that fails.

        InvalidRequest: the socket cannot be published.  Conflict: the port is.  ProcessLookupError: it has exited.
        """
        with ExitStack() as undo:
            undo.enter_context(sock)
            lease = Lease(tuple(_mappings(wanted, sock)), sock, pid)
            for mapping in lease.mappings:
                self._index.add(mapping)
                undo.callback(self._index.remove, mapping)
            port, redirects = self._decide(lease)
            with _descriptors(lease) as fds:
                self._dataplane.serve_lease(port, redirects, fds)
            undo.pop_all()
        self._leases |= dict.fromkeys(lease.mappings, lease)
        self._settling |= {one: _LOOKS for one in lease.mappings if one.protocol is Protocol.UDP}
        self.unclaimed.discard(port.ports)
        return lease

    @property
    def is_settling(self) -> bool:
        """True if `settle` has to be called: soon, but once for all leases of a burst."""
        return bool(self._settling)

    def settle(self) -> None:
        """Let dockerd's rules serve the UDP clients of new leases that sent datagrams before these rules existed.

        The kernel would lead them to the relay, or nowhere, as long as they send.  dockerd writes a port's rules before
        it starts the launcher.  If there were such clients, answers by the relay may still be on their way, and each
        would lead a client back to it: so this is done some more times.
        """
        looks, facts = {one: left for one, left in self._settling.items() if one in self._leases}, self._facts()
        self._settling = {}
        is_any = self._delete_former_flows([_plan(mapping, facts) for mapping in looks])
        self._settling = {one: left - 1 for one, left in looks.items() if left > 1 and (is_any or left < _LOOKS)}

    def end(self, lease: Lease) -> None:
        """Unpublish a lease's port; it is free afterwards, even if a part of this fails."""
        with lease.sock, ExitStack() as last:
            for mapping in lease.mappings:
                del self._leases[mapping]
                last.callback(self._index.remove, mapping)
            self._dataplane.remove_lease(*self._decide(lease))
        if not self._leases:
            self._dataplane.restore_if_unused()

    def restore(self) -> str:
        """Have a new relay serve every lease; return what to log.  ExceptionGroup: some could not be served."""
        failures: list[Exception] = []
        self._dataplane.relay.is_running()  # counts the exit
        exits = self._dataplane.relay.exits
        for lease in dict.fromkeys(self._leases.values()):
            port, _ = self._decide(lease)  # the redirects have outlived the relay, and count on
            try:
                with _descriptors(lease) as fds:
                    self._dataplane.serve([port], {port.ports: fds})
            except ProcessLookupError:  # the launcher has exited, and the lease is about to end
                continue
            except (GangwayError, OSError) as error:
                failures.append(error)
                if not self._dataplane.relay.is_running():
                    break  # it cannot be started: the other leases would fail, too, each after a while
        self.is_incomplete = bool(failures)
        if failures:
            raise ExceptionGroup("leases could not be served again", failures)
        return self._dataplane.restarted("leases", exits)

    def reap(self, is_overdue: bool) -> None:
        """Unpublish the unclaimed ports whose launchers have exited; all of them if they are overdue."""
        served = self._dataplane.leased()
        self.unclaimed &= {one.ports for one in served}  # a relay that has exited serves none
        for one in served:
            if one.ports in self.unclaimed and (is_overdue or one.mode is Mode.ENDED):
                found = lease_blocks(one.ports) if one.ports.protocol in keys.PROTOCOLS else ()
                at = partial(self._index.at, Protocol(one.ports.protocol))
                blocks = [block for block in found if at(ip_address(block.address), block.first) is None]
                self._dataplane.remove_lease(one, blocks)
                self.unclaimed.discard(one.ports)

    def planned(self) -> tuple[MappingPlan, ...]:
        """Return every lease's mappings, as they are decided now."""
        facts = self._facts()
        return tuple(_plan(mapping, facts) for mapping in tuple(self._leases))

    def find(self, mapping: PortMapping) -> MappingPlan | None:
        """Return a lease's mapping as it is decided now; None if it is no lease's."""
        return _plan(mapping, self._facts()) if mapping in self._leases else None

    def _decide(self, lease: Lease) -> tuple[Serve, dict[PortBlock, Target]]:
        """Return the relay's port, which is one, and the redirects of all mappings."""
        facts = self._facts()
        planned = [_plan(mapping, facts) for mapping in lease.mappings]
        ((_, port),) = ports_of(planned[0])
        return port, dict(entry for one in planned for entry in redirects_of(one))


@contextmanager
def _descriptors(lease: Lease) -> Iterator[list[int]]:
    """Provide what the relay needs to serve a lease: its socket and, so that it notices its end, the launcher's pidfd.

    ProcessLookupError: the launcher has exited.
    """
    fds = [lease.sock.fileno()]
    with ExitStack() as opened:
        try:
            fds.append(os.pidfd_open(lease.pid))
            opened.callback(os.close, fds[1])
        except ProcessLookupError:
            raise
        except OSError:  # its number is not known, or the kernel has no pidfd_open (before 5.3)
            pass
        yield fds


def _plan(mapping: PortMapping, facts: HostFacts) -> MappingPlan:
    return plan_mapping(mapping, lease_endpoint(mapping), None, facts)


def _mappings(wanted: protocol.Lease, sock: socket.socket) -> Iterator[PortMapping]:
    """Yield the mappings of a launcher's socket: at its address, and at IPv4's if it takes both families."""
    if sock.proto != PROTOCOLS[wanted.protocol] or sock.family not in FAMILIES.values():
        raise InvalidRequest(f"the socket is not a {wanted.protocol} socket")
    if not _is_in_this_namespace(sock):
        raise InvalidRequest("the socket is of another network namespace")
    listens = sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    host, port, *more = sock.getsockname()
    if not listens or not port:
        raise InvalidRequest("the socket is not bound to a port, or does not listen")
    zone = f"%{socket.if_indextoname(more[1])}" if more and more[1] else ""
    address = ip_address(host.partition("%")[0] + zone)
    sockets.require_no_broadcast(host)
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
