"""Which routes the clients of one host address and port take, whether it is published there or not.

A Plan has the routes of a mapping; this narrows them to what one kind of client gets at one address.  It is pure, too.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from gangway.model import Address, PortMapping, PortRange, without_zone
from gangway.plan import MappingPlan, Origin, Road, Route, SeenAs, is_link_local
from gangway.reasons import Code, Reason

_NOT_STEERED = "it is not steered there"


def routes_to(planned: MappingPlan, address: Address, port: int, origin: Origin | None = None) -> Iterator[Route]:
    """Yield the routes of clients of a host address, and of one of the mapping's ports there.

    `origin` limits them to clients from there.  An unspecified address stands for all addresses.
    """
    one = replace(planned, mapping=_single(planned.mapping, port))
    if address.is_unspecified:
        yield from (route for route in one.routes if origin in (None, route.origin))
        return
    for asked in origins_reaching(address) if origin is None else (origin,):
        if address.is_loopback and asked in (Origin.REMOTE, Origin.CONTAINER):
            yield from _blocked(asked, Reason(Code.OWN_LOOPBACK, str(address)))
        else:
            # A process of the host is `loopback` or `host` by the address that it connects to.
            actual = asked if asked in (Origin.REMOTE, Origin.CONTAINER) else origins_reaching(address)[0]
            found = (route for route in routes_at(one, address) if route.origin is actual)
            yield from (replace(route, origin=asked) for route in found)


def routes_past(published: Collection[PortMapping], address: Address, origin: Origin | None = None) -> Iterator[Route]:
    """Yield the routes of clients of an address at which their port is not published, but at others it is."""
    at = dict.fromkeys(mapping.host_address for mapping in published)
    code = Code.LOOPBACK_ONLY if len(at) == 1 and next(iter(at)).is_loopback else Code.ELSEWHERE
    for asked in origins_reaching(address) if origin is None else (origin,):
        yield from _blocked(asked, Reason(code, " and ".join(map(str, at))))


def routes_at(planned: MappingPlan, host_address: Address) -> Iterator[Route]:
    """Yield the routes of clients that connect to `host_address`, one of the mapping's: where it is link-local, nat and
    redirect become relay, or blocked if the relay does not serve the mapping."""
    at = without_zone(host_address)
    special = {(route.origin, route.neighbour): route for route in planned.routes if at in route.only_at}
    for route in planned.routes:
        if route.only_at:
            continue
        if (exception := special.get((route.origin, route.neighbour))) is not None:
            yield exception
        elif route.road in (Road.NAT, Road.REDIRECT) and is_link_local(host_address):
            if planned.mapping.is_held and not (planned.is_steered or planned.is_leased):
                reason, road, seen_as = Reason(Code.HELD, _NOT_STEERED), Road.BLOCKED, SeenAs.NOBODY
            else:
                reason, road, seen_as = Reason(Code.LINK_LOCAL, str(host_address)), Road.RELAY, SeenAs.GATEWAY
            yield replace(route, road=road, reason=reason, seen_as=seen_as)
        else:
            yield route


def origins_reaching(host_address: Address) -> tuple[Origin, ...]:
    """Return the origins that connect to `host_address`: loopback to loopback addresses, the others to the rest."""
    return tuple(origin for origin in Origin if host_address.is_loopback == (origin is Origin.LOOPBACK))


def _single(mapping: PortMapping, port: int) -> PortMapping:
    """Return the mapping of one of the ports only."""
    to = port - mapping.host_ports.first + mapping.container_ports.first
    return replace(mapping, host_ports=PortRange(port, port), container_ports=PortRange(to, to))


def _blocked(origin: Origin, reason: Reason) -> Iterator[Route]:
    for neighbour in (False, True) if origin is Origin.CONTAINER else (False,):
        yield Route(origin, neighbour, Road.BLOCKED, reason, SeenAs.NOBODY)
