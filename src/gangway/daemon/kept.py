"""The file of what was published with `--keep`: what it says after a port is added or removed."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from gangway.daemon.declaration import Document, PublishTable, networks_of
from gangway.daemon.messages import NetworkRequest
from gangway.model import ON_DEMAND, PortMapping, PortRequest, parse_port


def with_ports(
    document: Document,
    container: str,
    networks: Sequence[str],
    requests: Sequence[PortRequest],
    created: Sequence[NetworkRequest],
) -> Document:
    """Add ports of a container, which is on these networks, for the same clients; and the networks to be `created`."""
    admitted = list(map(str, requests[0].admitted))
    tables = [_on_networks(one, networks) if one.container == container else one for one in document.publish]
    same = next((one for one in tables if (one.container, one.admitted) == (container, admitted)), None)
    if same is None:
        same = _on_networks(PublishTable(container, admitted=admitted), networks)
        tables.append(same)
    same.ports = list(dict.fromkeys((*same.ports, *map(str, requests))))
    names = {one.name for one in created}
    return Document([*(one for one in document.network if one.name not in names), *created], tables)


def without_ports(document: Document, container: str, named: Sequence[PortRequest]) -> Document:
    """Remove the ports of a container that are named, all if none is, and a network that had only these."""
    tables = list[PublishTable]()
    for table in document.publish:
        if table.container == container:
            left = [text for port in map(parse_port, table.ports) if named for text in _left_of(port, named)]
            table = msgspec.structs.replace(table, ports=left)
        if table.ports:
            tables.append(table)
    return _with_tables(document, tables)


def without_network(document: Document, container: str, network: str) -> Document:
    """Remove a container from a network, and that if nothing else is on it."""

    def left(table: PublishTable) -> PublishTable:
        return _on_networks(table, [one for one in networks_of(table) if one != network])

    return _with_tables(document, [left(one) if one.container == container else one for one in document.publish])


def names(named: PortRequest, port: PortRequest) -> bool:
    """True if a `-p` names a port, or that port at some of its addresses."""
    return port == named or any(map(_naming(named, port), port.host_addresses))


def _left_of(port: PortRequest, named: Sequence[PortRequest]) -> list[str]:
    """Return what is left of a port: all of it, what is at other addresses, or nothing."""
    addresses = [at for at in port.host_addresses if not any(_naming(one, port)(at) for one in named)]
    if tuple(addresses) == port.host_addresses:
        return [] if port in named else [str(port)]
    return [str(replace(port, host_addresses=(address,))) for address in addresses]


def _naming(named: PortRequest, port: PortRequest) -> Callable[..., bool]:
    """Return a function that is true of the addresses of a port at which a `-p` names it."""
    if port.host_ports is None or port.is_choice:
        return lambda _address: False
    ports = port.host_ports, port.container_ports
    return lambda address: named.names(PortMapping("", port.protocol, address, *ports))


def _on_networks(table: PublishTable, networks: Sequence[str]) -> PublishTable:
    """Put a container on these networks."""
    written = list(networks) if len(networks) > 1 else next((one for one in networks if one != ON_DEMAND), "")
    return msgspec.structs.replace(table, network=written)


def _with_tables(document: Document, tables: list[PublishTable]) -> Document:
    """Replace the tables of a document, and remove the networks that only the former ones need."""
    former, needed = ({name for one in some for name in networks_of(one)} for some in (document.publish, tables))
    return Document([one for one in document.network if one.name not in former - needed], tables)
