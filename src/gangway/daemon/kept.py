"""The file of what was published with `--keep`: what it says after a port is added or removed."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from gangway.daemon.declaration import Document, PublishTable, port_text
from gangway.daemon.messages import NetworkRequest
from gangway.model import PortMapping, PortRequest, parse_port


def with_ports(
    document: Document, container: str, network: str, requests: Sequence[PortRequest], created: NetworkRequest | None
) -> Document:
    """Add ports of a container, which is on that network, for the same clients; and the network, if it is `created`."""
    admitted = list(map(str, requests[0].admitted))
    tables = [_on_network(one, network) if one.container == container else one for one in document.publish]
    same = next((one for one in tables if (one.container, one.admitted) == (container, admitted)), None)
    if same is None:
        same = PublishTable(container, network, admitted=admitted)
        tables.append(same)
    same.ports = list(dict.fromkeys((*same.ports, *map(port_text, requests))))
    networks = [one for one in document.network if created is None or one.name != created.name]
    return Document([*networks, created] if created else networks, tables)


def without_ports(document: Document, container: str, named: Sequence[PortRequest]) -> Document:
    """Remove the ports of a container that are named, all if none is, and a network that had only these."""
    tables = list[PublishTable]()
    for table in document.publish:
        if table.container == container:
            left = [text for port in map(parse_port, table.ports) if named for text in _left_of(port, named)]
            table = msgspec.structs.replace(table, ports=left)
        if table.ports:
            tables.append(table)
    unused = {one.network for one in document.publish} - {one.network for one in tables}
    return Document([one for one in document.network if one.name not in unused], tables)


def names(named: PortRequest, port: PortRequest) -> bool:
    """True if a `-p` names a port, or that port at some of its addresses."""
    return port == named or any(map(_naming(named, port), port.host_addresses))


def _left_of(port: PortRequest, named: Sequence[PortRequest]) -> list[str]:
    """Return what is left of a port: all of it, what is at other addresses, or nothing."""
    addresses = [at for at in port.host_addresses if not any(_naming(one, port)(at) for one in named)]
    if tuple(addresses) == port.host_addresses:
        return [] if port in named else [port_text(port)]
    return [port_text(replace(port, host_addresses=(address,))) for address in addresses]


def _naming(named: PortRequest, port: PortRequest) -> Callable[..., bool]:
    """Return a function that is true of the addresses of a port at which a `-p` names it."""
    if port.host_ports is None or port.is_choice:
        return lambda _address: False
    ports = port.host_ports, port.container_ports
    return lambda address: named.names(PortMapping("", port.protocol, address, *ports))


def _on_network(table: PublishTable, network: str) -> PublishTable:
    return msgspec.structs.replace(table, network=network)
